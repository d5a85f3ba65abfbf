"""The batch half of the laws "Packing" and "Step": order, budgets, and what a batch holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.text.batches import (
    NOT_TRAINED,
    Layout,
    Step,
    auto_tokens_per_step,
    epoch_order,
    pack,
    pad,
    pad_pairs,
    plan_epoch,
)
from keeptune.text.tokens import Example

EXAMPLES = [
    Example(np.array([1, 5, 6, 2], np.int32), np.array([False, False, True, True])),
    Example(np.array([1, 7, 2], np.int32), np.array([False, True, True])),
]


def plan(
    lengths: list[int], *, layout: Layout = "packed", per_step: int, per_micro_batch: int, **kw: int
) -> list[Step]:
    sizes = np.array(lengths, dtype=np.int64)
    return list(
        plan_epoch(
            sizes,
            sizes // 2,
            seed=kw.get("seed", 0),
            epoch=kw.get("epoch", 0),
            tokens_per_step=per_step,
            tokens_per_micro_batch=per_micro_batch,
            layout=layout,
        )
    )


def flat(step: Step) -> list[int]:
    return [index for group in step.micro_batches for index in group]


def test_a_pack_is_the_examples_end_to_end() -> None:
    batch = pack(EXAMPLES)
    assert batch.input_ids.tolist() == [1, 5, 6, 2, 1, 7, 2]
    assert batch.labels.tolist() == [-100, -100, 6, 2, -100, 7, 2]
    assert batch.lengths.tolist() == [4, 3]
    assert batch.packed and batch.label_lengths is None
    assert batch.num_targets == 4
    assert batch.input_ids.dtype == batch.labels.dtype == batch.lengths.dtype == np.int64


def test_the_first_token_of_an_example_never_carries_loss() -> None:
    trained = [Example(np.array([3, 4], np.int32), np.array([True, True]))] * 2
    assert pack(trained).labels.tolist() == [-100, 4, -100, 4]
    assert pad(trained, pad_id=0).labels.tolist() == [[-100, 4], [-100, 4]]
    assert trained[0].loss_mask.tolist() == [True, True]


def test_padding_is_masked_by_length_even_where_the_pad_token_is_the_end_token() -> None:
    batch = pad(EXAMPLES, pad_id=2)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 7, 2, 2]]
    assert batch.labels.tolist() == [[-100, -100, 6, 2], [-100, 7, 2, -100]]
    assert batch.lengths.tolist() == [4, 3]
    assert not batch.packed and batch.num_targets == 4


def test_pairs_are_encoder_rows_and_label_rows() -> None:
    batch = pad_pairs(EXAMPLES, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5], [1, 0]]
    assert batch.labels.tolist() == [[6, 2], [7, 2]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.label_lengths is not None and batch.label_lengths.tolist() == [2, 2]
    longer = Example(np.array([1, 8, 9, 2], np.int32), np.array([False, True, True, True]))
    assert pad_pairs([EXAMPLES[1], longer], pad_id=0).labels.tolist() == [[7, 2, NOT_TRAINED], [8, 9, 2]]


def test_the_order_is_that_of_a_written_down_generator() -> None:
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 6, 4, 0, 7, 5, 2, 1]
    assert sorted(epoch_order(100, seed=3, epoch=1).tolist()) == list(range(100))
    assert epoch_order(100, seed=3, epoch=1).tolist() != epoch_order(100, seed=3, epoch=2).tolist()
    assert epoch_order(100, seed=3, epoch=1).tolist() != epoch_order(100, seed=4, epoch=1).tolist()


def test_the_order_ignores_the_global_generator() -> None:
    np.random.seed(1)
    first = epoch_order(50, seed=0, epoch=0).tolist()
    np.random.seed(2)
    assert epoch_order(50, seed=0, epoch=0).tolist() == first


def test_a_short_last_step_joins_the_one_before_it() -> None:
    assert [step.num_tokens for step in plan([10] * 9, per_step=40, per_micro_batch=40)] == [40, 50]
    assert [step.num_tokens for step in plan([10] * 10, per_step=40, per_micro_batch=40)] == [40, 40, 20]
    assert [step.num_tokens for step in plan([10], per_step=40, per_micro_batch=40)] == [10]


def test_an_example_longer_than_the_budget_stands_alone() -> None:
    steps = plan([100, 100], per_step=40, per_micro_batch=20)
    assert [step.micro_batches for step in steps] in ([((0,),), ((1,),)], [((1,),), ((0,),)])


def test_no_examples_make_no_steps() -> None:
    assert plan([], per_step=40, per_micro_batch=40) == []


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    layout=st.sampled_from(["packed", "padded", "pairs"]),
    per_step=st.integers(1, 200),
    per_micro_batch=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
)
def test_every_example_stands_in_exactly_one_step_within_its_budgets(
    lengths: list[int], layout: Layout, per_step: int, per_micro_batch: int, seed: int, epoch: int
) -> None:
    arguments = {"per_step": per_step, "per_micro_batch": per_micro_batch, "seed": seed, "epoch": epoch}
    steps = plan(lengths, layout=layout, **arguments)
    assert sorted(index for step in steps for index in flat(step)) == list(range(len(lengths)))
    order = epoch_order(len(lengths), seed=seed, epoch=epoch).tolist()
    place = 0
    for number, step in enumerate(steps):
        members = order[place : place + len(flat(step))]
        place += len(members)
        assert flat(step) == members if layout == "packed" else sorted(flat(step)) == sorted(members)
        assert step.num_tokens == sum(lengths[i] for i in members)
        assert step.num_targets == sum(lengths[i] // 2 for i in members)
        cap = per_step if number < len(steps) - 1 else 1.5 * per_step
        assert (
            step.num_tokens <= cap or len(members) == 1 or (number == len(steps) - 1 and lengths[members[0]] > per_step)
        )
        for group in step.micro_batches:
            assert len(group) == 1 or held_tokens([lengths[i] for i in group], layout=layout) <= per_micro_batch
    assert plan(lengths, layout=layout, **arguments) == steps


def held_tokens(lengths: list[int], *, layout: Layout) -> int:
    if layout == "packed":
        return sum(lengths)
    if layout == "padded":
        return len(lengths) * max(lengths)
    return len(lengths) * (max(n - n // 2 for n in lengths) + max(n // 2 for n in lengths))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), per_micro_batch=st.integers(1, 100))
def test_the_micro_batch_budget_moves_no_example_to_another_step(lengths: list[int], per_micro_batch: int) -> None:
    fine = plan(lengths, per_step=100, per_micro_batch=1)
    assert [flat(step) for step in plan(lengths, per_step=100, per_micro_batch=per_micro_batch)] == [
        flat(step) for step in fine
    ]
    assert [step.num_targets for step in fine] == [
        step.num_targets for step in plan(lengths, layout="padded", per_step=100, per_micro_batch=per_micro_batch)
    ]


@pytest.mark.parametrize(
    ("num_examples", "mean", "expected"), [(1000, 100, 3000), (500, 100, 1500), (100_000, 100, 8192), (20, 100, 200)]
)
def test_small_data_get_small_steps(num_examples: int, mean: int, expected: int) -> None:
    lengths = np.full(num_examples, mean, dtype=np.int64)
    assert auto_tokens_per_step(lengths, num_epochs=3) == expected


def test_five_hundred_examples_get_at_least_fifty_steps() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, size=500)
    per_step = auto_tokens_per_step(lengths, num_epochs=3)
    steps = plan(lengths.tolist(), per_step=per_step, per_micro_batch=8192)
    assert 3 * len(steps) >= 50


def test_without_examples_the_step_has_its_largest_size() -> None:
    assert auto_tokens_per_step(np.zeros(0, dtype=np.int64), num_epochs=3, at_most=512) == 512


def test_a_plan_goes_on_after_the_steps_that_are_done() -> None:
    lengths = np.arange(1, 60)
    whole = plan_epoch(
        lengths, lengths, seed=1, epoch=0, tokens_per_step=100, tokens_per_micro_batch=50, layout="packed"
    )
    rest = whole.after(3)
    assert list(rest) == list(whole)[3:] == whole[3:]
    assert rest.num_tokens == sum(step.num_tokens for step in rest) < whole.num_tokens == int(lengths.sum())
    assert (len(rest), whole[-1]) == (len(whole) - 3, list(whole)[-1])
