"""Prompts of a few records as transformers can be asked them, and a trained model's own answers to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from keeptune.data.record import Record
from keeptune.progress import Silent
from keeptune.stages.data import Base, Data, max_new_tokens
from keeptune.stages.run import Run

if TYPE_CHECKING:
    from torch import nn

    from keeptune.model.asked import Asked

_NUM_ASKED = 4
_NUM_TRIED = 50
_MAX_NEW_TOKENS = 24


def require_prompts_of_transformers(base: Base, records: Iterable[Record]) -> None:
    """Hold the prompts of records against the ids that transformers gives them.

    Raises:
        RecipeError: they differ.
    """
    from keeptune.model.asked import require_same_prompts

    asked = list(questions(base, records))
    require_same_prompts(base.tokenizer_folder, asked, chat_template=base.template.chat_template)


def questions(base: Base, records: Iterable[Record]) -> Iterator[Asked]:
    """Yield the prompts of records, without those that spell a control token: transformers would read it as one."""
    from keeptune.model.asked import Asked
    from keeptune.text.tokens import encode_prompts

    pairs, template = base.facts.encoder_decoder, base.template
    for record in records:
        messages = record.messages[:-1]
        text = template.render_prompt(messages, tools=record.tools)
        if template.controls.reveal(text) == text:
            (ids,) = encode_prompts([text], tokenizer=base.tokenizer, encoder_decoder=pairs)
            tools = json.loads(record.tools) if record.tools else None
            yield Asked(record.origin, template.as_dicts(messages), tools, ids.tolist(), (), 0)


def ask(run: Run, data: Data, model: nn.Module) -> list[Asked]:
    """Let a model answer the first prompts of validation that were not cut, one by one."""
    from keeptune.evaluation.generate import Decoding, beside_virtual_tokens, generate
    from keeptune.model.artifact import stop_token_ids

    base = data.base
    decoding = Decoding(
        max_new_tokens=min(_MAX_NEW_TOKENS, max_new_tokens(run.recipe, data)),
        stop_ids=stop_token_ids(model, tokenizer=base.tokenizer, template=base.template),
        pad_id=base.tokenizer.pad_id,
        tokens_per_batch=1,
        encoder_decoder=base.facts.encoder_decoder,
        max_positions=base.facts.max_positions,
    )
    chosen: list[Asked] = []
    for question in questions(base, data.records("validation", at_most=_NUM_TRIED)):
        length = len(question.prompt_ids)
        limit = beside_virtual_tokens(model, decoding).new_tokens(length)
        if length <= run.recipe.data.max_length and limit > 0 and len(chosen) < _NUM_ASKED:
            chosen.append(replace(question, max_new_tokens=limit))
    prompts = [question.prompt_ids for question in chosen]
    answers = generate(model, prompts, decoding=decoding, progress=Silent(), stop_requested=run.context.stop_requested)
    return [replace(question, answer_ids=answer.ids) for question, answer in zip(chosen, answers, strict=True)]
