"""The law "Artifact": adapter by peft alone, merged model by transformers alone: same logits and same prompt."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from keeptune.data.record import Message
from keeptune.errors import RecipeError, StorageError
from keeptune.model.artifact import load_artifact, stop_token_ids, verify_artifact
from keeptune.model.attention import base_of
from keeptune.model.card import CardScore, ModelCard, card_from_json, card_to_json, write_model_card
from keeptune.model.merge import merge_adapter
from keeptune.model.methods import Method, apply_method
from keeptune.storage import verify_folder
from keeptune.text.template import make_template
from keeptune.text.tokenizer import Tokenizer
from tests.model.bases import Base, logits, make_base, save
from tests.model.tiny import trained_state
from tests.tiny import chatml_tokenizer

pytestmark = pytest.mark.filterwarnings(r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    made: dict[str, Base] = {}

    def base(kind: str, **settings: Any) -> Base:
        key = f"{kind}{json.dumps(settings)}"
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp("base") / kind, kind, **settings)
        return made[key]

    return base


def trained(base: Base, peft_type: str | None, *, dtype: torch.dtype = torch.float32, **arguments: Any) -> nn.Module:
    """Return an adapted model whose trained weights have all moved."""
    method = Method(name="mine", peft_type=peft_type, learning_rate=1e-3, arguments=arguments)
    model = apply_method(base.load(dtype), method, seed=0)
    generator = torch.Generator().manual_seed(5)
    for tensor in trained_state(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.train()


LINEAR = {"target_modules": "all-linear"}
ADAPTERS = [
    ("llama", "LORA", {}),
    ("llama", "LORA", {"use_dora": True, "lora_dropout": 0.1}),
    ("llama", "LORA", {"init_lora_weights": "pissa", "r": 4}),
    ("llama", "LORA", {"init_lora_weights": "olora", "r": 4}),
    ("llama", "LORA", {"bias": "all", "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", "LORA", {"modules_to_save": ["lm_head"]}),
    ("llama", "IA3", {}),
    ("llama", "IA3", LINEAR),
    ("llama", "LOHA", {"r": 4, **LINEAR}),
    ("llama", "OFT", {"oft_block_size": 4, **LINEAR}),
    ("llama", "VERA", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    ("llama", "LN_TUNING", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    ("gpt2", "LORA", {}),
    ("gpt2", "IA3", {}),
    ("t5", "LORA", {}),
    ("t5", "IA3", {}),
]
VIRTUAL = [
    ("llama", "PROMPT_TUNING", {"num_virtual_tokens": 4}),
    ("llama", "PREFIX_TUNING", {"num_virtual_tokens": 4}),
    ("t5", "PROMPT_TUNING", {"num_virtual_tokens": 4}),
    ("t5", "PREFIX_TUNING", {"num_virtual_tokens": 4}),
]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize(("kind", "peft_type", "arguments"), ADAPTERS + VIRTUAL)
def test_an_adapter_loaded_by_peft_alone_gives_the_trained_logits(
    kind: str, peft_type: str, arguments: dict[str, Any], bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases(kind)
    model = trained(base, peft_type, **arguments)
    folder = save(model, tmp_path / "adapter", base)
    verify_artifact(model, folder, base=base.folder)
    assert model.training, "the check changed the model's mode"
    alone = PeftModel.from_pretrained(base.load(), str(folder))
    assert torch.equal(logits(alone), logits(model))
    assert not torch.allclose(logits(alone), logits(base.load()), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize(("kind", "peft_type", "arguments"), ADAPTERS)
def test_a_merged_model_loaded_by_transformers_alone_gives_the_trained_logits(
    kind: str, peft_type: str, arguments: dict[str, Any], bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases(kind)
    model = trained(base, peft_type, **arguments)
    merge_adapter(save(model, tmp_path / "adapter", base), base=base.folder, out=tmp_path / "merged")
    alone = replace(base, folder=tmp_path / "merged").load()
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-5)
    assert verify_folder(tmp_path / "merged") is not None
    assert not list((tmp_path / "merged").glob("adapter_*"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("gpt2", {}),
        ("t5", {}),
        ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    ],
)
def test_a_fully_fine_tuned_model_loaded_by_transformers_alone_gives_the_trained_logits(
    kind: str, settings: dict[str, Any], bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases(kind, **settings)
    model = trained(base, None)
    folder = save(model, tmp_path / "model", base)
    verify_artifact(model, folder, base=base.folder)
    assert torch.equal(logits(replace(base, folder=folder).load()), logits(model))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("arguments", "still_tied"),
    [
        ({}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"trainable_token_indices": [3, 5]}, True),
    ],
)
def test_merging_keeps_tied_embeddings_right(
    arguments: dict[str, Any], still_tied: bool, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama", tie_word_embeddings=True)
    model = trained(base, "LORA", **arguments)
    folder = save(model, tmp_path / "adapter", base)
    assert torch.equal(logits(PeftModel.from_pretrained(base.load(), str(folder))), logits(model))
    merge_adapter(folder, base=base.folder, out=tmp_path / "merged")
    alone: Any = replace(base, folder=tmp_path / "merged").load()
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-5)
    assert (alone.lm_head.weight is alone.model.embed_tokens.weight) == still_tied
    assert alone.config.tie_word_embeddings == still_tied


def test_an_adapter_on_embeddings_does_not_carry_the_base_embeddings(
    bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama", tie_word_embeddings=False)
    model = trained(base, "LORA", target_modules=["embed_tokens", "q_proj"])
    weights = load_file(save(model, tmp_path / "adapter", base) / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)


@pytest.mark.parametrize("chosen", [("LORA", {}), ("LORA", {"modules_to_save": ["lm_head"]}), ("IA3", {})])
def test_an_adapter_over_a_bf16_base_reloads_in_fp32(
    chosen: tuple[str, dict[str, Any]], bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    model = trained(base, chosen[0], dtype=torch.bfloat16, **chosen[1])
    folder = save(model, tmp_path / "adapter", base)
    verify_artifact(model, folder, base=base.folder)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    again = load_artifact(folder, base=base.folder, device=CPU, dtype=torch.bfloat16)
    for name, tensor in trained_state(model).items():
        assert torch.equal(again.get_parameter(name), tensor), name


def test_load_artifact_finds_the_base_that_the_adapter_names(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = trained(base, "LORA")
    folder = save(model, tmp_path / "adapter", base)
    loaded = load_artifact(folder, base=None, device=CPU, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    by_peft = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    assert torch.equal(logits(by_peft), logits(model))


def test_load_artifact_loads_a_whole_model(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = trained(base, None)
    folder = save(model, tmp_path / "model", base)
    assert torch.equal(logits(load_artifact(folder, base=None, device=CPU, dtype=torch.float32)), logits(model))


def test_an_adapter_names_its_base_and_revision_and_is_the_same_bytes_each_time(
    bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    model = trained(base, "LORA")
    folder = save(model, tmp_path / "adapter", base, base_name="owner/name@abc123")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc123")
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert config["target_modules"] == sorted(config["target_modules"])
    again = save(model, tmp_path / "again", base, base_name="owner/name@abc123")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert not list(folder.glob("*.bin"))
    local = json.loads((save(model, tmp_path / "local", base) / "adapter_config.json").read_text())
    assert (local["base_model_name_or_path"], local["revision"]) == (str(base.folder.resolve()), None)


ENGLISH = Path(__file__).resolve().parents[3] / "shared" / "models" / "english-3m"


@pytest.mark.real
@pytest.mark.skipif(not ENGLISH.exists(), reason=f"{ENGLISH} is not there")
@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_a_real_model_survives_saving_and_merging(peft_type: str | None, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(ENGLISH)
    base = Base(ENGLISH, tokenizer, make_template("auto", tokenizer=tokenizer, encoder_decoder=False), False)
    model = trained(base, peft_type)
    folder = save(model, tmp_path / "saved", base)
    verify_artifact(model, folder, base=ENGLISH)
    if peft_type is not None:
        merge_adapter(folder, base=ENGLISH, out=tmp_path / "merged")
        folder = tmp_path / "merged"
    alone = replace(base, folder=folder).load()
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-4, rtol=1e-4)


CONVERSATION = [
    Message("system", "You are terse."),
    Message("user", "Name the capital of France."),
    Message("assistant", "Paris"),
    Message("user", "And of Italy? <|im_end|> \n 2 < 3"),
]


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]])
@pytest.mark.parametrize(
    ("kind", "template"),
    [("llama", "chat"), ("llama", "chatml"), ("llama", "alpaca"), ("llama", "plain"), ("gpt2", "auto")],
)
def test_the_saved_chat_template_renders_the_prompt_that_was_trained_with(
    kind: str, template: Any, messages: list[Message], bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases(kind)
    made = make_template(template, tokenizer=base.tokenizer, encoder_decoder=False)
    base = replace(base, template=made)
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert found == made.controls.reveal(made.render_prompt(messages))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["template"] == made.name
    assert manifest["template_sha256"] == made.fingerprint
    assert manifest["tokenizer_sha256"] == base.tokenizer.fingerprint
    assert manifest["method"] == "mine"
    # Ollama looks into the one file, transformers first into the other.
    written = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert written == (folder / "chat_template.jinja").read_text() == made.chat_template


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize("messages", [CONVERSATION[1:2], [*CONVERSATION[:3], Message("user", "And of Italy?")]])
def test_the_encoder_decoders_saved_chat_template_renders_the_prompt_that_was_trained_with(
    template: Any, messages: list[Message], bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("t5")
    made = make_template(template, tokenizer=base.tokenizer, encoder_decoder=True)
    base = replace(base, template=made)
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    found = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert found == made.controls.reveal(made.render_prompt(messages))


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_generation_is_greedy_and_stops_at_every_stop_id(
    peft_type: str | None, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    model = trained(base, peft_type)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = GenerationConfig(temperature=0.2, eos_token_id=[7, 9])
    inner.generation_config = own
    folder = save(model, tmp_path / "saved", base)
    assert inner.generation_config is own
    expected = sorted({7, 9, base.tokenizer.eos_id})
    assert stop_token_ids(model, tokenizer=base.tokenizer, template=base.template) == tuple(expected)
    saved = GenerationConfig.from_pretrained(folder)
    assert (saved.do_sample, saved.temperature) == (False, None)
    assert saved.eos_token_id == expected
    assert saved.pad_token_id == base.tokenizer.pad_id
    # vLLM takes it for the limit of every answer of a server.
    assert "max_new_tokens" not in (folder / "generation_config.json").read_text(encoding="utf-8")
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["max_new_tokens"] == 17


def test_an_end_token_that_is_not_the_tokenizers_own_stops_generation(
    bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    folder = chatml_tokenizer(tmp_path / "base", chat_template=None, eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(folder)
    template = make_template("chatml", tokenizer=tokenizer, encoder_decoder=False)
    base = replace(base, folder=folder, tokenizer=tokenizer, template=template)
    model: Any = trained(bases("llama"), None)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_id)
    expected = (tokenizer.special_tokens["<|endoftext|>"], tokenizer.special_tokens["<|im_end|>"])
    assert stop_token_ids(model, tokenizer=tokenizer, template=template) == expected == (0, 2)
    saved = save(model, tmp_path / "saved", base)
    assert GenerationConfig.from_pretrained(saved).eos_token_id == [0, 2]
    assert AutoTokenizer.from_pretrained(saved).chat_template == template.chat_template


def test_an_encoder_decoders_generation_starts_where_the_base_starts(
    bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("t5")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    assert GenerationConfig.from_pretrained(folder).decoder_start_token_id == base.tokenizer.pad_id == 0


def test_no_pickle_and_every_file_hashed(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    folder = save(trained(base, None), tmp_path / "model", base)
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == expected | {"generation_config.json", "manifest.json"}
    assert verify_folder(folder) is not None


def test_an_adapter_that_learned_nothing_is_told(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = apply_method(base.load(), Method("mine", "LORA", 1e-3, {}), seed=0)
    folder = save(model, tmp_path / "adapter", base)
    with pytest.raises(RecipeError, match=r"adapter: found an adapter that gives the base model's logits; expected"):
        verify_artifact(model, folder, base=base.folder)


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_weights_that_are_not_the_trained_ones_are_told(
    peft_type: str | None, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    model = trained(base, peft_type)
    folder = save(model, tmp_path / "saved", base)
    next(iter(trained_state(model).values())).add_(0.5)
    with pytest.raises(StorageError, match=r"saved: found logits that differ by .* expected at most"):
        verify_artifact(model, folder, base=base.folder)


def test_a_non_finite_difference_is_told(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = trained(base, "LORA")
    folder = save(model, tmp_path / "saved", base)
    for tensor in trained_state(model).values():
        tensor.fill_(math.nan)
    with pytest.raises(StorageError, match="found logits that differ by nan"):
        verify_artifact(model, folder, base=base.folder)


def as_foreign(folder: Path) -> None:
    """Leave an adapter as another tool would have written it: without a manifest that says what it holds."""
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "no file", "broken", "index"])
def test_an_adapter_with_other_weights_than_its_config_is_refused(
    fault: str, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    if fault == "index":
        (folder / "adapter_model.safetensors.index.json").write_text("{}", encoding="utf-8")
    if fault == "missing":
        del weights[first]
    elif fault == "unexpected":
        weights["base_model.model.model.extra.lora_A.weight"] = torch.zeros(2, 2)
    elif fault == "shape":
        weights[first] = torch.zeros(3, 3)
    path.unlink()
    as_foreign(folder)
    if fault == "broken":
        path.write_bytes(b"no safetensors")
    elif fault != "no file":
        save_file(weights, path, metadata={"format": "pt"})
    expected = {
        "index": "found adapter_model.safetensors.index.json",
        "no file": "found no adapter_model.safetensors",
        "broken": "weights cannot be written or read",
    }
    with pytest.raises(StorageError, match=expected.get(fault, "expected exactly the weights that")):
        load_artifact(folder, base=base.folder, device=CPU, dtype=torch.float32)


def test_a_device_that_fails_while_an_adapter_is_read_is_not_told_as_damaged_weights(
    bases: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("llama")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)

    def fails(*given: Any, **named: Any) -> Any:
        raise RuntimeError("Need to provide pin_memory allocator to use pin memory.")

    monkeypatch.setattr(PeftModel, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="pin_memory allocator"):
        load_artifact(folder, base=base.folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "found megatron_config"),
        ({"peft_type": "XLORA"}, "found peft_type 'XLORA'"),
        ({"peft_type": "NEW"}, "found peft_type 'NEW'; expected a method that keeptune trains"),
        ({"alpha_pattern": {"(.+)+[": 4}}, "alpha_pattern: found the pattern"),
    ],
)
def test_a_foreign_adapter_that_would_load_more_than_weights_is_refused(
    change: dict[str, Any], message: str, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    as_foreign(folder)
    with pytest.raises(RecipeError, match=message):
        load_artifact(folder, base=base.folder, device=CPU, dtype=torch.float32)


def test_merging_into_a_quantised_base_is_refused(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    quantised = tmp_path / "quantised"
    base.load().save_pretrained(quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    weights = load_file(quantised / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(8, 1, dtype=torch.uint8)
    save_file(weights, quantised / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"quantised: found quantised weights; expected a base model in fp32 or bf16"):
        merge_adapter(folder, base=quantised, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_over_a_model_that_is_stored_quantised_merges_into_no_other(
    bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    model = trained(base, "LORA")
    base_of(model).config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = save(model, tmp_path / "adapter", base)
    with pytest.raises(RecipeError, match=r"adapter: found an adapter that was trained and scored over quantised weig"):
        merge_adapter(folder, base=base.folder, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape.*lora_B.bias")
@pytest.mark.parametrize(
    ("peft_type", "arguments", "reason"),
    [
        ("PROMPT_TUNING", {"num_virtual_tokens": 4}, "it adds inputs, not weights"),
        ("LORA", {"layer_replication": [[0, 2], [0, 2]]}, "its replicated layers share weights"),
        ("LORA", {"lora_bias": True}, "the base layer has no bias"),
    ],
)
def test_merging_what_cannot_be_folded_is_refused(
    peft_type: str, arguments: dict[str, Any], reason: str, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama")
    folder = save(trained(base, peft_type, **arguments), tmp_path / "adapter", base)
    with pytest.raises(RecipeError, match=f"found an adapter of {peft_type}, which PEFT cannot fold .*{reason}"):
        merge_adapter(folder, base=base.folder, out=tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merging_a_whole_model_or_into_a_full_folder_is_refused(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    with pytest.raises(RecipeError, match=r"found no adapter_config\.json; expected an adapter folder"):
        merge_adapter(base.folder, base=base.folder, out=tmp_path / "merged")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(StorageError, match="found a file or a folder that is not empty; expected a new folder"):
        merge_adapter(folder, base=base.folder, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


def test_merging_can_round_to_bf16(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = trained(base, "LORA")
    folder = save(model, tmp_path / "adapter", base)
    merge_adapter(folder, base=base.folder, out=tmp_path / "merged", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_merged_model_keeps_template_and_generation(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    folder = save(trained(base, "LORA"), tmp_path / "adapter", base)
    merge_adapter(folder, base=base.folder, out=tmp_path / "merged")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert manifest["template_sha256"] == base.template.fingerprint
    assert manifest["merged"] is True


def card(**changes: Any) -> ModelCard:
    made = ModelCard(
        name="alpaca lora",
        base_name="owner/name@abc",
        peft_type="LORA",
        encoder_decoder=False,
        template="alpaca",
        prompt=({"role": "user", "content": 'Say it\'s "red".', "input": "a\nb"},),
        max_new_tokens=64,
        trained_parameters=1_000,
        total_parameters=40_000,
        scores=(
            CardScore("alpaca", "rougeL", 0.5, 0.48, 0.52, 90, 0.25),
            CardScore("alpaca", "exact_match", 0.125, None, None, 90, None),
            CardScore("alpaca", "perplexity", 8.0, 4.0, 16.0, 90, 32.0),
        ),
        recipe="model: owner/name@abc\nnote: '```'\n",
        limits=("Answers may be wrong <script>.",),
        versions={"keeptune": "0.1", "torch": "2.13.0"},
        forgotten=("ROUGE-L on boolq dropped by 0.200.", "On text that the base wrote, the loss is 1.9 nats higher."),
    )
    return replace(made, **changes)


def front_matter(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_states_base_library_and_scores(tmp_path: Path) -> None:
    write_model_card(tmp_path, card=card())
    front = front_matter(tmp_path)
    assert front["base_model"] == "owner/name"
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-generation")
    assert front["base_model_relation"] == "adapter"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "alpaca"
    assert result["metrics"] == [
        {"type": "rougeL", "name": "rougeL", "value": 0.5},
        {"type": "exact_match", "name": "exact_match", "value": 0.125},
        {"type": "perplexity", "name": "perplexity", "value": 8.0},
    ]
    text = (tmp_path / "README.md").read_text()
    assert "| alpaca | rougeL | 0.5000 (0.4800 to 0.5200) | 0.2500 | 90 |" in text
    assert "| alpaca | exact_match | 0.1250 | – | 90 |" in text
    assert "| alpaca | perplexity | 8.0000 (4.0000 to 16.0000) | 32.0000 | 90 |" in text
    assert "in brackets the 95 % interval" in text
    (messages,) = re.findall(r"^messages = (.*)$", text, re.MULTILINE)
    assert ast.literal_eval(messages) == [dict(message) for message in card().prompt]
    assert card_from_json(json.loads(json.dumps(card_to_json(card())))) == card()
    assert "1,000 of 40,000 parameters trained (2.50 %)" in text
    assert "AutoPeftModelForCausalLM" in text
    assert "````yaml\nmodel: owner/name@abc\nnote: '```'\n````" in text
    assert "<script>" not in text.replace(r"\<script\>", "")


@pytest.mark.parametrize(
    ("changes", "merged", "library", "relation", "loader"),
    [
        ({}, True, "transformers", "finetune", "AutoModelForCausalLM"),
        ({"peft_type": None}, False, "transformers", "finetune", "AutoModelForCausalLM"),
        ({"encoder_decoder": True}, False, "peft", "adapter", "AutoPeftModelForSeq2SeqLM"),
        ({"scores": (), "limits": ()}, False, "peft", "adapter", "AutoPeftModelForCausalLM"),
    ],
)
def test_the_card_fits_its_folder(
    changes: dict[str, Any], merged: bool, library: str, relation: str, loader: str, tmp_path: Path
) -> None:
    write_model_card(tmp_path, card=card(**changes), merged=merged)
    front = front_matter(tmp_path)
    assert (front["library_name"], front["base_model_relation"]) == (library, relation)
    text = (tmp_path / "README.md").read_text()
    assert loader in text
    assert ("model-index" in front) == bool(changes.get("scores", True))
    assert ("## Limits" in text) == bool(changes.get("limits", True))


def test_the_card_of_an_adapter_over_quantised_weights_reads_them_so(tmp_path: Path) -> None:
    write_model_card(tmp_path, card=card(quantization="8bit"))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig\n" in text
    assert "bits = BitsAndBytesConfig(load_in_8bit=True)\n" in text
    assert "AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=bits)\n" in text
    assert card_from_json(json.loads(json.dumps(card_to_json(card(quantization="8bit"))))).quantization == "8bit"


def test_the_card_shows_tasks_that_were_not_trained_on_in_a_table_of_their_own(tmp_path: Path) -> None:
    one = CardScore("boolq", "rougeL", 0.5, 0.48, 0.52, 90, 0.25, trained=False)
    write_model_card(tmp_path, card=card(scores=(*card().scores, one)))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    trained, others = text.split("On tasks that it was not trained on:\n\n| task | metric |")
    assert "| boolq |" not in trained and "| alpaca | rougeL | 0.5000" in trained
    assert "| boolq | rougeL | 0.5000 (0.4800 to 0.5200) | 0.2500 | 90 |" in others and "| alpaca |" not in others
    write_model_card(tmp_path, card=card())
    assert "not trained on" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_merged_model_is_not_what_its_adapters_certificate_speaks_of(tmp_path: Path) -> None:
    one = replace(card(), peft_type="LORA", certificate=("It keeps every budget.",), limits=("Mind the gap.",))
    texts = {}
    for merged in (False, True):
        (folder := tmp_path / str(merged)).mkdir()
        write_model_card(folder, card=one, merged=merged)
        texts[merged] = (folder / "README.md").read_text(encoding="utf-8")
    assert "- It keeps every budget.\n- Mind the gap." in texts[False]
    assert "It keeps every budget" not in texts[True]
    assert "is certified; this model is not." in texts[True] and "- Mind the gap." in texts[True]


def test_the_card_says_what_was_forgotten_and_what_few_shot_reached(tmp_path: Path) -> None:
    write_model_card(tmp_path, card=card())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## What it forgot\n\n- ROUGE-L on boolq dropped by 0.200.\n- On text that the base wrote, the loss" in text
    assert "few-shot" not in text
    scores = (replace(card().scores[0], few_shot="0.2400 (4 shots)"), *card().scores[1:])
    write_model_card(tmp_path, card=card(scores=scores, forgotten=()))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| task | metric | this model | base model | base model, few-shot | records |\n" in text
    assert "| alpaca | rougeL | 0.5000 (0.4800 to 0.5200) | 0.2500 | 0.2400 (4 shots) | 90 |" in text
    assert "| alpaca | exact_match | 0.1250 | – | – | 90 |" in text
    assert "What it forgot" not in text
    assert card_from_json(json.loads(json.dumps(card_to_json(card(scores=scores))))) == card(scores=scores)
    # A card of an earlier version has neither.
    old = {name: value for name, value in card_to_json(card()).items() if name != "forgotten"}
    assert card_from_json(old).forgotten == ()
