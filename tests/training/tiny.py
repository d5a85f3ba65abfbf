"""A language model of a few hundred weights, with dropout, a table of unequal examples, and digests of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keeptune.progress import Progress, Silent
from keeptune.text.batches import Batch, pack
from keeptune.text.tokens import Example, Examples
from keeptune.training.loop import TrainingResult, TrainingSettings, train
from keeptune.training.world import SINGLE, World

VOCABULARY = 13
CPU = torch.device("cpu")
SETTINGS = TrainingSettings(
    learning_rate=0.05,
    num_train_epochs=2,
    tokens_per_step=24,
    tokens_per_micro_batch=10,
    lr_scheduler_type="linear",
    warmup_ratio=0.2,
    cooldown_fraction=0.2,
    weight_decay=0.1,
    max_grad_norm=1.0,
    adam_beta1=0.9,
    adam_beta2=0.99,
    adam_epsilon=1e-8,
    gradient_checkpointing=False,
    evals_per_epoch=2,
    eval_steps=None,
    save_steps=None,
    patience=None,
    seed=7,
    layout="packed",
    select_by="loss",
)


@dataclass(frozen=True, slots=True)
class Table:
    """Examples in memory, with the facts that a token table gives."""

    examples: tuple[Example, ...]
    record_ids: tuple[str, ...]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(example.input_ids) for example in self.examples], dtype=np.int64)

    @property
    def num_targets(self) -> NDArray[np.int64]:
        return np.array([int(example.loss_mask[1:].sum()) for example in self.examples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


def make_table(num_examples: int, *, seed: int, name: str = "record") -> Table:
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(num_examples):
        num_tokens = int(generator.integers(3, 9))
        input_ids = generator.integers(0, VOCABULARY, num_tokens).astype(np.int32)
        num_prompt = int(generator.integers(1, num_tokens - 1))
        examples.append(Example(input_ids, np.arange(num_tokens) >= num_prompt))
    return Table(tuple(examples), tuple(f"{name}-{i}" for i in range(num_examples)))


TRAIN = make_table(12, seed=1)
VALIDATION = make_table(4, seed=2, name="held-out")


class TinyModel(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self, *, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.dropout(self.embedding(input_ids))
        return self.head(self.norm(hidden + self.dropout(torch.tanh(self.hidden(hidden)))))


def make_model(*, frozen: bool = False, dropout: float = 0.3, seed: int = 3) -> TinyModel:
    torch.manual_seed(seed)
    model = TinyModel(dropout=dropout)
    if frozen:
        model.requires_grad_(False)
        model.hidden.requires_grad_(True)
    return model


def tiny_loss(model: nn.Module, batch: Batch) -> Tensor:
    labels = torch.from_numpy(batch.labels)
    return nn.functional.cross_entropy(model(torch.from_numpy(batch.input_ids))[:-1], labels[1:], reduction="sum")


def run(
    model: nn.Module,
    folder: Path,
    *,
    settings: TrainingSettings = SETTINGS,
    train_table: Examples = TRAIN,
    validation_table: Table = VALIDATION,
    loss: Callable[[nn.Module, Batch], Tensor] = tiny_loss,
    collate: Callable[..., Batch] = pack,
    validate: Callable[[nn.Module], float] | None = None,
    higher_is_better: bool = False,
    world: World = SINGLE,
    progress: Progress | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    run_key: str = "key",
    l2_base: float = 0.0,
    drift: Callable[[nn.Module], float] | None = None,
    **changed: Any,
) -> TrainingResult:
    folder.mkdir(parents=True, exist_ok=True)
    return train(
        model=model,
        train_table=train_table,
        validation_table=validation_table,
        loss=loss,
        collate=collate,
        settings=replace(settings, **changed),
        folder=folder,
        validate=validate,
        higher_is_better=higher_is_better,
        world=world,
        device=CPU,
        autocast=None,
        progress=progress or Silent(),
        stop_requested=stop_requested,
        run_key=run_key,
        l2_base=l2_base,
        drift=drift,
    )


class StopAt:
    """Asks for a stop at the poll with this number, counted from 0, and counts the polls."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.num_polls = 0

    def __call__(self) -> bool:
        self.num_polls += 1
        return self.num_polls - 1 == self.number


def weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def log_without_measures(folder: Path) -> list[dict[str, Any]]:
    """Return the events but for what is measured, and for the fact that the run was resumed."""
    measured = ("_seconds", "_per_second", "peak_memory_bytes")
    return [
        {key: value for key, value in event.items() if not key.endswith(measured)}
        for event in read_events(folder)
        if event["event"] != "resumed"
    ]


def digest_run(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Return what the law "Resume" speaks of: the model's weights, the last checkpoint's tensors, the log."""
    steps = {
        int(path.name.split("-")[1]): path for path in (folder / "checkpoints").glob("step-*") if "." not in path.name
    }
    last = steps[max(steps)]
    return {
        "model": weights_sha256(model),
        "checkpoints": sorted(steps),
        "weights": hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": hashlib.sha256((last / "optimizer.safetensors").read_bytes()).hexdigest(),
        "log": log_without_measures(folder),
    }
