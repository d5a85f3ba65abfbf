"""Every method over both kinds of model: it trains, stops and goes on exactly, is saved, loads in PEFT, and is merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from keeptune.errors import Interrupted, RecipeError
from keeptune.model.artifact import verify_artifact
from keeptune.model.attention import can_pack, uses_virtual_tokens
from keeptune.model.loss import batch_loss, loss_is_exact
from keeptune.model.merge import merge_adapter
from keeptune.model.methods import Method, apply_method, check_fit, check_method, quiet_peft
from keeptune.text.batches import pack, pad, pad_pairs
from tests.model.bases import Base, logits, make_base, save

from .tiny import StopAt, digest_run, read_events, run

pytestmark = pytest.mark.filterwarnings(r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LINEAR = {"target_modules": "all-linear"}
VIRTUAL = {"num_virtual_tokens": 3}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", {"r": 4, "lora_dropout": 0.1}),
    "rslora": ("LORA", {"r": 4, "use_rslora": True}),
    "dora": ("LORA", {"r": 4, "use_dora": True}),
    "pissa": ("LORA", {"r": 4, "init_lora_weights": "pissa"}),
    "adalora": ("ADALORA", {"init_r": 4, "target_r": 1}),
    "vera": ("VERA", {"r": 4}),
    "ia3": ("IA3", {}),
    "loha": ("LOHA", {"r": 2, **LINEAR}),
    "lokr": ("LOKR", {"r": 2, **LINEAR}),
    "oft": ("OFT", {"oft_block_size": 4, **LINEAR}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "osf": ("OSF", {}),
    "ln_tuning": ("LN_TUNING", {}),
    "prompt_tuning": ("PROMPT_TUNING", VIRTUAL),
    "prefix_tuning": ("PREFIX_TUNING", VIRTUAL),
    "p_tuning": ("P_TUNING", VIRTUAL),
}
INPUTS = {"prompt_tuning", "prefix_tuning", "p_tuning"}
# Which poll for a stop ends the first of two starts: amid the second step or at a validation.
STOPPED_AT = {"llama": 5, "t5": 7}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made = {kind: make_base(tmp_path_factory.mktemp("base") / kind, kind) for kind in ("llama", "t5")}
    return made.__getitem__


def method_of(name: str) -> Method:
    peft_type, arguments = METHODS[name]
    return Method(name, peft_type, 0.05, arguments)


def start(base: Base, name: str, folder: Path, **changed: Any) -> nn.Module:
    model = apply_method(base.load(), method_of(name), seed=1)
    layout, collate = "packed", pack
    if base.encoder_decoder:
        layout, collate = "pairs", partial(pad_pairs, pad_id=0)
    elif uses_virtual_tokens(model):
        layout, collate = "padded", partial(pad, pad_id=0)
    settings = {"layout": layout, "tokens_per_step": 40, "tokens_per_micro_batch": 20, "learning_rate": 0.05}
    run(model, folder, loss=batch_loss, collate=collate, **{"num_train_epochs": 2, **settings, **changed})
    return model


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_goes_on_exactly_and_is_saved(
    name: str, kind: str, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base, method = bases(kind), method_of(name)
    check_method(method, encoder_decoder=base.encoder_decoder)
    model = start(base, name, tmp_path / "whole")
    losses = [event["loss"] for event in read_events(tmp_path / "whole") if event["event"] == "step"]
    assert losses[-1] < losses[0]

    with pytest.raises(Interrupted):
        start(base, name, tmp_path / "parts", stop_requested=StopAt(STOPPED_AT[kind]))
    expected, found = digest_run(model, tmp_path / "whole"), digest_run(
        start(base, name, tmp_path / "parts"), tmp_path / "parts"
    )
    assert {**found, "checkpoints": None} == {**expected, "checkpoints": None}

    folder = save(model, tmp_path / "adapter", base)
    verify_artifact(model, folder, base=base.folder)
    with quiet_peft():
        alone = PeftModel.from_pretrained(base.load(), str(folder))
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-5)

    if name in INPUTS:
        with pytest.raises(RecipeError, match=f"found an adapter of {method.peft_type}, .* it adds inputs, not weights"):
            merge_adapter(folder, base=base.folder, out=tmp_path / "merged")
    else:
        merge_adapter(folder, base=base.folder, out=tmp_path / "merged")


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_packs_are_exact_or_it_is_padded(name: str, bases: Callable[[str], Base]) -> None:
    model = apply_method(bases("llama").load(), method_of(name), seed=1)
    assert can_pack(model) == (name not in INPUTS)
    assert loss_is_exact(model)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_held_against_a_model_without_weights(
    name: str, kind: str, bases: Callable[[str], Base]
) -> None:
    model: Any = bases(kind).load()
    check_fit(model.to("meta"), method_of(name))
