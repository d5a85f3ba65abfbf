from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from keeptune.errors import DataError, Interrupted
from keeptune.text.tokens import Example
from keeptune.training.plan import RunPlan, describe_run, plan_run, plan_steps, plan_validation

from .tiny import SETTINGS, TRAIN, VALIDATION, Table, make_table

LARGE = make_table(200, seed=4)


def plan(table: Table = LARGE, *, has_validation: bool = True, has_metric: bool = False, **changed: object) -> RunPlan:
    settings = replace(SETTINGS, **changed)  # pyright: ignore[reportArgumentType]
    return plan_run(table, settings=settings, has_validation=has_validation, has_metric=has_metric)


def test_the_steps_of_an_epoch_hold_every_example_once() -> None:
    steps = plan_steps(LARGE, settings=SETTINGS, epoch=1)
    indices = [i for step in steps for micro_batch in step.micro_batches for i in micro_batch]
    assert sorted(indices) == list(range(200))
    assert sum(step.num_targets for step in steps) == int(LARGE.num_targets.sum())


def test_validation_holds_every_example_once_within_the_micro_batch_budget() -> None:
    micro_batches = plan_validation(VALIDATION, settings=SETTINGS)
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(4))
    assert all(VALIDATION.lengths[list(m)].sum() <= 10 for m in micro_batches)
    assert plan_validation(Table((), ()), settings=SETTINGS) == []


def test_validations_are_spread_over_each_epoch_and_stand_at_its_end() -> None:
    run = plan(evals_per_epoch=4)
    first, second = run.epoch_ends
    assert len([step for step in run.evaluation_steps if step <= first]) == 4
    assert {first, second} <= run.evaluation_steps
    assert max(run.evaluation_steps) == run.num_steps


def test_more_validations_than_steps_are_one_a_step() -> None:
    run = plan(TRAIN, evals_per_epoch=50)
    assert run.evaluation_steps == frozenset(range(1, run.num_steps + 1))


def test_eval_steps_take_the_place_of_those_of_the_epochs() -> None:
    run = plan(TRAIN, eval_steps=4)
    assert run.num_steps == 6
    assert run.evaluation_steps == {4, 6}


def test_a_metric_is_taken_at_the_end_of_each_epoch() -> None:
    run = plan(TRAIN, eval_steps=4, has_metric=True)
    assert run.evaluation_steps == {3, 4, 6}
    assert plan(TRAIN, has_validation=False, has_metric=True).evaluation_steps == {3, 6}
    assert plan(TRAIN, has_validation=False).evaluation_steps == frozenset()


def test_checkpoints_come_at_ends_of_epochs_or_every_save_steps_and_at_the_end() -> None:
    assert plan(TRAIN).save_steps == {3, 6}
    assert plan(TRAIN, save_steps=4).save_steps == {4, 6}


def test_one_epoch_is_not_called_epochs() -> None:
    settings = replace(SETTINGS, num_train_epochs=1)
    text = describe_run(LARGE, settings=settings, plan=plan(num_train_epochs=1))
    assert "; 1 epoch at 24 tokens a step" in text


def test_a_position_is_told_in_epochs() -> None:
    run = RunPlan((4, 6), 1, frozenset(), frozenset())
    assert [run.epochs_done(step) for step in (0, 1, 4, 5, 6)] == [0.0, 0.25, 1.0, 1.5, 2.0]
    assert [run.epoch_start(epoch) for epoch in (0, 1)] == [0, 4]


def test_warmup_is_rounded_up() -> None:
    assert plan(TRAIN, warmup_ratio=0.2).num_warmup_steps == 2
    assert plan(TRAIN, warmup_ratio=0.0).num_warmup_steps == 0


def test_the_arithmetic_of_the_run_is_said() -> None:
    text = describe_run(LARGE, settings=SETTINGS, plan=plan())
    assert text.startswith("200 examples, 1,")
    assert f"2 epochs at 24 tokens a step = {plan().num_steps} steps, " in text
    assert "fewer" not in text


def test_few_steps_are_said_with_the_remedy() -> None:
    text = describe_run(TRAIN, settings=SETTINGS, plan=plan(TRAIN))
    assert text.endswith(
        "6 steps, 2 of them warm-up. That is fewer than 50 steps, which is little to learn in: lower "
        "training.tokens_per_step, or raise training.num_train_epochs."
    )


def test_examples_without_a_target_are_refused_by_name() -> None:
    untrained = Example(np.array([1, 2], dtype=np.int32), np.array([True, False]))
    table = Table((TRAIN[0], *[untrained] * 12), ("good", *(f"bad-{i}" for i in range(12))))
    with pytest.raises(DataError, match=r"found no target token in 12 examples \(bad-0, .*bad-9 and 2 more\)"):
        plan(table)


def test_no_example_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="found no example; expected at least one to train on"):
        plan(Table((), ()))


def test_a_stop_ends_the_planning_of_many_epochs() -> None:
    settings = replace(SETTINGS, num_train_epochs=10_000)
    asked: list[None] = []

    def stop_requested() -> bool:
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(Interrupted, match="steps of the training"):
        plan_run(LARGE, settings=settings, has_validation=False, has_metric=False, stop_requested=stop_requested)
    assert len(asked) == 3
