from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from keeptune.errors import Interrupted, KeeptuneError, NonFiniteError, OutOfMemoryError, StorageError
from keeptune.progress import Silent
from keeptune.text.batches import Batch, Step, pack
from keeptune.training.loop import train
from keeptune.training.plan import plan_steps
from keeptune.training.schedule import learning_rate_factor
from keeptune.training.step import Work, accumulate, step_seed, validation_loss
from keeptune.training.tensors import trained_parameters
from keeptune.training.world import SINGLE, World

from .tiny import (
    CPU,
    SETTINGS,
    TRAIN,
    VALIDATION,
    StopAt,
    Table,
    log_without_measures,
    make_model,
    make_table,
    read_events,
    run,
    tiny_loss,
    weights_sha256,
)


def work(model: nn.Module, *, world: World = SINGLE, stop: Callable[[], bool] = lambda: False) -> Work:
    return Work(model, trained_parameters(model), tiny_loss, pack, world, CPU, None, stop)


def on_ranks(size: int, function: Callable[[World], Any]) -> list[Any]:
    """Call the function in one thread a rank and return their results by rank."""
    barrier = threading.Barrier(size)
    slots: list[Tensor] = [torch.empty(0)] * size
    results: list[Any] = [None] * size

    def sum_for(rank: int) -> Callable[[Tensor], Tensor]:
        def sum_over_ranks(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.detach().clone()
            barrier.wait(timeout=20)
            total = torch.stack(slots).sum(dim=0)
            barrier.wait(timeout=20)
            return total

        return sum_over_ranks

    def call(rank: int) -> None:
        try:
            results[rank] = function(World(rank, size, sum_for(rank)))
        except KeeptuneError as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


EIGHT = make_table(8, seed=11)


@pytest.mark.parametrize(
    "micro_batches",
    [
        ((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,)),
        ((0, 1), (2, 3), (4, 5), (6, 7)),
        ((0, 1, 2, 3, 4, 5, 6, 7),),
        ((6, 2, 1), (7,), (0, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_steps_gradient_is_the_same_for_any_micro_batches_and_ranks(
    micro_batches: tuple[tuple[int, ...], ...], size: int
) -> None:
    num_targets = int(EIGHT.num_targets.sum())
    model = make_model(dropout=0.0)
    expected_loss = torch.stack([tiny_loss(model, pack([EIGHT[i]])) for i in range(8)]).sum() / num_targets
    expected_loss.backward()
    expected = gradients(model)
    step = Step(micro_batches, num_tokens=int(EIGHT.lengths.sum()), num_targets=num_targets)

    def on_rank(world: World) -> tuple[Tensor, float]:
        replica = make_model_copy(model)
        accumulated = accumulate(work(replica, world=world), step, table=EIGHT)
        return gradients(replica), accumulated.loss

    for found, loss in on_ranks(size, on_rank):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)
        assert loss == pytest.approx(expected_loss.item(), abs=1e-6)


def make_model_copy(model: nn.Module) -> nn.Module:
    replica = copy.deepcopy(model)
    replica.zero_grad(set_to_none=True)
    return replica


def test_training_equals_a_plain_loop(tmp_path: Path) -> None:
    model, plain = make_model(dropout=0.0), make_model(dropout=0.0)
    run(model, tmp_path, weight_decay=0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    number = 0
    for epoch in range(2):
        for step in plan_steps(TRAIN, settings=SETTINGS, epoch=epoch):
            number += 1
            factor = learning_rate_factor(number, num_steps=6, num_warmup_steps=2, kind="linear", cooldown_fraction=0.2)
            optimizer.param_groups[0]["lr"] = 0.05 * factor
            loss = torch.stack([tiny_loss(plain, pack([TRAIN[i]])) for m in step.micro_batches for i in m]).sum()
            (loss / step.num_targets).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    last = tmp_path / "checkpoints" / "step-6" / "model.safetensors"
    for name, tensor in load_file(last).items():
        assert torch.allclose(tensor, plain.get_parameter(name), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 9])
def test_two_ranks_train_and_resume_as_one(tmp_path: Path, stop_at: int) -> None:
    single = make_model(dropout=0.0)
    run(single, tmp_path / "one")

    stops: list[int | None] = [None, stop_at]

    # Made before the threads start: they share one random state.
    models = [make_model(dropout=0.0) for _ in range(4)]

    def on_rank(world: World) -> str:
        stop = StopAt(stops[world.rank])
        model = models.pop()
        run(model, tmp_path / "two", world=world, stop_requested=stop)
        return weights_sha256(model)

    stopped = on_ranks(2, on_rank)
    assert all(isinstance(error, Interrupted) for error in stopped), stopped
    stops = [None, None]
    first, second = on_ranks(2, on_rank)
    assert first == second
    one, two = log_without_measures(tmp_path / "one"), log_without_measures(tmp_path / "two")
    assert [event["event"] for event in one] == [event["event"] for event in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours.get("record_ids_sha256") == theirs.get("record_ids_sha256")
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), abs=1e-4)


def test_validation_is_the_mean_over_target_tokens_in_evaluation_mode() -> None:
    model = make_model(dropout=0.5).train()
    model.eval()
    with torch.no_grad():
        total = sum(tiny_loss(model, pack([VALIDATION[i]])).item() for i in range(len(VALIDATION)))
    expected = total / int(VALIDATION.num_targets.sum())
    model.train()
    for micro_batches in ([(0, 1, 2, 3)], [(3,), (1, 0), (2,)]):
        assert validation_loss(work(model), VALIDATION, micro_batches=micro_batches) == pytest.approx(expected)
    replicas = [copy.deepcopy(model) for _ in range(2)]

    def on_rank(world: World) -> float:
        return validation_loss(work(replicas[world.rank], world=world), VALIDATION, micro_batches=[(0, 1), (2, 3)])

    assert on_ranks(2, on_rank) == pytest.approx([expected, expected])
    assert model.training and model.dropout.training
    assert math.isnan(validation_loss(work(model), Table((), ()), micro_batches=[]))


def test_every_step_has_a_seed_of_its_own() -> None:
    seeds = {step_seed(seed, step=step, rank=rank) for seed in (0, 1) for step in range(50) for rank in range(4)}
    assert len(seeds) == 400
    assert step_seed(7, step=1, rank=0) == step_seed(7, step=1, rank=0)


def test_the_log_tells_the_run_its_steps_and_its_validations(tmp_path: Path) -> None:
    result = run(make_model(), tmp_path)
    events = read_events(tmp_path)
    assert [e["event"] for e in events] == [
        "run",
        *["step", "step", "validation", "step", "validation"] * 2,
        "finished",
    ]
    assert {key: events[0][key] for key in ("num_examples", "num_steps", "num_warmup_steps", "tokens_per_step")} == {
        "num_examples": 12,
        "num_steps": 6,
        "num_warmup_steps": 2,
        "tokens_per_step": 24,
    }
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert sum(event["num_tokens"] for event in steps) == result.num_train_tokens == 2 * int(TRAIN.lengths.sum())
    assert sum(event["num_targets"] for event in steps) == result.num_target_tokens
    assert steps[-1]["elapsed_seconds"] == result.train_seconds
    assert len({event["record_ids_sha256"] for event in steps}) == 6
    assert events[-1]["validation"] == [
        {key: event[key] for key in ("step", "epoch", "loss")} | {"metric": None}
        for event in events
        if event["event"] == "validation"
    ]


def test_the_result_counts_epochs_tokens_and_time(tmp_path: Path) -> None:
    result = run(make_model(), tmp_path)
    assert (result.num_steps, result.num_epochs_done, result.stopped_early) == (6, 2.0, False)
    assert result.best_value == min(v.loss for v in result.validation)
    assert result.tokens_per_second == result.num_train_tokens / result.train_seconds
    assert result.peak_memory_bytes > 10_000_000


def test_frozen_weights_do_not_move(tmp_path: Path) -> None:
    model, before = make_model(frozen=True), make_model(frozen=True)
    run(model, tmp_path)
    assert torch.equal(model.embedding.weight, before.embedding.weight)
    assert not torch.equal(model.hidden.weight, before.hidden.weight)


def test_weight_decay_leaves_out_biases_and_norms(tmp_path: Path) -> None:
    model, plain = make_model(dropout=0.0), make_model(dropout=0.0)
    for m, weight_decay, name in ((model, 0.9, "a"), (plain, 0.0, "b")):
        run(m, tmp_path / name, num_train_epochs=1, tokens_per_step=1000, weight_decay=weight_decay)
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert torch.equal(model.head.bias, plain.head.bias)
    assert not torch.equal(model.head.weight, plain.head.weight)


def test_the_gradient_is_clipped_and_logged_before_clipping(tmp_path: Path) -> None:
    run(make_model(), tmp_path / "a", max_grad_norm=1e-3, adam_epsilon=1.0)
    run(make_model(), tmp_path / "b", max_grad_norm=1e3, adam_epsilon=1.0)
    clipped, free = read_events(tmp_path / "a"), read_events(tmp_path / "b")
    assert clipped[1]["grad_norm"] == free[1]["grad_norm"] > 0.1
    assert clipped[2]["loss"] != free[2]["loss"]


@pytest.mark.parametrize("where", ["both", "loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path, where: str) -> None:
    def bad_loss(model: nn.Module, batch: Batch) -> Tensor:
        loss = tiny_loss(model, batch)
        if (tmp_path / "events.jsonl").read_text().count('"step"') and 5 in batch.input_ids:
            return {
                "both": loss * math.nan,
                "loss": loss + math.nan,
                "gradient": loss + (model.head.bias - model.head.bias).sqrt().sum(),  # pyright: ignore
            }[where]
        return loss

    model = make_model()
    message = (
        r"step \d: found a loss of .* with the records record-\d.*; expected finite numbers. The weights are those"
    )
    with pytest.raises(NonFiniteError, match=message) as caught:
        run(model, tmp_path, loss=bad_loss, save_steps=1)
    events = read_events(tmp_path)
    number = events[-1]["step"]
    assert events[-1]["event"] == "non_finite" and f"step {number}:" in str(caught.value)
    assert all(record_id in str(caught.value) for record_id in events[-1]["record_ids"][:10])
    if where != "gradient":
        ids = events[-1]["record_ids"]
        assert any(5 in TRAIN[TRAIN.record_ids.index(record_id)].input_ids for record_id in ids) and len(ids) <= 3
    saved = load_file(tmp_path / "checkpoints" / f"step-{number - 1}" / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(NonFiniteError, match=f"step {number}: "):
        run(make_model(), tmp_path, loss=bad_loss, save_steps=1)


def test_every_rank_stops_at_a_loss_that_is_not_finite_on_one(tmp_path: Path) -> None:
    def on_rank(world: World) -> None:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return tiny_loss(model, batch) * (math.inf if world.rank == 1 else 1.0)

        run(make_model(dropout=0.0), tmp_path, world=world, loss=loss)

    errors = on_ranks(2, on_rank)
    assert [type(error) for error in errors] == [NonFiniteError, NonFiniteError]


def test_patience_stops_the_run_and_the_best_weights_stay(tmp_path: Path) -> None:
    values = iter([0.1, 0.9, 0.5, 0.6, 0.7, 0.8])
    snapshots: list[str] = []

    def validate(model: nn.Module) -> float:
        snapshots.append(weights_sha256(model))
        return next(values)

    model = make_model()
    result = run(
        model,
        tmp_path,
        num_train_epochs=6,
        select_by="f1",
        validate=validate,
        higher_is_better=True,
        patience=2,
    )
    assert (result.num_epochs_done, result.stopped_early, result.best_value) == (4.0, True, 0.9)
    assert weights_sha256(model) == snapshots[1]
    again = make_model()
    assert run(
        again, tmp_path, num_train_epochs=6, select_by="f1", validate=validate, higher_is_better=True, patience=2
    )
    assert weights_sha256(again) == snapshots[1] and len(snapshots) == 4
    names = [v["metric"] for v in read_events(tmp_path) if v["event"] == "validation"]
    assert names == [None, "f1"] * 4


def test_where_the_metric_never_moves_the_weights_with_the_lowest_loss_stay(tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    result = run(
        make_model(),
        tmp_path,
        learning_rate=1e-3,
        select_by="f1",
        validate=lambda _: 0.0,
        higher_is_better=True,
        progress=Listener(),
    )
    ends = [v for v in result.validation if v.metric is not None]
    lowest = min(ends, key=lambda v: v.loss)
    assert len(ends) > 1 and lowest is not ends[0]
    assert (result.best_step, result.best_value, result.best_loss) == (lowest.step, 0.0, lowest.loss)
    assert not result.metric_moved
    assert any(line.startswith(f"f1 was 0.000 at all {len(ends)} validations, so the validation loss") for line in said)
    assert read_events(tmp_path)[-1]["metric_moved"] is False


def test_a_validation_that_is_not_finite_changes_nothing_and_is_never_best(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return tiny_loss(model, batch) * (1.0 if model.training else math.nan)

    said: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    model, plain = make_model(), make_model()
    result = run(model, tmp_path / "a", loss=loss, progress=Listener())
    assert (result.best_step, result.best_value) == (6, None)
    assert said[-1] == "No validation gave a finite value: the weights of the last step are kept as the best."
    run(plain, tmp_path / "b", validation_table=Table((), ()))
    assert weights_sha256(model) == weights_sha256(plain)
    validations = [event for event in read_events(tmp_path / "a") if event["event"] == "validation"]
    assert [event["loss"] for event in validations] == [None] * 4
    assert not [event for event in read_events(tmp_path / "b") if event["event"] == "validation"]


def test_a_lack_of_memory_names_step_and_setting(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match=r"step 1: found too little memory for micro-batches of 10 tokens"):
        run(make_model(), tmp_path, loss=loss)


def test_a_folder_that_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    stop = StopAt()
    with pytest.raises(StorageError, match="checkpoints: "):
        run(make_model(), tmp_path, stop_requested=stop)
    assert stop.num_polls == 0


def test_progress_counts_the_tokens_of_each_epoch(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    said: list[str] = []

    class Listener(Silent):
        def start(self, title: str, *, total: int, unit: str) -> None:
            calls.append((title, total, unit))

        def advance(self, count: int = 1, *, note: str = "") -> None:
            calls.append((count, note.split(",")[0]))

        def say(self, text: str) -> None:
            calls.append((text[:11],))
            said.append(text)

    with pytest.raises(Interrupted):
        run(make_model(), tmp_path, progress=Listener(), stop_requested=StopAt(8))
    run(make_model(), tmp_path, progress=Listener())
    total = int(TRAIN.lengths.sum())
    num_steps = int(re.findall(r"Going on after step (\d+)", "\n".join(said))[0])
    starts = [call for call in calls if len(call) == 3]
    done = sum(call[0] for call in calls[: calls.index(("12 examples",), 1)] if len(call) == 2)
    assert starts == [
        ("Epoch 1 of 2", total, "tokens"),
        (f"Epoch 1 of 2, from step {num_steps + 1}", total - done, "tokens"),
        ("Epoch 2 of 2", total, "tokens"),
    ]
    assert sum(call[0] for call in calls if len(call) == 2) == 2 * total


def test_each_step_and_each_validation_says_which_loss_it_shows(tmp_path: Path) -> None:
    notes: list[str] = []
    said: list[str] = []

    class Listener(Silent):
        def advance(self, count: int = 1, *, note: str = "") -> None:
            notes.append(note)

        def say(self, text: str) -> None:
            said.append(text)

    result = run(make_model(), tmp_path, progress=Listener(), validate=lambda _: 0.25, select_by="rougeL")
    assert re.fullmatch(r"step 1, mean train loss \d+\.\d{3}", notes[0])
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "step" and 1.0 < line["epoch"] <= 2.0]
    mean = sum(s["loss"] * s["num_targets"] for s in steps) / sum(s["num_targets"] for s in steps)
    assert notes[steps[-1]["step"] - 1] == f"step {steps[-1]['step']}, mean train loss {mean:.3f}"
    expected = [
        f"After step {v.step}: validation loss {v.loss:.3f}" + ("" if v.metric is None else ", validation rougeL 0.250")
        for v in result.validation
    ]
    assert any("rougeL" in line for line in expected)
    assert [line for line in said if line.startswith("After")] == expected


def test_mixed_precision_reaches_the_loss_and_no_weight(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.add(model(torch.from_numpy(batch.input_ids)).dtype)
        return tiny_loss(model, batch)

    model = make_model()
    train(
        model=model,
        train_table=TRAIN,
        validation_table=VALIDATION,
        loss=loss,
        collate=pack,
        settings=SETTINGS,
        folder=tmp_path,
        validate=None,
        higher_is_better=False,
        world=SINGLE,
        device=CPU,
        autocast=torch.bfloat16,
        progress=Silent(),
        stop_requested=lambda: False,
        run_key="key",
    )
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["event"] == "run"
