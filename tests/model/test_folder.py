"""What is known of a model before a weight is read: names, completeness, and no code but ours."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keeptune.errors import RecipeError
from keeptune.model import folder as folder_module
from keeptune.model.folder import adapter_base, check_model_folder, resolve_model

CONFIG = {"model_type": "llama", "vocab_size": 11, "max_position_embeddings": 64}
SHARED = Path(__file__).resolve().parents[3] / "shared"


def safetensors(num_floats: int = 3) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [num_floats], "data_offsets": [0, 4 * num_floats]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * num_floats)


def model_folder(path: Path, *, weights: bytes | None = None, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    (path / "model.safetensors").write_bytes(safetensors() if weights is None else weights)
    return path


def test_the_facts_of_a_folder(tmp_path: Path) -> None:
    facts = check_model_folder(model_folder(tmp_path / "m"))
    assert (facts.model_type, facts.vocab_size, facts.max_positions) == ("llama", 11, 64)
    assert not facts.encoder_decoder
    assert not facts.quantised
    assert facts.weight_bytes == len(safetensors())


def test_t5_is_an_encoder_decoder_without_a_limit_of_positions(tmp_path: Path) -> None:
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    facts = check_model_folder(model_folder(tmp_path / "m", model_type="t5", n_positions=512, **start))
    assert facts.encoder_decoder
    other = model_folder(tmp_path / "n", model_type="x", is_encoder_decoder=True, **start)
    assert check_model_folder(other).encoder_decoder
    t5 = model_folder(tmp_path / "t5", model_type="t5", n_positions=512)
    (t5 / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 5, "n_positions": 512, **start}))
    assert check_model_folder(t5).max_positions is None


@pytest.mark.parametrize(("kind", "start"), [("mbart", None), ("t5", None), ("bart", 2)])
def test_an_encoder_decoder_that_names_no_start_token_is_refused(tmp_path: Path, kind: str, start: int | None) -> None:
    path = model_folder(tmp_path / "m", model_type=kind, is_encoder_decoder=True)
    if start is None:
        with pytest.raises(RecipeError, match=r"config.json: found an encoder-decoder model without decoder_start_tok"):
            check_model_folder(path)
        # generation_config.json may name it too.
        (path / "generation_config.json").write_text('{"decoder_start_token_id": 4}', encoding="utf-8")
    # BART's configuration class has a default.
    assert check_model_folder(path).encoder_decoder


def test_a_quantised_model_and_a_nested_text_configuration_are_seen(tmp_path: Path) -> None:
    text = {"vocab_size": 7, "n_positions": 9}
    path = tmp_path / "m"
    model_folder(path)
    nested = {"model_type": "gemma3", "text_config": text}
    (path / "config.json").write_text(json.dumps(nested), encoding="utf-8")
    facts = check_model_folder(path)
    assert (facts.vocab_size, facts.max_positions, facts.quantised) == (7, 9, False)
    stored = {**nested, "quantization_config": {"load_in_4bit": False, "load_in_8bit": True}}
    (path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    assert check_model_folder(path).quantised == "8bit"


@pytest.mark.parametrize(
    ("config", "vocab_size", "max_positions"),
    [
        # T5Gemma 2: the decoder says it, and the encoder's text part.
        (
            {
                "model_type": "t5gemma2",
                "is_encoder_decoder": True,
                "decoder_start_token_id": 2,
                "encoder": {"text_config": {"vocab_size": 30, "max_position_embeddings": 40}, "vision_config": {}},
                "decoder": {"vocab_size": 30, "max_position_embeddings": 40},
            },
            30,
            40,
        ),
        # FSMT: one vocabulary a side.
        (
            {
                "model_type": "fsmt",
                "is_encoder_decoder": True,
                "decoder_start_token_id": 2,
                **{"src_vocab_size": 9, "tgt_vocab_size": 8, "max_position_embeddings": 40},
            },
            8,
            40,
        ),
        # Gemma 3 leaves out what its configuration class has as a default.
        ({"model_type": "gemma3", "text_config": {"hidden_size": 64}}, 262_208, 131_072),
    ],
)
def test_sizes_are_found_wherever_a_configuration_has_them(
    tmp_path: Path, config: dict[str, Any], vocab_size: int, max_positions: int
) -> None:
    path = model_folder(tmp_path / "m")
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = check_model_folder(path)
    assert (facts.vocab_size, facts.max_positions) == (vocab_size, max_positions)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "compressed-tensors", "hqq", "torchao", "fp8", "mxfp4", "aqlm", "quanto", "nobody-knows"]
)
def test_weights_that_another_library_has_quantised_are_refused_with_the_way_out(tmp_path: Path, method: str) -> None:
    path = model_folder(tmp_path / "m", quantization_config={"quant_method": method})
    remedy = r"python -c .*dequantize=True" if method == "fp8" else "Name the model that it was made from"
    with pytest.raises(RecipeError, match=f"stored quantised by '{method}', which .*; expected unquantised.*{remedy}"):
        check_model_folder(path)
    inner = model_folder(tmp_path / "n", text_config={"vocab_size": 3, "quantization_config": {"quant_method": method}})
    with pytest.raises(RecipeError, match=f"stored quantised by '{method}'"):
        check_model_folder(inner)


def test_a_value_that_transformers_refuses_in_a_configuration_is_a_recipe_error(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m", model_type="llama", vocab_size="x")
    with pytest.raises(RecipeError, match="m: found "):
        check_model_folder(path)


@pytest.mark.parametrize("stored", [{"quant_algo": "FP8"}, {"quant_method": "bitsandbytes"}, "int8"])
def test_a_way_of_quantising_that_nothing_names_is_not_called_bitsandbytes(tmp_path: Path, stored: Any) -> None:
    path = model_folder(tmp_path / "m", quantization_config=stored)
    with pytest.raises(RecipeError, match="stored quantised in a way that quantization_config does not name"):
        check_model_folder(path)


def test_the_hash_follows_configuration_and_weights(tmp_path: Path) -> None:
    one = check_model_folder(model_folder(tmp_path / "a")).sha256
    assert check_model_folder(model_folder(tmp_path / "b")).sha256 == one
    assert check_model_folder(model_folder(tmp_path / "c", hidden_size=4)).sha256 != one
    assert check_model_folder(model_folder(tmp_path / "d", weights=safetensors(4))).sha256 != one


def write_index(path: Path, **weight_map: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_sharded_weights_are_counted_together(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m")
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    (path / "model-2.safetensors").write_bytes(safetensors(5))
    write_index(path, a="model-1.safetensors", b="model-2.safetensors")
    assert check_model_folder(path).weight_bytes == len(safetensors(3)) + len(safetensors(5))
    (path / "model-2.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"found no 'model-2.safetensors' \(1 of 2 weight files are missing\)"):
        check_model_folder(path)
    (path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match="broken index"):
        check_model_folder(path)


def test_weights_in_one_file_and_in_those_of_an_index_are_refused(tmp_path: Path) -> None:
    # transformers reads model.safetensors, whatever the index says.
    path = model_folder(tmp_path / "m")
    one = check_model_folder(path).sha256
    (path / "w.safetensors").write_bytes(safetensors(5))
    assert check_model_folder(path).sha256 == one
    write_index(path, a="w.safetensors")
    with pytest.raises(RecipeError, match=r"found model.safetensors and an index that names other files.*'w.safetens"):
        check_model_folder(path)
    write_index(path, a="model.safetensors", b="w.safetensors")
    with pytest.raises(RecipeError, match="Remove model.safetensors, or model.safetensors.index.json"):
        check_model_folder(path)
    write_index(path, a="model.safetensors")
    assert check_model_folder(path).sha256 == one


@pytest.mark.parametrize(
    "name",
    [
        "../other/w.safetensors",
        "sub/w.safetensors",
        "..\\w.safetensors",
        "/w.safetensors",
        "w.bin",
        "w.safetensors\0",
        3,
    ],
)
def test_an_index_that_names_no_plain_safetensors_file_of_its_folder_is_refused(tmp_path: Path, name: Any) -> None:
    path = model_folder(tmp_path / "m")
    for place in (tmp_path / "other", path / "sub", path):
        place.mkdir(exist_ok=True)
        (place / "w.safetensors").write_bytes(safetensors())
    (path / "model.safetensors").unlink()
    write_index(path, a=name)
    with pytest.raises(RecipeError, match="expected the name of a safetensors file in the same folder"):
        check_model_folder(path)


@pytest.mark.parametrize("index", ["{}", "[]", "{", '{"weight_map": {"a": "w.safetensors"}}', '{"weight_map": {}}'])
def test_an_index_that_transformers_cannot_read_is_refused(tmp_path: Path, index: str) -> None:
    path = model_folder(tmp_path / "m")
    (path / "w.safetensors").write_bytes(safetensors())
    (path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(RecipeError, match="broken index; expected a weight_map and its metadata"):
        check_model_folder(path)


def test_what_would_make_transformers_read_other_weights_is_refused(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "named", transformers_weights="other.safetensors")
    with pytest.raises(RecipeError, match=r"found transformers_weights, which names 'other.safetensors'"):
        check_model_folder(path)
    path = model_folder(tmp_path / "both")
    (path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"found adapter_config.json beside config.json"):
        check_model_folder(path)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m")
    one = check_model_folder(path).sha256
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert check_model_folder(path).sha256 == one


def test_the_hash_of_a_linked_file_is_that_of_what_it_leads_to(tmp_path: Path) -> None:
    # The hub's cache is made of such links.
    path = model_folder(tmp_path / "m")
    one = check_model_folder(path).sha256
    blob = tmp_path / "blob"
    (path / "model.safetensors").rename(blob)
    (path / "model.safetensors").symlink_to(blob)
    assert check_model_folder(path).sha256 == one
    blob.write_bytes(safetensors(4))
    assert check_model_folder(path).sha256 != one
    blob.unlink()
    with pytest.raises(RecipeError, match="found no weights"):
        check_model_folder(path)


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"auto_map": {"AutoModel": "m.M"}, "model_type": "someones"}, "auto_map"),
        ({"text_config": {"auto_map": {"AutoModel": "m.M"}, "vocab_size": 3}}, "text_config.auto_map"),
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"text_config": {"trust_remote_code": True, "vocab_size": 3}}, "text_config.trust_remote_code"),
        ({"parts": [{"custom_pipelines": {}}]}, "parts.0.custom_pipelines"),
    ],
)
def test_a_configuration_that_asks_for_code_is_refused(tmp_path: Path, extra: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=f"found '{key}', which asks for code"):
        check_model_folder(model_folder(tmp_path / "m", **extra))


def test_code_that_transformers_does_not_need_is_left_alone(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (path / "modeling_own.py").write_text("raise SystemExit", encoding="utf-8")
    assert check_model_folder(path).ignored_code
    assert not check_model_folder(model_folder(tmp_path / "n")).ignored_code


@pytest.mark.parametrize("depth", [10**7, float("inf"), -1])
def test_more_layers_than_the_weights_can_hold_are_refused_before_any_is_built(tmp_path: Path, depth: float) -> None:
    configs: list[dict[str, Any]] = [
        {"num_hidden_layers": depth},
        {"text_config": {"vocab_size": 3, "n_layer": depth}},
    ]
    for config in configs:
        with pytest.raises(RecipeError, match=r"(num_hidden_layers|n_layer): .*, and weight files of 1 tensors in all"):
            check_model_folder(model_folder(tmp_path / "m", **config))


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
def test_quantised_matrices_that_no_configuration_explains_are_refused(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [3, 4], "data_offsets": [0, 12]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(12)
    with pytest.raises(RecipeError, match=rf"found weights stored as {dtype}, the first is 'a\.weight', and a config"):
        check_model_folder(model_folder(tmp_path / "m", weights=weights))
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert check_model_folder(model_folder(tmp_path / "n", weights=weights, quantization_config=stored)).quantised


def test_a_mask_that_is_stored_as_integers_is_no_weight(tmp_path: Path) -> None:
    header = json.dumps({"h.0.attn.bias": {"dtype": "U8", "shape": [3, 4], "data_offsets": [0, 12]}}).encode()
    assert check_model_folder(model_folder(tmp_path / "m", weights=struct.pack("<Q", len(header)) + header + bytes(12)))


def test_weights_that_are_not_quantised_as_the_configuration_says_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(12)
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(RecipeError, match=r"in 8bit, and weight files that are not .* and set quantization=8bit\."):
        check_model_folder(model_folder(tmp_path / "m", weights=weights, quantization_config=stored))


def test_a_configuration_without_end_is_refused(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m")
    for depth, problem in ((100, "nested more than 16 levels deep"), (100_000, "found broken JSON")):
        deep = '{"a":' * depth + "1" + "}" * depth
        (path / "config.json").write_text(f'{{"model_type": "llama", "x": {deep}}}', encoding="utf-8")
        with pytest.raises(RecipeError, match=problem):
            check_model_folder(path)


def test_weights_that_overlap_are_refused(tmp_path: Path) -> None:
    places = [[0, 8], [4, 12]]
    tensors = {f"w{i}": {"dtype": "F32", "shape": [2], "data_offsets": place} for i, place in enumerate(places)}
    header = json.dumps(tensors).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(12)
    with pytest.raises(RecipeError, match=r"damaged safetensors file \(its tensors overlap"):
        check_model_folder(model_folder(tmp_path / "m", weights=weights))


def test_a_folder_with_python_files_is_refused(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m", model_type="someones")
    (path / "modeling_own.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"found the Python file 'modeling_own.py' .*runs no model's code"):
        check_model_folder(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path: Path, name: str) -> None:
    path = model_folder(tmp_path / "m")
    (path / "model.safetensors").rename(path / name)
    with pytest.raises(RecipeError, match=f"found pickled weights '{name}'.*save_pretrained"):
        check_model_folder(path)


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m")
    (path / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"found no weights; expected model\.safetensors"):
        check_model_folder(path)
    (path / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"found no config.json; expected a model folder"):
        check_model_folder(path)
    (path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"found an adapter; expected a model folder\. Merge it first"):
        check_model_folder(path)


@pytest.mark.parametrize("weights", [b"", b"\x00" * 4, safetensors()[:-1], safetensors() + b"x", b"\xff" * 40])
def test_damaged_weights_are_refused(tmp_path: Path, weights: bytes) -> None:
    with pytest.raises(RecipeError, match="found a damaged safetensors file"):
        check_model_folder(model_folder(tmp_path / "m", weights=weights))


def test_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m")
    (path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecipeError, match="found broken JSON"):
        check_model_folder(path)
    (path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RecipeError, match="found no model_type"):
        check_model_folder(path)
    (path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(RecipeError, match="found no vocab_size"):
        check_model_folder(path)


def test_an_existing_folder_wins_and_a_missing_one_names_its_neighbour(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "english-3m")
    assert resolve_model(str(path)) == path
    with pytest.raises(RecipeError, match=r"found no folder .*Did you mean '.*/english-3m'\?"):
        resolve_model(str(tmp_path / "english-3n"))
    with pytest.raises(RecipeError, match=r"found no folder './nowhere/at/all'.*Fix the path\. Relative"):
        resolve_model("./nowhere/at/all")
    with pytest.raises(RecipeError, match="found the file"):
        resolve_model(str(path / "config.json"))


def test_a_hub_id_is_fetched_by_an_allow_list_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(name: str, **arguments: object) -> str:
        asked.update(name=name, **arguments)
        return str(tmp_path)

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setattr(folder_module, "import_extra", lambda module, extra: hub)
    (tmp_path / "model.safetensors").touch()
    assert resolve_model("owner/name@abc") == tmp_path
    assert (asked["name"], asked["revision"], asked["ignore_patterns"]) == ("owner/name", "abc", ["*/*"])
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def test_a_hub_model_with_pickles_alone_is_refused_with_the_way_to_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    hub = SimpleNamespace(
        snapshot_download=lambda name, **arguments: str(tmp_path),
        list_repo_files=lambda name, revision: ["config.json", "pytorch_model.bin"],
    )
    monkeypatch.setattr(folder_module, "import_extra", lambda module, extra: hub)
    expected = (
        r"^owner/name: found pickled weights 'pytorch_model\.bin'.*AutoModelForSeq2SeqLM as M, AutoTokenizer as T; "
        r"M\.from_pretrained\('owner/name'\)\.save_pretrained\('name-safetensors'\)"
    )
    with pytest.raises(RecipeError, match=expected):
        resolve_model("owner/name")


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("bad id")])
def test_an_unreachable_hub_is_an_error_that_names_both_readings(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def snapshot_download(name: str, **arguments: object) -> str:
        raise error

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setattr(folder_module, "import_extra", lambda module, extra: hub)
    with pytest.raises(RecipeError, match=rf"neither a folder 'owner/name' nor such a model on the hub \({error}\)"):
        resolve_model("owner/name")


def test_looking_at_a_model_imports_no_torch() -> None:
    code = "import sys, keeptune.model.folder; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False False"


@pytest.mark.real
def test_the_facts_of_a_real_model() -> None:
    path = SHARED / "models" / "english-3m"
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    facts = check_model_folder(path)
    assert (facts.model_type, facts.vocab_size, facts.max_positions) == ("llama", 4096, 1024)


def test_an_adapter_names_its_base_model_or_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "owner/name", "revision": None}))
    assert adapter_base(tmp_path) == "owner/name"
    config.write_text(json.dumps({"base_model_name_or_path": "owner/name", "revision": "abc"}))
    assert adapter_base(tmp_path) == "owner/name@abc"
    config.write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(
        RecipeError, match=r"found no name of the base model; expected one\. Write it into adapter_config"
    ):
        adapter_base(tmp_path)
