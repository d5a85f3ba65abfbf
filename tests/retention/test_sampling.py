"""Texts of the base model: drawn from its own distribution, the same for one seed, without loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keeptune.errors import Interrupted
from keeptune.model.load import load_model
from keeptune.progress import Silent
from keeptune.retention.sampling import Written, write_texts
from keeptune.text.tokenizer import Tokenizer
from tests.stages.world import llama, t5


def written(model: Any, tokenizer: Tokenizer, **arguments: Any) -> Written:
    settings = {
        "prompts": [[5]],
        "num_texts": 70,
        "num_tokens": 6,
        "stop_ids": [tokenizer.eos_id],
        "seed": (0,),
        "progress": Silent(),
        "stop_requested": lambda: False,
    }
    return write_texts(model, tokenizer=tokenizer, **(settings | arguments))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    folder = llama(tmp_path_factory.mktemp("model"))
    return load_model(folder, device=torch.device("cpu"), dtype=torch.float32), Tokenizer.load(folder)


def test_a_seed_decides_every_token_and_the_global_state_stays(pair: tuple[Any, Tokenizer]) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two, other = written(*pair), written(*pair), written(*pair, seed=(1,))
    assert torch.equal(before, torch.random.get_rng_state())
    assert one == two and one.rows != other.rows
    assert len(one.rows) == len(one.prompts) == 70


def test_fewer_texts_are_the_first_of_more(pair: tuple[Any, Tokenizer]) -> None:
    assert written(*pair, num_texts=9).rows == written(*pair).rows[:9]


def test_texts_end_at_the_stop_token_and_keep_it(pair: tuple[Any, Tokenizer]) -> None:
    model, _ = pair
    every = list(range(model.config.vocab_size))
    assert all(len(row) == 1 for row in written(*pair, stop_ids=every).rows)
    rows = written(*pair, num_tokens=12, stop_ids=every[::20]).rows
    assert all(token % 20 for row in rows for token in row[:-1])
    assert any(row[-1] % 20 == 0 and len(row) < 12 for row in rows)


def test_tokens_are_drawn_from_the_models_own_distribution(pair: tuple[Any, Tokenizer]) -> None:
    model, _ = pair
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5]])).logits[0, -1].double().softmax(-1).numpy()
    first = [row[0] for row in written(*pair, num_texts=4_000, num_tokens=1).rows]
    counts = np.bincount(first, minlength=len(expected))
    # Pearson's statistic has mean V - 1 and variance 2 (V - 1) under the null hypothesis.
    degrees = len(expected) - 1
    statistic = float(((counts - 4_000 * expected) ** 2 / (4_000 * expected)).sum())
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


def test_an_encoder_reads_the_prompts_in_turn(tmp_path: Path) -> None:
    folder = t5(tmp_path / "t5")
    model, tokenizer = load_model(folder, device=torch.device("cpu"), dtype=torch.float32), Tokenizer.load(folder)
    found = written(model, tokenizer, prompts=[[5, 6, 7], [8]], num_texts=5, stop_ids=[tokenizer.eos_id])
    assert found.prompts == [[5, 6, 7], [8], [5, 6, 7], [8], [5, 6, 7]]
    assert all(0 < len(row) <= 6 for row in found.rows)


def test_texts_that_loop_are_left_out_and_counted(pair: tuple[Any, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = written(*pair, num_texts=4).rows
    seen = iter([True, False, True, False, False])
    monkeypatch.setattr("keeptune.retention.sampling.loops", lambda _: next(seen, False))
    found = written(*pair, num_texts=2)
    assert found.rows == [plain[1], plain[3]] and found.num_loops == 2


def test_a_model_that_only_loops_is_given_up(pair: tuple[Any, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.retention.sampling.loops", lambda _: True)
    found = written(*pair, num_texts=64)
    assert found.rows == [] and found.num_loops == 3 * 64


def test_a_request_to_stop_ends_the_writing(pair: tuple[Any, Tokenizer]) -> None:
    with pytest.raises(Interrupted, match=r"texts: stopped on request; those in progress are lost"):
        written(*pair, stop_requested=lambda: True)


class Told(Silent):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.lines: list[str] = []

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self.counts.append(count)

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_how_long_it_will_take_is_said_before_it_was_taken_and_texts_are_counted_as_they_grow(
    pair: tuple[Any, Tokenizer],
) -> None:
    ticks = iter(range(10_000))
    told = Told()
    found = written(*pair, num_texts=70, num_tokens=12, stop_ids=[-1], progress=told, clock=lambda: 0.5 * next(ticks))
    # Two batches of 12 tokens, half a second each.
    assert told.lines == ["The base model writes 70 texts of up to 12 tokens; at most about 12 s"]
    assert len(told.counts) > 2 * 12 and sum(told.counts) == 70
    assert told.counts.index(4) < 5
    assert found == written(*pair, num_texts=70, num_tokens=12, stop_ids=[-1])
