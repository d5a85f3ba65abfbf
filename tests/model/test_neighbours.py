"""A record's loss is its own, whatever stands beside it: layouts that would change it are found out and not used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keeptune.errors import NonFiniteError, RecipeError
from keeptune.evaluation.generate import Decoding, generate, prompts_side_by_side
from keeptune.model.neighbours import layout_of, require_causal
from keeptune.progress import Silent
from tests.families import make_family
from tests.model.tiny import CONFIGS, make_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17], [5, 6, 7]]


def answers(model: nn.Module, *, side_by_side: str, tokens_per_batch: int) -> list[list[int]]:
    decoding = Decoding(6, (), 0, tokens_per_batch, encoder_decoder=False, side_by_side=side_by_side)  # pyright: ignore
    found = generate(model, PROMPTS, decoding=decoding, progress=Silent(), stop_requested=lambda: False)
    return [answer.ids for answer in found]


@pytest.mark.parametrize(
    ("name", "layout", "side_by_side"),
    [
        ("llama", "packed", "padded"),
        ("bloom", "padded", "padded"),
        ("rwkv", "padded", "single"),
        ("roformer", "padded", "equal"),
        ("switch_transformers", "single", "single"),
        ("t5", "pairs", "padded"),
    ],
)
def test_the_fastest_way_that_is_exact_is_chosen(name: str, layout: str, side_by_side: str) -> None:
    model = make_family(name)
    found = layout_of(model, through_logits=False, longest=30)
    assert found == layout
    assert prompts_side_by_side(model, layout=found, longest=30) == side_by_side


@pytest.mark.parametrize(("longest", "layout"), [(16, "packed"), (17, "single")])
def test_longrope_is_batched_up_to_the_length_at_which_it_changes(longest: int, layout: str) -> None:
    model = make_family("phi3/longrope")
    assert layout_of(model, through_logits=False, longest=longest) == layout


@pytest.mark.parametrize("name", ["rwkv", "roformer"])
def test_the_batch_size_changes_no_answer_of_a_model_that_does_not_ignore_padding(name: str) -> None:
    model = make_family(name)
    side_by_side = prompts_side_by_side(model, layout="padded", longest=30)
    one_by_one = answers(model, side_by_side=side_by_side, tokens_per_batch=1)
    assert answers(model, side_by_side=side_by_side, tokens_per_batch=1000) == one_by_one
    # Padded, they would be others.
    assert answers(model, side_by_side="padded", tokens_per_batch=1000) != one_by_one


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    with pytest.raises(RecipeError, match="found a BertLMHeadModel that sees the tokens that it is to predict"):
        layout_of(make_family("bert/bidirectional"), through_logits=False, longest=30)
    require_causal(make_family("bert"))
    require_causal(make_family("t5"))


def test_broken_weights_are_found_before_any_training() -> None:
    model = make_model(CONFIGS["llama"])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="found a loss that is not finite on a record of random tokens"):
        layout_of(model, through_logits=False, longest=30)
