"""Every method over both kinds of model: it trains, goes on exactly, is saved, loads in PEFT alone, and is merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from keeptune.errors import Interrupted, RecipeError
from keeptune.model.artifact import adapter_weights, load_artifact, verify_artifact
from keeptune.model.attention import can_pack, uses_virtual_tokens
from keeptune.model.load import empty_model
from keeptune.model.loss import batch_loss, loss_is_exact
from keeptune.model.merge import merge_adapter
from keeptune.model.methods import Method, apply_method, check_fit, check_method, quiet_peft
from keeptune.model.modes import evaluating
from keeptune.text.batches import Batch, pack, pad, pad_pairs
from keeptune.text.tokens import Example
from tests.model.bases import Base, logits, make_base, save

from .tiny import TRAIN, StopAt, Table, digest_run, read_events, run

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
CASES = [(name, kind) for name in METHODS for kind in ("llama", "t5")]
# Chosen after two steps and after all four, by the loss of a few records.
SHORT = {"tokens_per_step": 40, "tokens_per_micro_batch": 20, "num_train_epochs": 2, "evals_per_epoch": 1}
SEEN = Table(TRAIN.examples[:3], TRAIN.record_ids[:3])
INPUTS = {"prompt_tuning", "prefix_tuning", "p_tuning"}
# Which poll for a stop ends the first of two starts, amid the third of four steps.
STOPPED_AT = {"llama": 6, "t5": 10}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    small = {"llama": {"num_hidden_layers": 1}, "t5": {"num_layers": 1}}
    made = {kind: make_base(tmp_path_factory.mktemp("base") / kind, kind, **sizes) for kind, sizes in small.items()}
    return made.__getitem__


def method_of(name: str) -> Method:
    peft_type, arguments = METHODS[name]
    return Method(name, peft_type, 0.05, arguments)


def start(base: Base, name: str, folder: Path, **changed: Any) -> nn.Module:
    model = apply_method(base.load(), method_of(name), seed=1)
    layout, collate = layout_of(model, base)
    settings = {"loss": batch_loss, "collate": collate, "layout": layout, **SHORT, **changed}
    run(model, folder, validation_table=SEEN, **settings)
    return model


def layout_of(model: nn.Module, base: Base) -> tuple[Any, Callable[..., Batch]]:
    if base.encoder_decoder:
        return "pairs", partial(pad_pairs, pad_id=0)
    return ("padded", partial(pad, pad_id=0)) if uses_virtual_tokens(model) else ("packed", pack)


def loss_of(model: nn.Module, base: Base, examples: Sequence[Example] = TRAIN.examples) -> float:
    with evaluating(model):
        return batch_loss(model, layout_of(model, base)[1](examples)).item()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_method_trains_goes_on_exactly_and_is_saved(
    name: str, kind: str, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base, method = bases(kind), method_of(name)
    check_method(method, encoder_decoder=base.encoder_decoder)
    model = start(base, name, tmp_path / "whole")
    assert loss_of(model, base) < loss_of(apply_method(base.load(), method, seed=1), base)
    one_by_one = sum(loss_of(model, base, [example]) for example in SEEN.examples)
    assert loss_of(model, base, SEEN.examples) == pytest.approx(one_by_one, rel=1e-5)

    with pytest.raises(Interrupted):
        start(base, name, tmp_path / "parts", stop_requested=StopAt(STOPPED_AT[kind]))
    expected, found = (
        digest_run(model, tmp_path / "whole"),
        digest_run(start(base, name, tmp_path / "parts"), tmp_path / "parts"),
    )
    assert {**found, "checkpoints": None} == {**expected, "checkpoints": None}

    folder, merged = save(model, tmp_path / "adapter", base), tmp_path / "merged"
    verify_artifact(model, folder, base=base.folder)
    with quiet_peft():
        alone = PeftModel.from_pretrained(base.load(), str(folder))
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-5)

    if name in INPUTS:
        with pytest.raises(RecipeError, match=f"adapter of {method.peft_type}, which .*it adds inputs, not weights"):
            merge_adapter(folder, base=base.folder, out=merged)
    else:
        merge_adapter(folder, base=base.folder, out=merged)
        plain = replace(base, folder=merged).load()
        torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_packs_are_exact_or_it_is_padded(name: str, bases: Callable[[str], Base]) -> None:
    model = apply_method(bases("llama").load(), method_of(name), seed=1)
    assert can_pack(model) == (name not in INPUTS)
    assert loss_is_exact(model)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_method_is_held_against_a_model_without_weights(name: str, kind: str, bases: Callable[[str], Base]) -> None:
    check_fit(empty_model(bases(kind).folder), method_of(name))


def test_adaloras_term_is_in_the_objective_and_not_in_the_loss(bases: Callable[[str], Base], tmp_path: Path) -> None:
    first = []
    for weight in (0.0, 5.0):
        arguments = {"init_r": 4, "target_r": 1, "orth_reg_weight": weight}
        model = apply_method(bases("llama").load(), Method("mine", "ADALORA", 0.05, arguments), seed=1)
        folder = tmp_path / str(weight)
        run(model, folder, loss=batch_loss, tokens_per_step=40, tokens_per_micro_batch=20, num_train_epochs=1)
        first.append(next(event for event in read_events(folder) if event["event"] == "step"))
    without, with_term = first
    assert without["loss"] == with_term["loss"] and without["orthogonality"] == 0.0
    assert with_term["orthogonality"] > 1.0 and with_term["grad_norm"] > 2 * without["grad_norm"]


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_an_adapter_over_a_bf16_base_is_read_in_fp32(name: str, bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = apply_method(base.load(torch.bfloat16), method_of(name), seed=1)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        # Ranks that a layer lost.
        for key, parameter in model.named_parameters():
            if "q_proj.lora_E" in key:
                parameter[:2] = 0.0
    folder = save(model, tmp_path / "adapter", base)
    loaded = load_artifact(folder, base=base.folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    verify_artifact(model, folder, base=base.folder)
    saved = adapter_weights(folder)
    with quiet_peft():
        found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
