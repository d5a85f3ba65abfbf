"""AdaLoRA's ranks: the term of PEFT's own forward pass, the budget kept, and what a model is saved with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keeptune.errors import RecipeError
from keeptune.model.methods import Method, apply_method
from keeptune.model.ranks import AdaptiveRanks, adaptive_ranks, note_ranks_, ranks_bytes

from .tiny import CONFIGS, make_model

IDS = torch.tensor([[5, 9, 40, 7, 31, 12]])


def adapted(**arguments: Any) -> Any:
    method = Method("mine", "ADALORA", 1e-3, {"init_r": 4, "target_r": 2, **arguments})
    return apply_method(make_model(CONFIGS["llama"]), method, seed=0)


def ranks_of(model: Any, *, num_steps: int = 10) -> AdaptiveRanks:
    ranks = adaptive_ranks(model, num_steps=num_steps)
    assert ranks is not None
    return ranks


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_E" in name}


def take_steps(model: Any, ranks: AdaptiveRanks, *, first: int, last: int) -> None:
    """Train on one batch with the state of a plain SGD, so that only ranks carry over from step to step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(first, last + 1):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        ranks.allocate_(step)
        optimizer.zero_grad()


def test_the_term_and_its_gradient_are_those_of_pefts_own_forward_pass() -> None:
    model = adapted(orth_reg_weight=0.7)
    ranks = ranks_of(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with_term = model(input_ids=IDS, labels=IDS).loss
    model.peft_config["default"].orth_reg_weight = 0.0
    cross_entropy = model(input_ids=IDS, labels=IDS).loss
    cross_entropy.backward()
    model.peft_config["default"].orth_reg_weight = 0.7
    assert ranks.add_orthogonality_() == pytest.approx(float(with_term.detach() - cross_entropy.detach()), rel=1e-5)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_ranks_shrink_to_the_target_and_stay_there() -> None:
    model = adapted()
    take_steps(model, ranks_of(model), first=1, last=10)
    kept = {name: int((p != 0).sum()) for name, p in values(model).items()}
    # Seven linear layers in each of two layers, two ranks each on average.
    assert sum(kept.values()) == 14 * 2 and len(set(kept.values())) > 1


def test_without_a_schedule_a_tenth_waits_and_three_tenths_finish() -> None:
    model = adapted()
    ranks_of(model, num_steps=40)
    config = model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (40, 4, 12)
    own = adapted(tinit=2, tfinal=3)
    ranks_of(own, num_steps=40)
    assert (own.peft_config["default"].tinit, own.peft_config["default"].tfinal) == (2, 3)


@pytest.mark.parametrize("step", [1, 3, 6, 8])
def test_ranks_go_on_from_what_they_said(step: int) -> None:
    model = adapted()
    ranks = ranks_of(model)
    take_steps(model, ranks, first=1, last=step)
    fresh = adapted()
    fresh.load_state_dict(model.state_dict())
    again = ranks_of(fresh)
    again.restore_({name: tensor.clone() for name, tensor in ranks.tensors().items()})
    for trained, its_ranks in ((model, ranks), (fresh, again)):
        take_steps(trained, its_ranks, first=step + 1, last=10)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_the_config_names_the_ranks_of_the_weights_that_are_there() -> None:
    model = adapted()
    first, second = list(values(model).values())[:2]
    with torch.no_grad():
        first.copy_(torch.tensor([[0.5], [0.0], [1.0], [0.0]]))
        second.copy_(torch.tensor([[0.0], [0.0], [0.0], [0.0]]))
    note_ranks_(model)
    assert list(model.peft_config["default"].rank_pattern.values())[:2] == [[True, False, True, False], [False] * 4]


def test_other_models_have_no_such_ranks() -> None:
    base = make_model(CONFIGS["llama"])
    assert adaptive_ranks(base, num_steps=10) is None
    assert adaptive_ranks(apply_method(base, Method("mine", "LORA", 1e-3, {}), seed=0), num_steps=10) is None


def test_what_is_noted_of_the_weights_counts_as_memory() -> None:
    model = adapted()
    assert ranks_bytes(model) == 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ranks_bytes(make_model(CONFIGS["llama"])) == 0


def test_a_schedule_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        adaptive_ranks(adapted(tinit=6, tfinal=4), num_steps=10)
    assert str(caught.value) == (
        "peft_type ADALORA: found tinit 6 and tfinal 4 in a training of 10 steps; expected steps between them, in "
        "which ranks shrink. Lower them, or remove both."
    )
