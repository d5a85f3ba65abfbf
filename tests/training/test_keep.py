"""Pull, replay, teachers and drift in the loop, under the laws of a plain run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from keeptune.errors import Interrupted
from keeptune.model.divergence import target_divergences
from keeptune.model.loss import batch_loss
from keeptune.model.teacher import base_top_k
from keeptune.progress import Silent
from keeptune.text.batches import Step, pack
from keeptune.text.mixture import Chosen, Mixed, choose_replay
from keeptune.text.tokens import Examples
from keeptune.training.drift import drift_meter
from keeptune.training.plan import num_probe_examples, plan_steps, plan_validation
from keeptune.training.schedule import learning_rate_factor
from keeptune.training.settings import TrainingSettings
from keeptune.training.step import Work, accumulate, add_pull, pull_to
from keeptune.training.tensors import trained_parameters
from keeptune.training.world import SINGLE

from .test_llama import make_llama
from .tiny import (
    CPU,
    SETTINGS,
    TRAIN,
    VOCABULARY,
    StopAt,
    Table,
    digest_run,
    log_without_measures,
    make_model,
    make_table,
    read_events,
    run,
    tiny_loss,
    weights_sha256,
)

POOL = make_table(3, seed=31, name="general")
PROBE = make_table(4, seed=32, name="probe")
BUDGETS: dict[str, Any] = {"tokens_per_step": 40, "tokens_per_micro_batch": 20}


def taught(model: nn.Module, chosen: Chosen, *, k: int = 4, settings: TrainingSettings = SETTINGS) -> Chosen:
    """Return the examples with what the model expects at their targets."""
    different = chosen.first(chosen.num_distinct)
    teachers = base_top_k(
        model,
        different,
        k=k,
        micro_batches=plan_validation(different, settings=settings),
        collate=pack,
        through_logits=False,
        autocast=None,
        progress=Silent(),
    )
    return chosen.taught(teachers)


def mixture(base: nn.Module, *, k: int = 4) -> Mixed:
    return Mixed(TRAIN, taught(base, choose_replay(TRAIN, POOL, fraction=0.4, seed=0), k=k))


def meter(base: nn.Module, *, k: int = 4, stop: Callable[[], bool] = lambda: False) -> Callable[[nn.Module], float]:
    probe = taught(base, Chosen(PROBE, np.arange(4)), k=k)
    return drift_meter(
        probe,
        micro_batches=plan_validation(probe, settings=SETTINGS),
        collate=pack,
        divergences=target_divergences,
        device=CPU,
        autocast=None,
        stop_requested=stop,
    )


def start_keeping(peft_type: str | None, folder: Path, *, stop_at: int | None = None) -> tuple[dict[str, Any], int]:
    """Run with everything on, to the end or to the poll at which a stop is asked for; return digest and polls."""
    stop = StopAt(stop_at)
    base, model = make_llama(peft_type), make_llama(peft_type)
    # PEFT's adapters are new: without them, this is the base.
    run(
        model,
        folder,
        train_table=mixture(base),
        loss=partial(batch_loss, kl_weight=0.5),
        l2_base=0.01 if peft_type is None else 0.0,
        drift=meter(base, stop=stop),
        stop_requested=stop,
        evals_per_epoch=1,
        num_train_epochs=1,
        **BUDGETS,
    )
    return digest_run(model, folder), stop.num_polls


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_a_run_that_keeps_and_is_stopped_anywhere_ends_with_the_same_bits(
    tmp_path: Path, peft_type: str | None
) -> None:
    expected, num_polls = start_keeping(peft_type, tmp_path / "reference")
    events = [event["event"] for event in read_events(tmp_path / "reference")]
    assert events.count("drift") == events.count("step") == 3
    for position in range(0, num_polls, 1 if peft_type is None else 4):
        folder = tmp_path / str(position)
        with pytest.raises(Interrupted, match="stopped on request at step"):
            start_keeping(peft_type, folder, stop_at=position)
        digest, _ = start_keeping(peft_type, folder)
        assert digest["log"] == expected["log"], position
        assert {**digest, "checkpoints": None} == {**expected, "checkpoints": None}, position


def test_the_pull_is_to_the_base_wherever_the_run_goes_on(tmp_path: Path) -> None:
    penalties = []
    for stop_at, name in ((None, "whole"), (20, "stopped")):
        model = make_model()
        try:
            run(model, tmp_path / name, l2_base=0.5, stop_requested=StopAt(stop_at))
        except Interrupted:
            run(make_model(), tmp_path / name, l2_base=0.5)
        penalties.append([e["l2_penalty"] for e in read_events(tmp_path / name) if e["event"] == "step"])
    assert penalties[0] == penalties[1]
    assert penalties[0][0] == 0.0 and all(penalty > 0 for penalty in penalties[0][1:])


def work_of(model: nn.Module, *, loss: Any = tiny_loss, l2_base: float = 0.0, start: nn.Module | None = None) -> Work:
    parameters = trained_parameters(model)
    pull = pull_to(parameters if start is None else trained_parameters(start), strength=l2_base)
    return Work(model, parameters, loss, pack, SINGLE, CPU, None, lambda: False, pull=pull)


def whole_step(table: Examples) -> Step:
    return Step(
        (tuple(range(len(table))),), num_tokens=int(table.lengths.sum()), num_targets=int(table.num_targets.sum())
    )


def test_the_gradient_of_the_pull_is_that_of_the_squared_distance() -> None:
    base, model, reference = make_model(seed=3), make_model(seed=4, dropout=0.0), make_model(seed=4, dropout=0.0)
    work = work_of(model, l2_base=0.25, start=base)
    accumulated = accumulate(work, whole_step(TRAIN), table=TRAIN)
    penalty = add_pull(work)
    distance: Any = sum(
        ((p - q.detach()) ** 2).sum() for p, q in zip(reference.parameters(), base.parameters(), strict=True)
    )
    loss = torch.stack([tiny_loss(reference, pack([TRAIN[i]])) for i in range(12)]).sum() / TRAIN.num_targets.sum()
    (loss + 0.25 * distance).backward()
    assert penalty == pytest.approx(0.25 * distance.item(), rel=1e-6)
    assert accumulated.loss == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_training_with_a_pull_equals_a_plain_loop_that_clips_the_whole_gradient(tmp_path: Path) -> None:
    model, plain, base = (make_model(dropout=0.0) for _ in range(3))
    changed: dict[str, Any] = {"num_train_epochs": 1, "weight_decay": 0.0, "max_grad_norm": 0.05}
    run(model, tmp_path, l2_base=2.0, adam_epsilon=1.0, validation_table=Table((), ()), **changed)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), eps=1.0, weight_decay=0.0)
    norms = []
    for number, step in enumerate(plan_steps(TRAIN, settings=SETTINGS, epoch=0), 1):
        factor = learning_rate_factor(number, num_steps=3, num_warmup_steps=1, kind="linear", cooldown_fraction=0.2)
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        loss = torch.stack([tiny_loss(plain, pack([TRAIN[i]])) for m in step.micro_batches for i in m]).sum()
        pairs = zip(plain.parameters(), base.parameters(), strict=True)
        (
            loss / step.num_targets + 2.0 * torch.stack([((p - q.detach()) ** 2).sum() for p, q in pairs]).sum()
        ).backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.05).item())
        optimizer.step()
        optimizer.zero_grad()
    found = [event["grad_norm"] for event in read_events(tmp_path) if event["event"] == "step"]
    assert found == pytest.approx(norms, rel=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_weight_without_a_gradient_is_pulled_too() -> None:
    base, model = make_model(seed=3), make_model(seed=4)
    assert add_pull(work_of(model, l2_base=0.5, start=base)) is not None
    assert torch.equal(model.head.bias.grad, (model.head.bias - base.head.bias).detach())  # pyright: ignore
    assert add_pull(work_of(model)) is None


def test_a_strong_pull_keeps_the_weights_near_the_base(tmp_path: Path) -> None:
    distances = {}
    for l2_base in (0.0, 0.1, 10.0):
        model, base = make_model(), make_model()
        run(model, tmp_path / str(l2_base), l2_base=l2_base, weight_decay=0.0)
        pairs = zip(model.parameters(), base.parameters(), strict=True)
        distances[l2_base] = sum(((p - q) ** 2).sum().item() for p, q in pairs)
    assert distances[10.0] < 0.5 * distances[0.1] < 0.5 * distances[0.0]


def test_a_plain_run_and_its_files_are_those_of_before(tmp_path: Path) -> None:
    model = make_model()
    run(model, tmp_path / "plain")
    with_nothing, mixed_with_nothing = make_model(), make_model()
    run(with_nothing, tmp_path / "nothing", l2_base=0.0, drift=None)
    run(mixed_with_nothing, tmp_path / "drift", drift=lambda _: 0.25)
    assert weights_sha256(model) == weights_sha256(with_nothing) == weights_sha256(mixed_with_nothing)
    plain = log_without_measures(tmp_path / "plain")
    assert plain == log_without_measures(tmp_path / "nothing")
    assert plain == [event for event in log_without_measures(tmp_path / "drift") if event["event"] != "drift"]
    assert set(plain[1]) == {
        "event", "step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_targets", "record_ids_sha256"
    }  # fmt: skip
    state = (tmp_path / "plain" / "checkpoints" / "step-6" / "state.json").read_text()
    assert "drift" not in state and "drift_step" in (tmp_path / "drift/checkpoints/step-6/state.json").read_text()


def test_the_loss_without_a_teacher_takes_the_same_path_to_the_bit() -> None:
    gradients = []
    for loss in (batch_loss, partial(batch_loss, kl_weight=0.3)):
        model = make_llama(None)
        accumulate(work_of(model, loss=loss), whole_step(TRAIN), table=TRAIN)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("k", [4, VOCABULARY])
def test_a_steps_gradient_is_the_same_for_any_micro_batches_of_task_and_replay(k: int) -> None:
    base = make_llama(None)
    table = mixture(base, k=k)
    # Four of the task, four of the replay, one example among them twice.
    chosen = Chosen(table, np.array([0, 12, 1, 13, 2, 14, 3, 15]))
    assert table.num_repeats > 0 and table.record_ids[15] == table.record_ids[12]
    outcomes = []
    for micro_batches in (
        tuple((i,) for i in range(8)),
        ((0, 1), (2, 3), (4, 5), (6, 7)),
        (tuple(range(8)),),
        ((0, 2, 4, 6), (1, 3, 5, 7)),
    ):
        model = make_llama(None)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.eval()
        step = Step(micro_batches, int(chosen.lengths.sum()), int(chosen.num_targets.sum()))
        work = work_of(model, loss=partial(batch_loss, kl_weight=0.5))
        loss = accumulate(work, step, table=chosen).loss
        outcomes.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for loss, gradient in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][0], abs=1e-6)
        assert torch.allclose(gradient, outcomes[0][1], atol=1e-6)


def test_training_on_what_the_base_expects_brings_a_moved_model_back(tmp_path: Path) -> None:
    base, model = make_llama(None), make_llama(None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    table = mixture(base, k=VOCABULARY)
    drift, replay = meter(base, k=VOCABULARY), Chosen(table, np.arange(12, len(table)))
    before = drift(model)
    run(model, tmp_path, train_table=replay, loss=batch_loss, num_train_epochs=4, weight_decay=0.0, **BUDGETS)
    assert 0.0 < drift(model) < 0.5 * before


def test_the_drift_of_an_untrained_model_is_exactly_nothing_and_grows_from_there() -> None:
    for k in (4, VOCABULARY):
        base = make_llama(None)
        drift = meter(base, k=k)
        assert drift(make_llama(None)) == 0.0 == drift(make_llama("LORA"))
        moved = make_llama(None)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(1.1)
        assert drift(moved) > 0.0


def test_the_drift_is_the_mean_over_the_probes_targets() -> None:
    base, model = make_llama(None), make_llama(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    base.eval()
    model.eval()
    total = 0.0
    for i in range(4):
        ids = torch.from_numpy(PROBE[i].input_ids.astype(np.int64))
        is_target = torch.from_numpy(PROBE[i].loss_mask[1:])
        with torch.no_grad():
            log_p, log_q = (m(input_ids=ids[None]).logits[0, :-1][is_target].log_softmax(1) for m in (base, model))
        total += float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    assert meter(base, k=VOCABULARY)(model) == pytest.approx(total / int(PROBE.num_targets.sum()), abs=1e-6)


def counted(values: list[float]) -> Callable[[nn.Module], float]:
    def drift(model: nn.Module) -> float:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        values.append(float(next(model.parameters()).sum()))
        return values[-1]

    return drift


def test_the_drift_is_measured_at_every_tenth_of_the_run_and_at_its_end(tmp_path: Path) -> None:
    values: list[float] = []
    result = run(make_model(), tmp_path, num_train_epochs=10, drift=counted(values))
    events = [event for event in read_events(tmp_path) if event["event"] == "drift"]
    assert result.num_steps == 30
    assert [event["step"] for event in events] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert [event["kl"] for event in events] == values
    assert [event["epoch"] for event in events] == [float(i) for i in range(1, 11)]
    assert all(set(event) == {"event", "step", "epoch", "kl"} for event in events)


def test_a_run_that_ends_early_measures_the_drift_where_it_ends(tmp_path: Path) -> None:
    losses = iter([1.0, 2.0, 3.0])
    result = run(
        make_model(),
        tmp_path,
        num_train_epochs=25,
        select_by="f1",
        validate=lambda _: next(losses),
        patience=2,
        drift=counted([]),
    )
    assert result.stopped_early and result.num_steps == 9
    assert [event["step"] for event in read_events(tmp_path) if event["event"] == "drift"] == [8, 9]


def test_a_stop_between_a_step_and_its_measurement_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    reference = make_model()
    run(reference, tmp_path / "reference", drift=counted([]))
    for stopped in (0, 3, 5):
        calls: list[int] = []

        def drift(model: nn.Module, *, stopped: int = stopped, calls: list[int] = calls) -> float:
            calls.append(1)
            if len(calls) == stopped + 1:
                raise Interrupted("while measuring")
            return counted([])(model)

        folder = tmp_path / str(stopped)
        with pytest.raises(Interrupted, match=f"stopped on request at step {stopped + 1} of 6"):
            run(make_model(), folder, drift=drift)
        model = make_model()
        run(model, folder, drift=drift)
        expected = digest_run(reference, tmp_path / "reference")
        assert {**digest_run(model, folder), "checkpoints": None} == {**expected, "checkpoints": None}, stopped


def test_a_kill_after_a_measurement_that_no_checkpoint_knows_of_leaves_one_line(tmp_path: Path) -> None:
    def interrupted(_: nn.Module) -> float:
        raise Interrupted("while measuring")

    reference = make_model()
    run(reference, tmp_path / "reference", drift=counted([]))
    with pytest.raises(Interrupted):
        run(make_model(), tmp_path / "run", drift=interrupted)
    # The next start measured, wrote its lines, and was killed before it could save.
    path = tmp_path / "run" / "events.jsonl"
    lines = ['{"event": "validation", "step": 1, "loss": 9.0}', '{"event": "drift", "step": 1, "kl": 9.0}']
    path.write_text(path.read_text() + "".join(f"{line}\n" for line in lines))
    model = make_model()
    run(model, tmp_path / "run", drift=counted([]))
    assert digest_run(model, tmp_path / "run") == digest_run(reference, tmp_path / "reference")


def test_how_often_the_drift_is_measured_changes_no_weight(tmp_path: Path) -> None:
    base = make_llama(None)
    digests = []
    for name, drift in (("without", None), ("with", meter(base))):
        model = make_llama(None)
        run(model, tmp_path / name, loss=batch_loss, drift=drift, **BUDGETS)
        digest = digest_run(model, tmp_path / name)
        digests.append({**digest, "log": [event for event in digest["log"] if event["event"] != "drift"]})
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("task_tokens", "num_epochs", "expected"),
    [
        # 0.02 · 2 · (3 · 1,000,000 / 10) = 12,000 tokens.
        (1_000_000, 3, 12),
        (1_000_000, 1, 4),
        (10_000_000, 3, 40),
        (100_000, 1, 0),
        # 0.02 · 2 · (250,000 / 10) = 1,000.
        (250_000, 1, 1),
        (249_999, 1, 0),
    ],
)
def test_the_probe_takes_two_percent_of_the_training_at_most(task_tokens: int, num_epochs: int, expected: int) -> None:
    class Lengths:
        def __init__(self, lengths: list[int]) -> None:
            self.lengths = np.array(lengths, dtype=np.int64)

    probe: Any = Lengths([1000] * 40)
    table: Any = Lengths([task_tokens])
    assert num_probe_examples(probe, table=table, num_epochs=num_epochs) == expected


def test_frozen_weights_are_in_no_optimizer_and_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from keeptune.model.methods import Method, apply_method

    model = apply_method(make_llama(None), Method("full", None, 0.01, {}, frozen_layers=1), seed=0)  # pyright: ignore
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(model, tmp_path, loss=batch_loss, l2_base=0.1, **BUDGETS)
    frozen = {name for name in before if "embed_tokens" in name or ".layers.0." in name}
    assert len(frozen) == 1 + 9
    last = tmp_path / "checkpoints" / "step-4"
    saved = load_file(last / "model.safetensors")
    moments = load_file(last / "optimizer.safetensors")
    assert set(saved) == set(before) - frozen
    assert {key.split("/", 1)[1] for key in moments} == set(before) - frozen
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
