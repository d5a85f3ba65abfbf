"""What a training is told and what it answers: frozen settings arrive at the loop, a frozen result leaves it."""

from __future__ import annotations

from dataclasses import dataclass

from keeptune.text.batches import Layout
from keeptune.training.schedule import ScheduleKind


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The numbers of one training, with the meaning that the recipe's fields of the same names have."""

    learning_rate: float
    num_train_epochs: int
    tokens_per_step: int
    tokens_per_micro_batch: int
    lr_scheduler_type: ScheduleKind
    warmup_ratio: float
    cooldown_fraction: float
    weight_decay: float
    max_grad_norm: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    gradient_checkpointing: bool
    evals_per_epoch: int
    eval_steps: int | None
    save_steps: int | None
    patience: int | None
    seed: int
    layout: Layout
    select_by: str


@dataclass(frozen=True, slots=True)
class Validation:
    """What the validation split said after a step; `epoch` is the passes over the train split so far.

    `loss` is in nats per target token, `metric` the value of `select_by` where that is no loss and an epoch ends.
    """

    step: int
    epoch: float
    loss: float
    metric: float | None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What one training did; the model holds the weights of `best_step`.

    `best_value` is None where no validation gave a finite value: then the last step counts as best. `best_loss` is the
    validation loss of the best step. `metric_moved` is False where the metric that selects had the same value at every
    validation, so that the validation loss chose.
    `train_seconds` covers the steps alone, without validations and checkpoints, over every start of the run.
    """

    num_steps: int
    best_step: int
    best_value: float | None
    select_by: str
    num_epochs_done: float
    stopped_early: bool
    train_seconds: float
    num_train_tokens: int
    num_target_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    validation: tuple[Validation, ...]
    best_loss: float | None = None
    metric_moved: bool = True
