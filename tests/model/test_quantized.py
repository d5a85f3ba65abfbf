"""4- and 8-bit base weights: read, trained beside, never changed by an evaluation, and nothing is merged into them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from keeptune.errors import RecipeError
from keeptune.model.artifact import load_artifact, verify_artifact
from keeptune.model.attention import can_pack
from keeptune.model.declared import Quantization
from keeptune.model.folder import check_model_folder
from keeptune.model.load import load_model, require_quantization
from keeptune.model.loss import loss_is_exact
from keeptune.model.merge import merge_adapter
from keeptune.model.methods import Method, apply_method, count_parameters
from keeptune.model.modes import evaluating
from keeptune.model.path import open_path
from keeptune.storage import read_record, write_record

from .bases import Base, logits, make_base, save
from .tiny import trained_state

pytest.importorskip("bitsandbytes", reason="bitsandbytes, the extra `quantized`, is not installed")
pytest.importorskip("accelerate", reason="accelerate, of the extra `quantized`, is not installed")
pytestmark = pytest.mark.filterwarnings(r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CPU = torch.device("cpu")
BITS: list[Quantization] = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made = {kind: make_base(tmp_path_factory.mktemp("base") / kind, kind) for kind in ("llama", "t5")}
    return made.__getitem__


def quantised(base: Base, bits: Quantization) -> PreTrainedModel:
    return load_model(base.folder, device=CPU, dtype=torch.float32, quantization=bits)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every stored number of the linear layers, the scales among them, as copies."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.uint8, torch.int8):
            found[name] = parameter.detach().clone()
            state: Any = getattr(parameter, "quant_state", None)
            if state is not None:
                found[f"{name}.absmax"] = state.absmax.clone()
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_linear_layers_are_stored_in_few_bits_and_give_almost_the_same_logits(
    bits: Quantization, kind: str, bases: Callable[[str], Base]
) -> None:
    plain, model = bases(kind).load(), quantised(bases(kind), bits)
    storage = sum(p.numel() for p in model.parameters() if p.dtype in (torch.uint8, torch.int8))
    linear = sum(
        module.weight.numel()
        for name, module in plain.named_modules()
        # transformers keeps the output layer, and T5's `wo`, as they are.
        if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith(".wo")
    )
    assert storage == linear // (2 if bits == "4bit" else 1)
    assert count_parameters(model).total == count_parameters(plain).total
    difference = (logits(model) - logits(plain)).abs().max() / logits(plain).abs().max()
    assert 0.0 < difference < (0.5 if bits == "4bit" else 0.05)


@pytest.mark.parametrize("bits", BITS)
def test_packs_and_the_chunked_loss_are_exact_over_quantised_weights(
    bits: Quantization, bases: Callable[[str], Base]
) -> None:
    model = quantised(bases("llama"), bits)
    assert can_pack(model) and loss_is_exact(model)


@pytest.mark.parametrize("bits", BITS)
def test_an_evaluation_changes_nothing_that_is_stored(bits: Quantization, bases: Callable[[str], Base]) -> None:
    model = quantised(bases("llama"), bits).train()
    ids = torch.tensor([[5, 9, 40, 7, 31, 12]])
    before, trained = stored(model), model(input_ids=ids).logits.detach()
    with evaluating(model):
        model(input_ids=ids)
    assert {name: tensor.tolist() for name, tensor in stored(model).items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    assert torch.equal(model(input_ids=ids).logits.detach(), trained)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_adapter_is_trained_and_read_over_the_same_weights_and_merged_into_none(
    bits: Quantization, kind: str, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases(kind)
    model = apply_method(quantised(base, bits), Method("mine", "LORA", 1e-3, {"r": 4}), seed=0)
    generator = torch.Generator().manual_seed(5)
    for tensor in trained_state(model).values():
        assert tensor.dtype == torch.float32
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    folder = save(model, tmp_path / "adapter", base)
    verify_artifact(model, folder, base=base.folder, quantization=bits)
    loaded = load_artifact(folder, base=base.folder, device=CPU, dtype=torch.float32, quantization=bits)
    assert torch.equal(logits(loaded), logits(model))

    way = open_path(folder, base=base.folder, device=CPU, dtype=torch.float32, quantization=bits)
    way.set_(0.0)
    assert torch.equal(logits(way.model), logits(quantised(base, bits)))

    manifest = read_record(folder / "manifest.json")
    write_record(folder / "manifest.json", {**manifest, "quantization": bits})
    with pytest.raises(
        RecipeError, match=rf"adapter: found an adapter that was trained and scored over {bits} weights"
    ):
        merge_adapter(folder, base=base.folder, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_model_that_is_stored_quantised_is_read_as_it_is(bases: Callable[[str], Base], tmp_path: Path) -> None:
    model = quantised(bases("llama"), "8bit")
    model.save_pretrained(tmp_path / "stored")
    assert check_model_folder(tmp_path / "stored").quantised
    loaded = load_model(tmp_path / "stored", device=CPU, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_the_bits_are_part_of_the_weights_hash(bases: Callable[[str], Base]) -> None:
    from dataclasses import replace

    facts = check_model_folder(bases("llama").folder)
    hashes = {replace(facts, quantization=bits).sha256 for bits in (None, *BITS)}
    assert len(hashes) == 3 and facts.sha256 in hashes


@pytest.mark.parametrize("library", ["bitsandbytes", "accelerate"])
def test_a_library_that_is_not_there_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RecipeError, match=rf"{library}: not installed; .* `pip install 'keeptune\[quantized\]'`"):
        require_quantization()
