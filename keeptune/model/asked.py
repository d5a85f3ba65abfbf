"""A saved model is asked as its card says, through its own template and tokenizer, and must answer as it was scored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import GenerationConfig

from keeptune.errors import RecipeError, StorageError
from keeptune.model.attention import base_of
from keeptune.model.load import FAILURES, load_tokenizer
from keeptune.model.modes import evaluating
from keeptune.text.chat import with_fixed_date

_REMEDY = (
    "Whoever serves this folder would not get the answers that are scored. Report this with the model's name; until "
    "then choose another template (data.template) or model."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A record's prompt as messages and as the ids that evaluation reads, and the trained model's greedy answer to it.

    `tools` are the functions that the prompt names. `answer_ids` has no end token, and `max_new_tokens` ids at most.
    """

    origin: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    max_new_tokens: int


def require_same_prompts(folder: Path, asked: Sequence[Asked], *, chat_template: str) -> None:
    """Hold the ids of prompts against those of transformers with the tokenizer in `folder`.

    Raises:
        RecipeError: they differ.
    """
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.chat_template = with_fixed_date(chat_template)
    for question in asked:
        if difference := _difference(tokenizer, question):
            raise RecipeError(
                f"{folder}: found that transformers reads the prompt of {question.origin} as other tokens than "
                f"keeptune ({difference}); expected the same, since servers read transformers' tokens. "
                "Choose another template (data.template) or model, and report this with the model's name."
            )


def require_same_answers(model: nn.Module, folder: Path, asked: Sequence[Asked], *, tolerance: float) -> None:
    """Ask a model that was loaded from `folder` by plain transformers' means, greedily.

    Where two tokens are alike likely, up to `tolerance` of the largest logit, either may come.

    Raises:
        StorageError: the prompt has other ids than in evaluation, or the answer is another one.
    """
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.chat_template = with_fixed_date(tokenizer.chat_template)
    how = GenerationConfig.from_pretrained(folder)
    for question in asked:
        if difference := _difference(tokenizer, question):
            raise StorageError(
                f"{folder}: found that transformers reads the prompt of {question.origin} as other tokens than "
                f"training and evaluation did ({difference}); expected the same. {_REMEDY}"
            )
        found = _generated(model, question, how=how)
        if found != list(question.answer_ids) and not _is_tie(model, question, found, tolerance=tolerance):
            shown = (tokenizer.decode(row)[:60] for row in (found, question.answer_ids))
            raise StorageError(
                f"{folder}: found that the saved model answers {question.origin} with {next(shown)!r}, and before it "
                f"was saved with {next(shown)!r}; expected the same. {_REMEDY}"
            )


def _generated(model: nn.Module, question: Asked, *, how: GenerationConfig) -> list[int]:
    base: Any = base_of(model)
    # Beside a configuration, generate takes a limit of its own with a complaint.
    how = copy(how)
    how.max_new_tokens = question.max_new_tokens
    input_ids = torch.tensor([list(question.prompt_ids)], device=base.device)
    with evaluating(model), warnings.catch_warnings():
        # PEFT numbers the positions behind virtual tokens itself; without padding they are the same.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        output: Any = getattr(model, "generate")(  # noqa: B009 (an adapter has it by delegation)
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=how,
        )
    start = 1 if base.config.is_encoder_decoder else input_ids.shape[1]
    ids: list[int] = output[0, start:].tolist()
    stops = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
    return ids[: next((i for i, token in enumerate(ids) if token in stops), None)]


def _is_tie(model: nn.Module, question: Asked, found: Sequence[int], *, tolerance: float) -> bool:
    """Return whether the two answers part where their tokens are alike likely; one that only ends sooner is no tie."""
    own = question.answer_ids
    place = next((i for i, (a, b) in enumerate(zip(found, own, strict=False)) if a != b), None)
    if place is None:
        return False
    base: Any = base_of(model)
    before, prompt = list(own[:place]), list(question.prompt_ids)
    inputs = {"input_ids": torch.tensor([[*prompt, *before]], device=base.device)}
    if base.config.is_encoder_decoder:
        start = base.config.decoder_start_token_id
        inputs = {
            "input_ids": torch.tensor([prompt], device=base.device),
            "decoder_input_ids": torch.tensor([[start, *before]], device=base.device),
        }
    with evaluating(model):
        logits = model(**inputs).logits[0, -1].float()
    return bool((logits[found[place]] - logits[own[place]]).abs() <= tolerance * max(1.0, logits.abs().max().item()))


def _difference(tokenizer: Any, question: Asked) -> str:
    """Say where the ids of a prompt and those that transformers gives it part; "" where they are the same."""
    try:
        found: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in question.messages],
            tools=question.tools,
            add_generation_prompt=True,
            return_dict=False,
        )
    except (jinja2.TemplateError, *FAILURES) as error:
        return f"transformers refuses it: {' '.join(str(error).split())[:200]}"
    expected = list(question.prompt_ids)
    if found == expected:
        return ""
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    place = min(len(found), len(expected)) if place is None else place
    theirs, ours = (tokenizer.convert_ids_to_tokens(list(row[place : place + 3])) for row in (found, expected))
    return f"{len(found)} tokens for {len(expected)}, from token {place} on {theirs} for {ours}"
