"""Loading: every weight accounted for, the right class, and refusals in the design's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from keeptune.errors import RecipeError
from keeptune.model.load import convert_tokenizer, empty_model, load_model, load_tokenizer
from tests.model.tiny import CONFIGS, T5, make_model

CPU = torch.device("cpu")
SHARED = Path(__file__).resolve().parents[3] / "shared"


def saved(path: Path, name: str = "llama") -> Path:
    make_model(T5 if name == "t5" else CONFIGS[name]).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5"])
def test_a_saved_model_loads_with_all_its_weights(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, name)
    capfd.readouterr()
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    original = make_model(T5 if name == "t5" else CONFIGS[name]).state_dict()
    assert not model.training
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5"])
def test_an_empty_model_has_the_names_and_shapes_of_the_loaded_one_and_reads_no_weight(
    tmp_path: Path, name: str
) -> None:
    loaded = load_model(saved(tmp_path, name), device=CPU, dtype=torch.float32)
    (tmp_path / "model.safetensors").unlink()
    empty = empty_model(tmp_path)
    shapes = {key: parameter.shape for key, parameter in loaded.named_parameters()}
    assert {key: parameter.shape for key, parameter in empty.named_parameters()} == shapes
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_a_class_without_sdpa_gets_its_own_attention(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, "gemma2"), device=CPU, dtype=torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16


def test_missing_left_over_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, path, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"found missing weights, the first is 'model.norm.weight'"):
        load_model(tmp_path, device=CPU, dtype=torch.float32)
    save_file({**weights, "model.extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"found left-over weights, the first is 'model.extra'"):
        load_model(tmp_path, device=CPU, dtype=torch.float32)
    save_file({**weights, "model.norm.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(
        RecipeError,
        match=r"found misshapen weights, the first is 'model.norm.weight of \(3,\) where the configuration says",
    ):
        load_model(tmp_path, device=CPU, dtype=torch.float32)


def test_buffers_that_are_computed_may_be_left_over(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**load_file(path), **buffers}, path, metadata={"format": "pt"})
    load_model(tmp_path, device=CPU, dtype=torch.float32)


def test_t5_is_refused_in_fp16(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found fp16 for a t5 model; expected bf16 or fp32"):
        load_model(saved(tmp_path, "t5"), device=CPU, dtype=torch.float16)


@pytest.mark.parametrize("config", [{"model_type": "unheard-of"}, {"model_type": "vit"}])
def test_what_is_no_language_model_is_refused(tmp_path: Path, config: dict[str, str]) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot load as a language model"):
        load_model(tmp_path, device=CPU, dtype=torch.float32)
    with pytest.raises(RecipeError, match="cannot load as a language model"):
        empty_model(tmp_path)


def test_a_tokenizer_is_written_in_the_fast_format(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "in")
    convert_tokenizer(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_tokenizer_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("b")["input_ids"] == [1]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found no tokenizer that can be converted"):
        load_tokenizer(saved(tmp_path / "model"))
    with pytest.raises(RecipeError, match="found no tokenizer that can be converted"):
        convert_tokenizer(saved(tmp_path), tmp_path / "out")


@pytest.mark.real
def test_the_real_model_reads_english() -> None:
    path = SHARED / "models" / "english-3m"
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    model = load_model(path, device=CPU, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("The little dog ran to the").ids])
    assert model(input_ids=ids, labels=ids).loss.item() < 6.0
