"""The mixture of task and replay: its share of tokens, its order, what is counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.errors import DataError
from keeptune.text.batches import pack, pad, pad_pairs
from keeptune.text.mixture import Chosen, Mixed, Mixture, Share, choose_replay, first_epoch, task_shares
from keeptune.text.tokens import Example, Examples, Teacher
from keeptune.training.plan import describe_run, plan_run, plan_steps, run_event
from tests.training.tiny import SETTINGS, TRAIN, Table, make_table

POOL = make_table(50, seed=21, name="general")


def mixed(task: Table, pool: Table, *, fraction: float, seed: int = 0) -> Mixed:
    return Mixed(task, choose_replay(task, pool, fraction=fraction, seed=seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.floats(0.001, 0.9), st.integers(0, 5))
def test_the_share_of_tokens_is_met_within_one_example(
    num_task: int, num_pool: int, fraction: float, seed: int
) -> None:
    task, pool = make_table(num_task, seed=seed), make_table(num_pool, seed=seed + 1)
    table = mixed(task, pool, fraction=fraction, seed=seed)
    task_tokens = int(task.lengths.sum())
    assert len(table) > num_task
    without_last = int(table.lengths[:-1].sum()) - task_tokens
    assert without_last < fraction / (1 - fraction) * task_tokens + 1e-6 <= table.num_replay_tokens + 2e-6
    assert table.num_replay_tokens == int(table.lengths.sum()) - task_tokens


def test_the_task_stays_what_it_is_and_every_example_keeps_its_id() -> None:
    table = mixed(TRAIN, POOL, fraction=0.3)
    assert table.record_ids[:12] == list(TRAIN.record_ids)
    for i, record_id in enumerate(table.record_ids):
        source = TRAIN if record_id.startswith("record") else POOL
        expected = source[source.record_ids.index(record_id)]
        assert table[i] is expected and table.lengths[i] == len(expected.input_ids)
        assert table.num_targets[i] == expected.loss_mask[1:].sum()


def test_the_seed_alone_chooses_and_more_replay_begins_with_the_same() -> None:
    first, again = (mixed(TRAIN, POOL, fraction=0.2, seed=3).record_ids for _ in range(2))
    assert first == again != mixed(TRAIN, POOL, fraction=0.2, seed=4).record_ids
    more = mixed(TRAIN, POOL, fraction=0.3, seed=3).record_ids
    assert more[: len(first)] == first and len(more) > len(first)
    assert len(set(more)) == len(more)


def test_a_small_pool_is_repeated_from_its_start_and_the_repeats_are_counted() -> None:
    pool = make_table(3, seed=5, name="general")
    table = mixed(TRAIN, pool, fraction=0.5)
    replay = table.record_ids[12:]
    assert replay[:3] == replay[3:6] and len(set(replay[:3])) == 3
    assert (len(replay), table.num_repeats) == (len(replay), len(replay) - 3)
    assert table.num_repeats > 3
    assert mixed(TRAIN, POOL, fraction=0.2).num_repeats == 0


def test_a_whole_number_of_passes_adds_nothing_to_it() -> None:
    pool = Table(TRAIN.examples, tuple(f"general-{i}" for i in range(12)))
    assert len(mixed(TRAIN, pool, fraction=0.5)) == 24
    assert len(mixed(TRAIN, pool, fraction=2 / 3)) == 36


def test_the_smallest_share_is_one_example() -> None:
    table = mixed(TRAIN, POOL, fraction=1e-9)
    assert (len(table), table.num_repeats) == (13, 0)


def test_replay_is_shuffled_with_the_task_in_every_epoch() -> None:
    table = mixed(TRAIN, POOL, fraction=0.4)
    orders = []
    for epoch in (0, 1):
        steps = plan_steps(table, settings=SETTINGS, epoch=epoch)
        orders.append([i for step in steps for micro_batch in step.micro_batches for i in micro_batch])
        assert sorted(orders[-1]) == list(range(len(table)))
        is_replay = [i >= 12 for i in orders[-1]]
        assert True in is_replay[:8] and True in is_replay[-8:]
    assert orders[0] != orders[1]


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(DataError, match=r"replay: found no text; expected at least one .* or set replay_fraction=0\."):
        choose_replay(TRAIN, Table((), ()), fraction=0.1, seed=0)


def teacher(num_targets: int, *, start: int) -> Teacher:
    ids = np.arange(start, start + num_targets, dtype=np.int32)[:, None]
    return Teacher(ids, log_probs=np.stack([ids[:, 0], -ids[:, 0]], axis=1).astype(np.float32))


def test_each_different_example_gets_its_teacher_wherever_it_stands_again() -> None:
    pool = make_table(3, seed=5, name="general")
    replay = choose_replay(TRAIN, pool, fraction=0.5, seed=0)
    different = replay.first(replay.num_distinct)
    assert (len(different), len(set(different.record_ids))) == (3, 3)
    teachers = [teacher(int(n), start=10 * i) for i, n in enumerate(different.num_targets)]
    table = Mixed(TRAIN, replay.taught(teachers))
    assert all(table[i].teacher is None for i in range(12))
    for i in range(12, len(table)):
        expected = teachers[different.record_ids.index(table.record_ids[i])]
        assert table[i].teacher is expected
        assert np.array_equal(table[i].input_ids, replay[i - 12].input_ids)
    assert replay[0].teacher is None


EXAMPLES = [
    Example(np.array([1, 5, 6, 2], np.int32), np.array([False, False, True, True])),
    Example(np.array([1, 7, 2], np.int32), np.array([False, True, True])),
    Example(np.array([1, 8, 2], np.int32), np.array([False, False, True])),
]


def test_a_batch_has_the_teachers_in_the_order_of_its_targets() -> None:
    taught = Chosen(
        Table(tuple(EXAMPLES), ("a", "b", "c")), np.array([2, 0]), teachers=[teacher(1, start=5), teacher(2, start=7)]
    )
    given = [taught[0], EXAMPLES[1], taught[1]]
    for batch in (pack(given), pad(given, pad_id=0), pad_pairs(given, pad_id=0)):
        assert batch.num_targets == 5
        assert batch.teacher is not None and batch.teacher_rows is not None
        assert batch.teacher_rows.tolist() == [0, 3, 4]
        assert batch.teacher.ids[:, 0].tolist() == [5, 7, 8]
        assert batch.teacher.log_probs[:, 1].tolist() == [-5, -7, -8]
    plain = pack(EXAMPLES)
    assert plain.teacher is None and plain.teacher_rows is None


def test_a_teacher_of_another_example_is_our_own_mistake() -> None:
    taught = Chosen(Table(tuple(EXAMPLES), ("a", "b", "c")), np.array([0]), teachers=[teacher(1, start=5)])
    with pytest.raises(AssertionError, match="a row for each target"):
        pack([taught[0]])


def shown(table: Examples, *, num_epochs: int) -> list[Counter[str]]:
    """Return how often each record stands in each epoch, as the steps of training have it."""
    found = []
    for epoch in range(num_epochs):
        steps = plan_steps(table, settings=SETTINGS, epoch=epoch)
        found.append(Counter(table.record_ids[i] for step in steps for group in step.micro_batches for i in group))
    return found


def tasks_of(*sizes: int, shares: Sequence[Share], seed: int = 0) -> Mixture:
    tables = [make_table(size, seed=i, name=f"t{i}") for i, size in enumerate(sizes)]
    table = Table(
        tuple(e for t in tables for e in t.examples), tuple(record_id for t in tables for record_id in t.record_ids)
    )
    return Mixture(table, tasks=np.repeat(np.arange(len(sizes)), sizes), shares=shares, seed=seed)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, {"a": 9000, "b": 1000, "c": 10}),
        ({"cap": 3000}, {"a": 3000, "b": 1000, "c": 10}),
        # Of 4,010, as 54.77 : 31.62 : 3.16.
        ({"cap": 3000, "temperature": 2.0}, {"a": 2452, "b": 1416, "c": 142}),
        ({"temperature": math.inf}, {"a": 3337, "b": 3337, "c": 3337}),
        ({"cap": 300, "temperature": math.inf}, {"a": 203, "b": 203, "c": 203}),
        ({"weights": {"a": 1, "b": 0.5, "c": 2.5}}, {"a": 2502, "b": 1251, "c": 6256}),
    ],
)
def test_an_epoch_is_shared_out_by_the_rule(rule: dict[str, Any], expected: dict[str, int]) -> None:
    shares = task_shares({"a": 9000, "b": 1000, "c": 10}, **rule)
    assert {share.source: share.num_per_epoch for share in shares} == expected


def test_a_task_has_one_example_of_an_epoch_at_least_and_none_where_it_has_no_record() -> None:
    shares = task_shares({"large": 100_000, "small": 1, "none": 0}, weights={"large": 1e6, "small": 1, "none": 5})
    assert [share.num_per_epoch for share in shares] == [100_001, 1, 0]
    table = tasks_of(4, 1, 0, shares=task_shares({"t0": 4, "t1": 1, "t2": 0}, temperature=math.inf))
    assert sum(shown(table, num_epochs=1)[0].values()) == 4


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 12), st.integers(0, 5))
def test_no_record_is_shown_once_more_before_all_of_its_task_were(
    num_examples: int, num_per_epoch: int, num_epochs: int, seed: int
) -> None:
    share = Share("t0", num_examples, num_per_epoch)
    table = tasks_of(num_examples, shares=[share], seed=seed)
    total: Counter[str] = Counter(dict.fromkeys(table.record_ids, 0))
    for counts in shown(table, num_epochs=num_epochs):
        assert sum(counts.values()) == num_per_epoch
        # An epoch repeats only what it cannot do without.
        assert sum(counts.values()) - len(counts) == share.num_repeats
        total += counts
        times = [total[record_id] for record_id in table.record_ids]
        assert max(times) - min(times) <= 1
    never_shown = sum(total[record_id] == 0 for record_id in table.record_ids)
    assert never_shown == share.num_never_shown(num_epochs=num_epochs)


def test_an_epoch_depends_on_the_seed_and_its_number_alone() -> None:
    shares = [Share("a", 40, 15), Share("b", 10, 25)]
    table = tasks_of(40, 10, shares=shares)
    # Asked out of order, as a run that goes on asks.
    late = [table.epoch(epoch).tolist() for epoch in (3, 1, 0, 2)]
    again = tasks_of(40, 10, shares=shares)
    assert [again.epoch(epoch).tolist() for epoch in (0, 1, 2, 3)] == [late[2], late[1], late[3], late[0]]
    assert late[2] != late[1] != late[0]
    assert tasks_of(40, 10, shares=shares, seed=1).epoch(0).tolist() != late[2]


def test_a_further_task_leaves_the_draws_of_the_others_as_they_are() -> None:
    of_a = tasks_of(40, shares=[Share("a", 40, 15)]).epoch(1)
    # Before it, so that it has another number.
    table = tasks_of(30, 40, shares=[Share("b", 30, 7), Share("a", 40, 15)])
    assert table.epoch(1)[7:].tolist() == (of_a + 30).tolist()
    assert len(table.epoch(1)) == 22 and max(table.epoch(1)[:7]) < 30


def test_what_is_said_of_a_run_is_that_of_an_epoch() -> None:
    table = tasks_of(40, 10, shares=[Share("a", 40, 15), Share("b", 10, 25)])
    plan = plan_run(table, settings=SETTINGS, has_validation=False, has_metric=False)
    event = run_event(train_table=table, num_validation_examples=0, settings=SETTINGS, plan=plan)
    members = table.epoch(0)
    assert (event.num_examples, event.mixture) == (40, table.shares)
    assert event.num_tokens == table.lengths[members].sum() and event.num_targets == table.num_targets[members].sum()
    assert describe_run(table, settings=SETTINGS, plan=plan).startswith(f"40 examples, {event.num_tokens} tokens")
    steps = [step for epoch in (0, 1) for step in plan_steps(table, settings=SETTINGS, epoch=epoch)]
    assert plan.num_steps == len(steps)
    plain = run_event(train_table=TRAIN, num_validation_examples=0, settings=SETTINGS, plan=plan)
    assert (plain.num_examples, plain.mixture) == (12, ())


def test_replay_beside_a_mixture_is_the_same_in_every_epoch_and_counted_with_it() -> None:
    tasks = tasks_of(40, 10, shares=[Share("a", 40, 15), Share("b", 10, 25)])
    replay = choose_replay(first_epoch(tasks), make_table(30, seed=9, name="general"), fraction=0.3, seed=0)
    table = Mixed(tasks, replay)
    of_epochs = shown(table, num_epochs=2)
    general = [{key: n for key, n in counts.items() if key.startswith("general")} for counts in of_epochs]
    assert general[0] == general[1] and sum(general[0].values()) == len(replay)
    assert [sum(counts.values()) for counts in of_epochs] == [40 + len(replay)] * 2
    assert table.shares == (*tasks.shares, Share("(replay)", 30, len(replay), is_fixed=True))
    assert table.shares[-1].num_repeats == table.num_repeats
    assert table.shares[-1].num_never_shown(num_epochs=9) == 30 - replay.num_distinct
