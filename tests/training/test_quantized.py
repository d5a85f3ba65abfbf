"""Every method that quantised base weights serve: it trains beside them, goes on exactly, and is read over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keeptune.errors import Interrupted
from keeptune.model.artifact import verify_artifact
from keeptune.model.attention import can_pack
from keeptune.model.declared import Quantization
from keeptune.model.load import load_model
from keeptune.model.loss import batch_loss
from keeptune.model.methods import apply_method, check_method
from tests.model.bases import Base, make_base, save
from tests.training.test_methods import INPUTS, SEEN, SHORT, STOPPED_AT, layout_of, loss_of, method_of

from .tiny import StopAt, digest_run, run

pytest.importorskip("bitsandbytes", reason="bitsandbytes, the extra `quantized`, is not installed")
pytest.importorskip("accelerate", reason="accelerate, of the extra `quantized`, is not installed")
pytestmark = pytest.mark.filterwarnings(r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SERVED = ["lora", "dora", "adalora", "vera", "ia3", "oft", "ln_tuning", *sorted(INPUTS)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    small = {"llama": {"num_hidden_layers": 1}, "t5": {"num_layers": 1}}
    made = {kind: make_base(tmp_path_factory.mktemp("base") / kind, kind, **sizes) for kind, sizes in small.items()}
    return made.__getitem__


def untrained(base: Base, name: str, bits: Quantization) -> nn.Module:
    method = method_of(name)
    check_method(method, encoder_decoder=base.encoder_decoder, quantised=bits)
    loaded = load_model(base.folder, device=torch.device("cpu"), dtype=torch.float32, quantization=bits)
    return apply_method(loaded, method, seed=1)


def trained(base: Base, name: str, bits: Quantization, folder: Path, **changed: Any) -> nn.Module:
    model = untrained(base, name, bits)
    layout, collate = layout_of(model, base)
    settings = {"learning_rate": 0.05, "loss": batch_loss, "collate": collate, "layout": layout, **SHORT, **changed}
    run(model, folder, validation_table=SEEN, **settings)
    return model


@pytest.mark.parametrize("name", SERVED)
def test_a_method_beside_4_bit_weights_goes_on_exactly(name: str, bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = trained(base, name, "4bit", tmp_path / "whole")
    assert can_pack(model) == (name not in INPUTS)
    assert loss_of(model, base) < loss_of(untrained(base, name, "4bit"), base)
    stop = StopAt(STOPPED_AT["llama"])
    with pytest.raises(Interrupted):
        trained(base, name, "4bit", tmp_path / "parts", stop_requested=stop)
    found = digest_run(trained(base, name, "4bit", tmp_path / "parts"), tmp_path / "parts")
    assert {**found, "checkpoints": None} == {**digest_run(model, tmp_path / "whole"), "checkpoints": None}
    verify_artifact(model, save(model, tmp_path / "adapter", base), base=base.folder, quantization="4bit")


# Those for which PEFT has a layer of its own over LLM.int8.
@pytest.mark.parametrize("name", ["lora", "adalora", "vera", "ia3", "oft"])
def test_a_method_beside_8_bit_weights_of_t5_trains(name: str, bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("t5")
    model = trained(base, name, "8bit", tmp_path / "whole")
    assert loss_of(model, base) < loss_of(untrained(base, name, "8bit"), base)
    verify_artifact(model, save(model, tmp_path / "adapter", base), base=base.folder, quantization="8bit")
