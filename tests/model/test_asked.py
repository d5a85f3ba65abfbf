"""A saved folder, asked through its own template by transformers' own means, answers as the trained model does."""

from __future__ import annotations

import json
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import pytest
import torch

from keeptune.data.record import Message
from keeptune.errors import StorageError
from keeptune.evaluation.generate import Decoding, generate
from keeptune.model.artifact import stop_token_ids, verify_artifact
from keeptune.model.asked import Asked
from keeptune.model.methods import Method, apply_method
from keeptune.progress import Silent
from keeptune.text.tokens import encode_prompts
from tests.model.bases import Base, make_base, save
from tests.model.tiny import trained_state

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUESTIONS = ("Name the capital of France.", " a b\n\nc ", "one two three")


def tuned(base: Base, peft_type: str | None) -> Any:
    arguments = {"r": 4, "target_modules": "all-linear"} if peft_type else {}
    model = apply_method(base.load(), Method("mine", peft_type, 1e-3, arguments), seed=0)
    torch.manual_seed(1)
    for tensor in trained_state(model).values():
        tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def asked(model: Any, base: Base) -> list[Asked]:
    """Return the questions with the answers of the live model."""
    turns = [[Message("user", question)] for question in QUESTIONS]
    prompts = [base.template.render_prompt(messages) for messages in turns]
    how = {"tokenizer": base.tokenizer, "encoder_decoder": base.encoder_decoder}
    ids = [row.tolist() for row in encode_prompts(prompts, **how)]
    stop_ids = stop_token_ids(model, tokenizer=base.tokenizer, template=base.template)
    decoding = Decoding(12, stop_ids, base.tokenizer.pad_id, 1, base.encoder_decoder)
    answers = generate(model, ids, decoding=decoding, progress=Silent(), stop_requested=lambda: False)
    return [
        Asked(f"made:{i}", base.template.as_dicts(messages), None, ids[i], answers[i].ids, 12)
        for i, messages in enumerate(turns)
    ]


@pytest.mark.parametrize("peft_type", [None, "LORA"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_saved_model_answers_as_the_trained_one(
    kind: str, peft_type: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(getLogger("transformers"), "propagate", True)
    base = make_base(tmp_path / "base", kind)
    model = tuned(base, peft_type)
    questions = asked(model, base)
    assert all(question.answer_ids for question in questions)
    saved = save(model, tmp_path / "saved", base)
    caplog.clear()
    verify_artifact(model, saved, base=base.folder, asked=questions)
    assert "generation_config" not in caplog.text


def test_a_prompt_that_transformers_reads_otherwise_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    model = tuned(base, None)
    folder, questions = save(model, tmp_path / "saved", base), asked(model, base)
    raw = json.loads((folder / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_start|>"
    raw["added_tokens"] = [{**token, "lstrip": token["content"] == "<|im_end|>"} for token in raw["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(StorageError) as caught:
        verify_artifact(model, folder, base=base.folder, asked=questions)
    assert "reads the prompt of made:1 as other tokens than training and evaluation did (" in str(caught.value)


def test_another_answer_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    model = tuned(base, None)
    folder = save(model, tmp_path / "saved", base)
    first, *others = asked(model, base)
    wrong = replace(first, answer_ids=[*first.answer_ids[:2], (first.answer_ids[2] + 7) % 300, *first.answer_ids[3:]])
    shorter = replace(first, answer_ids=first.answer_ids[:2])
    for question in (wrong, shorter):
        with pytest.raises(StorageError, match=r"found that the saved model answers made:0 with .*, and before it"):
            verify_artifact(model, folder, base=base.folder, asked=[*others, question])
