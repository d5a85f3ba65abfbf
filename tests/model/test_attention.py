"""Law "Packing": packed loss and gradients equal those of the same examples one by one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keeptune.model import attention, varlen
from keeptune.model.attention import CannotPack, can_pack, packed_attention
from keeptune.model.loss import batch_loss, loss_is_exact
from tests.model.tiny import (
    CONFIGS,
    T5,
    UNPACKABLE,
    VOCAB_SIZE,
    gradients,
    loss_one_by_one,
    make_examples,
    make_model,
    packed,
)

# transformers 5.23 renamed these; peft 0.21 and transformers below 5.23 know the older names alone.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

LENGTHS = [9, 1, 5, 14]


def assert_packing_law(model: torch.nn.Module, lengths: list[int], *, tolerance: float = 1e-5) -> None:
    examples = make_examples(lengths)
    reference = copy.deepcopy(model)
    expected = loss_one_by_one(reference, examples)
    expected.backward()
    loss = batch_loss(model, packed(examples))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    ours, theirs = gradients(model), gradients(reference)
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_and_gradients_equal_one_by_one(name: str) -> None:
    model = make_model(CONFIGS[name])
    assert can_pack(model)
    assert model.training
    assert_packing_law(model, LENGTHS)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=6))
def test_packing_holds_for_any_lengths_through_sliding_windows(lengths: list[int]) -> None:
    assert_packing_law(make_model(CONFIGS["gemma3"]), lengths)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_packing_survives_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = make_model(CONFIGS[name])
    examples = make_examples(LENGTHS)
    batch_loss(model, packed(examples)).backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    batch_loss(model, packed(examples)).backward()
    assert torch.allclose(gradients(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packing_holds_for_a_model_wrapped_by_peft(name: str) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(make_model(CONFIGS[name]), config)
    assert can_pack(model)
    assert_packing_law(model, LENGTHS)


def test_virtual_tokens_sinks_and_encoder_decoders_are_not_packed() -> None:
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    assert not can_pack(get_peft_model(make_model(CONFIGS["llama"]), prompts))
    assert not can_pack(make_model(UNPACKABLE))
    assert not can_pack(make_model(T5))
    assert not can_pack(make_model(CONFIGS["llama"]), tolerance=-1.0)


def test_chunked_and_bidirectional_masks_are_refused() -> None:
    model = make_model(CONFIGS["llama"])
    model.config.attention_chunk_size = 4
    assert not can_pack(model)
    model = make_model(CONFIGS["llama"])
    model.config.is_causal = False
    with pytest.raises(CannotPack, match="not plainly causal"), packed_attention(model, [3]):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), position_ids=torch.arange(3)[None])


def test_attention_sinks_are_refused_before_they_are_computed() -> None:
    with pytest.raises(CannotPack, match="s_aux"):
        batch_loss(make_model(UNPACKABLE), packed(make_examples([3, 2])))


def test_an_unknown_attention_is_not_packed() -> None:
    model = make_model(CONFIGS["llama"])
    model.set_attn_implementation("flex_attention")
    assert not can_pack(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_generation_and_padded_batches_are_untouched_by_packing(name: str) -> None:
    model: Any = make_model(CONFIGS[name]).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, **settings)
    with packed_attention(model, [4, 5]):
        model(input_ids=ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    after = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_registered_name_does_not_reach_a_saved_model(tmp_path: Path) -> None:
    model = make_model(CONFIGS["llama"])
    assert can_pack(model)
    model.save_pretrained(tmp_path)
    assert "keeptune" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


def test_no_mask_of_all_tokens_by_all_tokens_is_built() -> None:
    config = copy.deepcopy(CONFIGS["mistral"])
    config.max_position_embeddings = 1024
    model = make_model(config)
    with LargestTensor() as largest:
        batch_loss(model, packed(make_examples([300, 100, 200]))).backward()
    assert largest.num_elements < 100_000 < 600 * 600


def reference_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """What `varlen_attn` and flash-attn compute, written plainly: (T, H, E) and bounds in, (T, H, E) out."""
    _, (left, right), scale = rest
    assert right == 0
    out = torch.empty_like(q)
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)
        seen = (j <= i) & (j >= i - left if left >= 0 else True)
        q1, k1, v1 = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        one = F.scaled_dot_product_attention(q1, k1, v1, seen, scale=scale, enable_gqa=True)
        out[a:b] = one[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
def test_the_call_of_a_variable_length_kernel_obeys_the_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: varlen.Kernel(reference_kernel, takes_windows=True))
    monkeypatch.setattr(attention, "has_varlen", lambda qkv, window: True)
    assert_packing_law(make_model(CONFIGS[name]), LENGTHS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_packing_holds_on_a_gpu_in_bf16(name: str) -> None:
    model: Any = make_model(CONFIGS[name])
    model.to("cuda", torch.bfloat16)
    assert can_pack(model)


def test_attention_stays_in_fp32_on_a_processor_that_computes_in_bf16() -> None:
    model = make_model(CONFIGS["llama"])
    seen: list[torch.dtype] = []
    original = F.scaled_dot_product_attention

    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(query, *args, **kwargs)
        seen.append(out.dtype)
        return out

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "scaled_dot_product_attention", attend)
        batch_loss(model, packed(make_examples(LENGTHS))).backward()
    assert seen and set(seen) == {torch.float32}


def test_bf16_weights_without_autocast_are_given_bf16_by_the_attention() -> None:
    model: Any = make_model(CONFIGS["llama"])
    model.to(torch.bfloat16)
    assert can_pack(model)
    batch_loss(model, packed(make_examples(LENGTHS))).backward()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_model_that_trains_its_norms_over_bf16_weights_packs_under_the_autocast_of_its_training(name: str) -> None:
    model: Any = make_model(CONFIGS[name])
    model.to(torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(model)
        assert loss_is_exact(model)


def test_grouped_heads_in_fp32_off_the_processor_are_repeated_as_no_fused_kernel_takes_them() -> None:
    grouped: list[bool] = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                grouped.append(kwargs["enable_gqa"])
            return func(*args, **(kwargs or {}))

    model = make_model(CONFIGS["llama"])
    with packed_attention(model, [4, 5]):
        attend = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    slip = torch.tensor([[[[0, 4, 5]]]])
    for dtype in (torch.float32, torch.bfloat16):
        query, key = (torch.zeros(1, heads, 9, 8, dtype=dtype, device="meta") for heads in (4, 2))
        with Noted():
            out, _ = attend(model, query, key, key, slip)
        assert out.shape == (1, 9, 4, 8)
    assert grouped == [False, False, True, True]
