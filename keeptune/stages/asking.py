"""A trained model's own answers to a few records, for the proof that its saved folder gives them too."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from keeptune.progress import Silent
from keeptune.stages.data import Data, max_new_tokens
from keeptune.stages.run import Run

if TYPE_CHECKING:
    from torch import nn

    from keeptune.model.asked import Asked

_NUM_ASKED = 4
_NUM_TRIED = 50
_MAX_NEW_TOKENS = 24


def ask(run: Run, data: Data, model: nn.Module) -> list[Asked]:
    """Let a model answer the first prompts of validation that transformers can be asked too, one by one.

    A prompt that spells a control token is left out, which transformers would read as one; so is one that was cut.
    """
    from keeptune.evaluation.generate import Decoding, beside_virtual_tokens, generate
    from keeptune.model.artifact import stop_token_ids
    from keeptune.model.asked import Asked
    from keeptune.text.tokens import encode_prompts

    base, pairs = data.base, data.base.facts.encoder_decoder
    template, tokenizer = base.template, base.tokenizer
    decoding = Decoding(
        max_new_tokens=min(_MAX_NEW_TOKENS, max_new_tokens(run.recipe, data)),
        stop_ids=stop_token_ids(model, tokenizer=tokenizer, template=template),
        pad_id=tokenizer.pad_id,
        tokens_per_batch=1,
        encoder_decoder=pairs,
        max_positions=base.facts.max_positions,
    )
    chosen: list[Asked] = []
    for record in data.records("validation", at_most=_NUM_TRIED):
        messages = record.messages[:-1]
        text = template.render_prompt(messages, tools=record.tools)
        (ids,) = encode_prompts([text], tokenizer=tokenizer, encoder_decoder=pairs)
        room = min(run.recipe.data.max_length, decoding.max_positions or len(ids))
        limit = beside_virtual_tokens(model, decoding).new_tokens(len(ids))
        if template.controls.reveal(text) != text or len(ids) > room or limit < 1:
            continue
        tools = json.loads(record.tools) if record.tools else None
        how = {"tools": tools, "prompt_ids": ids.tolist(), "answer_ids": (), "max_new_tokens": limit}
        chosen.append(Asked(record.origin, template.as_dicts(messages), **how))
        if len(chosen) == _NUM_ASKED:
            break
    prompts = [question.prompt_ids for question in chosen]
    answers = generate(model, prompts, decoding=decoding, progress=Silent(), stop_requested=run.context.stop_requested)
    return [replace(question, answer_ids=answer.ids) for question, answer in zip(chosen, answers, strict=True)]
