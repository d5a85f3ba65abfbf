"""The path from base to tuned: both ends bit for bit, a straight line between, and what is saved is what was set."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from keeptune.errors import RecipeError, StorageError
from keeptune.model.artifact import load_artifact, save_artifact
from keeptune.model.load import load_model
from keeptune.model.merge import merge_adapter
from keeptune.model.methods import Method, apply_method
from keeptune.model.path import ModelPath, open_path, why_no_path
from keeptune.storage import file_sha256, read_record, verify_folder, write_record
from keeptune.text.template import Template, make_template
from keeptune.text.tokenizer import Tokenizer
from tests.model.tiny import CONFIGS, T5, make_model, trained_state
from tests.tiny import chatml_tokenizer, t5_tokenizer

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """A saved tiny base model with its text side."""

    folder: Path
    tokenizer: Tokenizer
    template: Template

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(self.folder, device=CPU, dtype=dtype)


def make_base(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Base:
    (t5_tokenizer if config.is_encoder_decoder else chatml_tokenizer)(folder)
    tokenizer = Tokenizer.load(folder)
    config = copy.deepcopy(config)
    settings = {"vocab_size": tokenizer.vocab_size, "pad_token_id": 0, **settings}
    for key, value in settings.items():
        setattr(config, key, value)
    model: Any = make_model(config)
    with torch.no_grad():
        # A zero with a sign, which any arithmetic would lose.
        next(iter(model.parameters())).view(-1)[:2] = -0.0
    model.to(dtype).save_pretrained(folder)
    template = make_template("auto", tokenizer=tokenizer, encoder_decoder=bool(config.is_encoder_decoder))
    return Base(folder, tokenizer, template)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


KINDS: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    **{name: (CONFIGS[name], {}) for name in ("llama", "llama-tied", "gpt2")},
    "llama-biased": (CONFIGS["llama"], {"attention_bias": True}),
    "t5": (T5, {}),
    "t5-untied": (T5, {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def base(kind: str) -> Base:
        if kind not in made:
            config, settings = KINDS[kind]
            made[kind] = make_base(tmp_path_factory.mktemp("base") / kind, config, **settings)
        return made[kind]

    return base


def train(
    base: Base, folder: Path, peft_type: str | None, *, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Path:
    """Save an artifact whose trained weights have all moved."""
    model = apply_method(base.load(dtype), Method("mine", peft_type, 1e-3, arguments), seed=0)
    generator = torch.Generator().manual_seed(5)
    for tensor in trained_state(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    # So much smaller than the base's value that a sum with it would lose it.
    next(iter(trained_state(model).values())).view(-1)[-2:] = 1e-12
    save_artifact(
        model,
        folder,
        base_name=str(base.folder),
        tokenizer_folder=base.folder,
        tokenizer=base.tokenizer,
        template=base.template,
        max_new_tokens=17,
        facts={"key": "of the training", "method": "mine"},
    )
    return folder


def path_of(artifact: Path, base: Base, dtype: torch.dtype = torch.float32) -> ModelPath:
    return open_path(artifact, base=base.folder, device=CPU, dtype=dtype)


def save(path: ModelPath, alpha: float, folder: Path) -> Path:
    path.save(alpha, folder, facts={})
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.tensor([[5, 9, 40, 7, 31, 12], [8, 8, 3, 60, 2, 19]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return model.eval()(**inputs).logits[:, -4:]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(
        folder / ("model.safetensors" if (folder / "config.json").exists() else "adapter_model.safetensors")
    )


def require_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def on_the_line(start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {name: start[name].float() + alpha * (end[name].float() - start[name].float()) for name in start}


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "t5", "t5-untied"])
def test_a_whole_model_goes_from_the_bases_bits_to_the_tuned_ones_in_a_straight_line(
    kind: str, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases(kind)
    tuned = train(base, tmp_path / "model", None)
    path = path_of(tuned, base)
    assert path.no_path is None
    require_same_bits(weights(save(path, 0.0, tmp_path / "at 0")), weights(base.folder))
    require_same_bits(weights(save(path, 1.0, tmp_path / "at 1")), weights(tuned))
    require_same_bits(
        weights(save(path, 0.3, tmp_path / "at 0.3")), on_the_line(weights(base.folder), weights(tuned), 0.3)
    )
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "at 1" / name).read_bytes() == (tuned / name).read_bytes()


@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_a_whole_model_in_bf16_is_interpolated_in_fp32_and_rounded_once(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", CONFIGS["llama-tied"], dtype=stored)
    tuned = train(base, tmp_path / "model", None)
    assert {tensor.dtype for tensor in weights(tuned).values()} == {torch.float32}
    path = path_of(tuned, base, dtype)
    for alpha in (0.0, 0.3, 1.0):
        line = on_the_line(weights(base.folder), weights(tuned), alpha)
        if alpha in {0.0, 1.0}:
            line = weights(tuned) if alpha else weights(base.folder)
        found = weights(save(path, alpha, tmp_path / f"at {alpha}"))
        require_same_bits(found, {name: tensor.to(dtype) for name, tensor in line.items()})
    path.set_(0.0)
    assert torch.equal(logits(path.model), logits(base.load(dtype)))
    path.set_(1.0)
    assert torch.equal(logits(path.model), logits(load_artifact(tuned, base=None, device=CPU, dtype=dtype)))


def test_tied_weights_stay_tied(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama-tied")
    path = path_of(train(base, tmp_path / "model", None), base)
    folder = save(path, 0.5, tmp_path / "half")
    for model in (path.model, load_artifact(folder, base=None, device=CPU, dtype=torch.float32)):
        inner: Any = model
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
    assert "lm_head.weight" not in weights(folder)
    assert len(path.moved) == len(weights(folder))


LINEAR = {"target_modules": "all-linear"}
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
STRAIGHT = [
    ("llama", "LORA", {}),
    ("llama", "LORA", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    ("llama", "LORA", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", "LORA", {"init_lora_weights": False}),
    ("llama", "LORA", {"init_lora_weights": "orthogonal"}),
    ("llama", "LORA", {"init_lora_weights": "mica", **QV}),
    ("llama", "LORA", {"modules_to_save": ["lm_head"]}),
    ("llama", "LORA", {"trainable_token_indices": [3, 5]}),
    ("llama-tied", "LORA", {"modules_to_save": ["embed_tokens"]}),
    ("llama-tied", "LORA", {"trainable_token_indices": [3, 5]}),
    ("llama-biased", "LORA", {"bias": "all", "modules_to_save": ["norm", "o_proj"], **QV}),
    ("llama-biased", "LORA", {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj"]}),
    ("gpt2", "LORA", {"bias": "all"}),
    ("t5", "LORA", {}),
    ("t5", "LORA", {"modules_to_save": ["lm_head"]}),
    ("llama", "IA3", {}),
    ("t5", "IA3", {}),
    ("llama", "ADALORA", {"init_r": 4, "target_r": 2}),
    ("llama", "LOHA", {"r": 4, **LINEAR}),
    ("llama", "LOKR", {"r": 2, **LINEAR}),
    ("llama", "LOKR", {"r": 2, "decompose_both": True, "decompose_factor": 8, **QV}),
    ("llama", "LOKR", {"r": 200, **QV}),
    ("llama", "VERA", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
    ("llama", "VERA", {"r": 8, "save_projection": False, "target_modules": ["q_proj", "o_proj"]}),
    ("llama", "LN_TUNING", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    ("llama", "TRAINABLE_TOKENS", {"token_indices": [3, 5]}),
    ("llama", "TRAINABLE_TOKENS", {"token_indices": [3, 5], "init_weights": False}),
    ("llama-tied", "TRAINABLE_TOKENS", {"token_indices": [3, 5]}),
    ("llama-biased", "BEFT", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", "C3A", {"block_size": 8, **QV}),
    ("llama", "DELORA", {"r": 2, **QV}),
    ("llama", "FOURIERFT", {"n_frequency": 20, **QV}),
    ("llama", "GRALORA", {"r": 8, "hybrid_r": 2, **QV}),
    ("llama", "HIRA", {"r": 4, **QV}),
    ("llama", "MISS", {"r": 4, **QV}),
    ("llama", "MISS", {"r": 4, "init_weights": "bat", **QV}),
    ("llama", "RANDLORA", {"r": 4, **QV}),
    ("llama", "SHIRA", {"r": 2, **QV}),
    ("llama", "WAVEFT", {"n_frequency": 20, **QV}),
]
CURVED = [
    ("llama", "OFT", {"oft_block_size": 4, **LINEAR}),
    ("llama", "OFT", {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    ("t5", "OFT", {"oft_block_size": 4, "target_modules": ["q", "v"]}),
    ("llama", "BOFT", {"boft_block_size": 4, **QV}),
    ("llama", "ROAD", {"group_size": 8, **QV}),
    ("llama", "LORA", {"use_dora": True}),
    ("llama", "LORA", {"use_dora": True, "init_lora_weights": False, "target_modules": ["embed_tokens", "q_proj"]}),
    ("t5", "LORA", {"use_dora": True, "target_modules": ["q"]}),
]


# PEFT warns of what these methods cannot do or what it does on purpose; it says so at training too.
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following rank_pattern keys:RuntimeWarning")


@pytest.fixture(scope="module")
def adapters(bases: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def adapter(kind: str, peft_type: str, arguments: dict[str, Any]) -> Path:
        key = json.dumps([kind, peft_type, arguments])
        if key not in made:
            made[key] = train(bases(kind), tmp_path_factory.mktemp("trained") / "adapter", peft_type, **arguments)
        return made[key]

    return adapter


@QUIET
@pytest.mark.parametrize(("kind", "peft_type", "arguments"), STRAIGHT + CURVED)
def test_an_adapter_at_0_adds_exactly_nothing_and_at_1_is_the_trained_one(
    kind: str,
    peft_type: str,
    arguments: dict[str, Any],
    bases: Callable[[str], Base],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    artifact = adapters(kind, peft_type, arguments)
    path = path_of(artifact, bases(kind))
    plain, tuned = logits(bases(kind).load()), logits(path.model)
    assert not torch.allclose(plain, tuned, atol=1e-4)
    path.set_(0.0)
    assert torch.equal(logits(path.model), plain)
    save(path, 1.0, tmp_path / "at 1")
    assert torch.equal(logits(path.model), tuned)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "at 1" / name).read_bytes() == (artifact / name).read_bytes()


@QUIET
@pytest.mark.parametrize(("kind", "peft_type", "arguments"), STRAIGHT + CURVED)
def test_what_is_saved_is_what_was_set_wherever_the_model_stood_before(
    kind: str,
    peft_type: str,
    arguments: dict[str, Any],
    bases: Callable[[str], Base],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = path_of(adapters(kind, peft_type, arguments), bases(kind))
    path.set_(0.3)
    first = logits(path.model)
    folder = save(path, 0.3, tmp_path / "first")
    for alpha in (1.0, 0.0, 0.7, 0.3):
        path.set_(alpha)
    assert torch.equal(logits(path.model), first)
    require_same_bits(weights(save(path, 0.3, tmp_path / "again")), weights(folder))
    alone = PeftModel.from_pretrained(bases(kind).load(), str(folder))
    assert torch.equal(logits(alone), first)


@QUIET
@pytest.mark.parametrize(("kind", "peft_type", "arguments"), STRAIGHT)
def test_folded_weights_go_in_a_straight_line(
    kind: str, peft_type: str, arguments: dict[str, Any], bases: Callable[[str], Base], adapters: Callable[..., Path]
) -> None:
    path = path_of(adapters(kind, peft_type, arguments), bases(kind))
    model: Any = path.model
    path.set_(0.3)
    third = copy.deepcopy(model).merge_and_unload().state_dict()
    path.set_(1.0)
    tuned = model.merge_and_unload().state_dict()
    line = on_the_line(bases(kind).load().state_dict(), tuned, 0.3)
    assert any(not torch.equal(tuned[name], third[name]) for name in tuned)
    for name, tensor in line.items():
        torch.testing.assert_close(third[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["llama-tied", "t5"])
def test_a_saved_whole_model_loads_in_transformers_alone(
    kind: str, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases(kind)
    path = path_of(train(base, tmp_path / "model", None), base)
    folder = save(path, 0.3, tmp_path / "third")
    found = logits(path.model)
    alone = (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_pretrained(folder)
    assert torch.equal(logits(alone), found)
    assert torch.equal(logits(load_artifact(folder, base=None, device=CPU, dtype=torch.float32)), found)
    for alpha in (1.0, 0.0, 0.7, 0.3):
        path.set_(alpha)
    assert torch.equal(logits(path.model), found)


def test_a_saved_adapter_loads_with_the_base_that_it_names_and_can_be_merged(
    bases: Callable[[str], Base], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    path = path_of(adapters("llama", "LORA", {}), bases("llama"))
    folder = save(path, 0.3, tmp_path / "third")
    found = logits(path.model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(str(folder))), found)
    assert torch.equal(logits(load_artifact(folder, base=None, device=CPU, dtype=torch.float32)), found)
    merge_adapter(folder, base=bases("llama").folder, out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), found, atol=1e-4, rtol=1e-4)


def test_loras_b_alone_is_scaled(bases: Callable[[str], Base], adapters: Callable[..., Path], tmp_path: Path) -> None:
    artifact = adapters("llama", "LORA", {"target_modules": ["embed_tokens", "q_proj"]})
    found = weights(save(path_of(artifact, bases("llama")), 0.25, tmp_path / "quarter"))
    for name, tensor in weights(artifact).items():
        expected = 0.25 * tensor if "lora_B" in name or "lora_embedding_B" in name else tensor
        assert torch.equal(found[name], expected), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_a_bf16_base_stays_in_fp32_and_the_bases_own_weights_are_rounded_once(
    bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases("llama-biased")
    arguments: Any = {"bias": "lora_only", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    artifact = train(base, tmp_path / "adapter", "LORA", dtype=torch.bfloat16, **arguments)
    found = weights(save(path_of(artifact, base, torch.bfloat16), 0.3, tmp_path / "third"))
    tuned, own = weights(artifact), base.load(torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    bias = "model.layers.0.self_attn.q_proj.{}bias"
    for name, start, dtype in (
        ("base_model.model.lm_head.weight", own["lm_head.weight"], torch.float32),
        ("base_model.model." + bias.format("base_layer."), own[bias.format("")], torch.bfloat16),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", torch.zeros(32, 8), torch.float32),
    ):
        (expected,) = on_the_line({name: start}, {name: tuned[name]}, 0.3).values()
        require_same_bits({name: found[name]}, {name: expected.to(dtype)})


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_a_saved_folder_says_what_it_is_and_keeps_the_artifacts_text_files(
    peft_type: str | None, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases("llama")
    artifact = train(base, tmp_path / "trained", peft_type)
    path = path_of(artifact, base)
    (artifact / "README.md").write_text("scores of another model")
    path.save(0.3, tmp_path / "third", facts={"key": "of the path"})
    manifest = json.loads((tmp_path / "third" / "manifest.json").read_text())
    source = json.loads((artifact / "manifest.json").read_text())
    expected = {"alpha": 0.3, "source_sha256": file_sha256(artifact / "manifest.json"), "key": "of the path"}
    own = {"files", "content_sha256"}
    assert {name: value for name, value in manifest.items() if name not in own} == {
        **{name: value for name, value in source.items() if name not in own},
        **expected,
    }
    assert manifest["files"].keys() == source["files"].keys()
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (artifact / name).read_bytes()
    assert verify_folder(tmp_path / "third") is not None
    path.save(0.3, tmp_path / "no key", facts={})
    assert "key" not in json.loads((tmp_path / "no key" / "manifest.json").read_text())


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_a_path_changes_neither_its_ends_on_the_disk_nor_the_random_state(
    peft_type: str | None, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases("llama")
    arguments: Any = {"modules_to_save": ["lm_head"]} if peft_type else {}
    artifact = train(base, tmp_path / "trained", peft_type, **arguments)
    before = file_sha256(base.folder / "model.safetensors")
    torch.manual_seed(11)
    drawn = torch.rand(3)
    torch.manual_seed(11)
    path = path_of(artifact, base)
    for alpha in (0.5, 0.0, 0.7):
        path.set_(alpha)
    assert torch.equal(torch.rand(3), drawn)
    assert file_sha256(base.folder / "model.safetensors") == before
    assert verify_folder(artifact) is not None


PROMPTS = [
    ("PROMPT_TUNING", "PROMPT_TUNING adds inputs, and no value of them gives the base model"),
    ("PREFIX_TUNING", "PREFIX_TUNING adds inputs, and no value of them gives the base model"),
]
ONE_END = [
    *[(name, {"num_virtual_tokens": 4}, reason) for name, reason in PROMPTS],
    (
        "LORA",
        {"init_lora_weights": "pissa", "r": 4},
        r"its start \(init_lora_weights: pissa\) moves a part of the base model's weights into the adapter",
    ),
    (
        "LORA",
        {"init_lora_weights": "olora", "r": 4},
        r"its start \(init_lora_weights: olora\) moves a part of the base .*",
    ),
    (
        "LORA",
        {"layer_replication": [[0, 2], [0, 2]]},
        r"its replicated layers \(layer_replication\) are not in the base model",
    ),
    ("HRA", {"r": 2, **LINEAR}, "keeptune knows no way from the base model that HRA could go"),
]


@pytest.mark.parametrize(("peft_type", "arguments", "reason"), ONE_END)
def test_a_method_without_a_path_has_its_tuned_end_only(
    peft_type: str, arguments: dict[str, Any], reason: str, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases("llama")
    artifact = train(base, tmp_path / "adapter", peft_type, **arguments)
    path = path_of(artifact, base)
    tuned = logits(path.model)
    assert path.no_path == why_no_path(peft_type, arguments)
    for alpha in (0.0, 0.5):
        with pytest.raises(
            RecipeError, match=rf"adapter: found alpha {alpha}; expected 1, because {reason}\. Leave out"
        ):
            path.set_(alpha)
    save(path, 1.0, tmp_path / "at 1")
    assert torch.equal(logits(path.model), tuned)
    require_same_bits(weights(tmp_path / "at 1"), weights(artifact))


@pytest.mark.parametrize(
    ("peft_type", "arguments"),
    [(None, {}), ("LORA", {}), ("LORA", {"init_lora_weights": "gaussian", "use_dora": True}), ("IA3", {})],
)
def test_a_method_with_a_path_has_no_reason_against_it(peft_type: str | None, arguments: dict[str, Any]) -> None:
    assert why_no_path(peft_type, arguments) is None


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_beyond_the_ends_is_refused(
    alpha: float, bases: Callable[[str], Base], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    path = path_of(adapters("llama", "LORA", {}), bases("llama"))
    with pytest.raises(RecipeError, match=rf"alpha: found {alpha}; expected a number from 0 \(base\) to 1 \(tuned\)"):
        path.save(alpha, tmp_path / "saved", facts={})
    assert not (tmp_path / "saved").exists()


def test_a_head_or_rows_that_one_end_lacks_are_refused(bases: Callable[[str], Base], tmp_path: Path) -> None:
    tuned = train(bases("llama-tied"), tmp_path / "tied", None)
    with pytest.raises(
        RecipeError,
        match=r"found nothing of the weight 'lm_head\.weight' and shape \(\d+, 32\) in .*llama; expected the same",
    ):
        path_of(tuned, bases("llama"))
    tuned = train(bases("llama"), tmp_path / "untied", None)
    with pytest.raises(
        RecipeError, match=r"untied: found shape \(\d+, 32\) of the weight 'lm_head\.weight' and nothing"
    ):
        path_of(tuned, bases("llama-tied"))
    longer = make_base(tmp_path / "longer", CONFIGS["llama-tied"], vocab_size=bases("llama").tokenizer.vocab_size + 3)
    with pytest.raises(
        RecipeError, match=r"found shape \((\d+), 32\) of the weight 'model.embed_tokens.weight' and shape"
    ):
        path_of(train(longer, tmp_path / "rows", None), bases("llama-tied"))


def write_manifest(folder: Path) -> None:
    """Write the manifest that a folder would have if its files had been written as they are."""
    facts = read_record(folder / "manifest.json")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in facts["files"]
    }
    write_record(folder / "manifest.json", {**facts, "files": files})


def test_a_tensor_that_the_methods_table_does_not_know_is_refused(
    bases: Callable[[str], Base], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters("llama", "LORA", {}), tmp_path / "adapter")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    save_file({**weights(folder), name: torch.zeros(2)}, folder / "adapter_model.safetensors")
    write_manifest(folder)
    with pytest.raises(RecipeError, match=rf"found '{name}', whose value at the base model is unknown; expected only"):
        path_of(folder, bases("llama"))


def test_an_adapter_that_would_load_more_than_weights_is_refused(
    bases: Callable[[str], Base], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters("llama", "LORA", {"modules_to_save": ["lm_head"]}), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "megatron_config": {"a": 1}}))
    write_manifest(folder)
    with pytest.raises(RecipeError, match="found megatron_config"):
        path_of(folder, bases("llama"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json", "manifest.json: no such file or folder; expected a place to read"),
        ("adapter_model.safetensors", "adapter_model.safetensors: found a file that differs from what manifest.json"),
    ],
)
def test_an_artifact_that_is_not_whole_is_refused(
    file: str, message: str, bases: Callable[[str], Base], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters("llama", "LORA", {}), tmp_path / "adapter")
    (folder / file).unlink()
    with pytest.raises(StorageError, match=message):
        path_of(folder, bases("llama"))
