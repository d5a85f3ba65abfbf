"""Pre-training: the tokenizer holds every text, windows lose nothing, and a short run leaves a model that loads."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from keeptune.errors import KeeptuneError
from keeptune.lab import pretrain as module
from keeptune.lab.pretrain import END, MESSAGE_END, MESSAGE_START, corrupted, make_tokenizer, pretrain, windows
from keeptune.lab.text import running_text
from keeptune.lab.world import make_world
from keeptune.model.load import load_model
from keeptune.storage import file_sha256
from keeptune.terminal import PlainProgress
from keeptune.text.tokenizer import Tokenizer

DOCUMENTS = list(islice(running_text(make_world(), seed=0), 500))
TOKENIZER = make_tokenizer(DOCUMENTS)
QUIET = PlainProgress(Console(stderr=True), quiet=True)


@pytest.mark.parametrize("text", [*DOCUMENTS[:20], "Größe 12345 ☃ \n\t x", "<|im_end|>"[:5]])
def test_every_text_comes_back_from_its_ids(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_each_digit_is_a_token_of_its_own() -> None:
    assert TOKENIZER.encode("1887 + 3").tokens == ["1", "8", "8", "7", "Ġ+", "Ġ", "3"]


def test_chat_and_sentinel_tokens_are_reserved() -> None:
    ids = [TOKENIZER.token_to_id(token) for token in ("<pad>", END, MESSAGE_START, MESSAGE_END, "<extra_id_31>")]
    assert ids == [0, 1, 2, 3, 35]


def test_windows_are_documents_end_to_end() -> None:
    table = windows(TOKENIZER, seed=0, num_windows=4, kind="llama")
    ids = np.concatenate([example.input_ids for example in table.examples]).tolist()
    assert TOKENIZER.decode(ids, skip_special_tokens=False).startswith(END.join(DOCUMENTS[:3]) + END)
    assert table.lengths.tolist() == [512] * 4 and table.num_targets.tolist() == [511] * 4


def test_another_seed_gives_other_windows() -> None:
    first, second = (windows(TOKENIZER, seed=seed, num_windows=1, kind="llama")[0].input_ids for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_corrupted_window_can_be_put_together_again(seed: int) -> None:
    ids = np.arange(100, 356, dtype=np.int32)
    example = corrupted(ids, rng=np.random.Generator(np.random.Philox(seed)), tokenizer=TOKENIZER)
    read = example.input_ids[~example.loss_mask].tolist()
    written = example.input_ids[example.loss_mask].tolist()
    assert read[-1] == written[-1] == TOKENIZER.token_to_id(END)
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        if token < 100:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    whole = [part for token in read[:-1] for part in (spans[token] if token < 100 else [token])]
    assert whole == ids.tolist()
    assert sum(map(len, spans.values())) == 128 and len(spans) in (1, 32)
    assert len(spans) == 32 or read[:128] == ids[:128].tolist()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_short_pre_training_leaves_a_model_that_loads_and_is_not_made_twice(
    kind: module.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOKENIZER_DOCUMENTS", 500)
    monkeypatch.setattr(module, "_NUM_VALIDATION_WINDOWS", 2)
    folder = short_pretraining(tmp_path, kind)
    weights = file_sha256(folder / "model.safetensors")
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    assert Tokenizer.load(folder).chat_template is None
    assert "Validation loss in nats a token after steps" in (folder / "README.md").read_text()
    monkeypatch.setattr(module, "batch_loss", None)  # The second call trains no step.
    assert file_sha256(short_pretraining(tmp_path, kind) / "model.safetensors") == weights


@pytest.mark.parametrize("changed", ["text", "settings"])
def test_checkpoints_of_another_text_or_other_settings_are_not_gone_on_with(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOKENIZER_DOCUMENTS", 500)
    monkeypatch.setattr(module, "_NUM_VALIDATION_WINDOWS", 2)
    short_pretraining(tmp_path, "llama")
    if changed == "text":
        monkeypatch.setattr(module, "_TOKENIZER_DOCUMENTS", 400)
    else:
        settings = replace(module._settings("llama"), learning_rate=1e-3)
        monkeypatch.setattr(module, "_settings", lambda kind: settings)
    with pytest.raises(KeeptuneError, match="expected"):
        short_pretraining(tmp_path, "llama")


def short_pretraining(folder: Path, kind: module.Kind) -> Path:
    return pretrain(folder / "out", kind=kind, num_tokens=13_000, progress=QUIET)
