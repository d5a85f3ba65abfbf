"""A recipe: YAML and `--set` overrides arrive, a frozen and typed `Recipe` leaves, or every problem at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keeptune.data.record import ALL_TASKS, OTHER_TASKS, SELF_TEXTS
from keeptune.errors import RecipeError, raise_collected
from keeptune.evaluation.metrics import metric_problems
from keeptune.recipe_text import apply_override, describe_problem, existing_key, read_yaml, write_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEAN_ROWS = frozenset({ALL_TASKS, OTHER_TASKS, SELF_TEXTS})
_RESERVED_NAMES = frozenset({ALL_TASKS, "base", "comparisons", "data", "instruct-model", "texts", "tokenizer"})
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _checked_name(given: str, *, path: str) -> str:
    """Return a task's or suite's name, the given one or that of its file.

    Raises:
        ValueError: it cannot be a name, or means something else.
    """
    stem = Path(path.split("@")[0]).name.split(".")[0]
    name = given or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64]
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"found the task name {name!r}; expected letters, digits, '.', '_' or '-'. Give the task a `name`"
        )
    if name in _MEAN_ROWS:
        raise ValueError(
            f"found the task name {name!r}, under which scores stand of several tasks together; expected another. "
            "Give the task a `name`"
        )
    return name


class TaskFields(_Section):
    """One source of rows; a task is scored on its own."""

    path: str
    """File (.json, .jsonl, .csv, .parquet; .gz accepted), folder, or hub id `owner/name`."""
    name: str = ""
    """The task's name in scores and reports; default: the file's name without its suffixes."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    validation: str | None = None
    """Own validation file, taken as it is."""
    test: str | None = None
    """Own test file, taken as it is."""
    columns: dict[Literal["prompt", "completion"], str] | None = None
    """Names of the two columns that hold prompt and completion, where no known format fits."""
    instruction: str | None = None
    """A line put before every prompt of the named columns."""
    max_records: Positive | None = None
    """Keep at most this many records, chosen by hash; default: all."""
    train: bool = True
    """Train on it; false: score it only, to see what tuning on the others changed there."""

    @model_validator(mode="after")
    def _named(self) -> TaskFields:
        name = _checked_name(self.name, path=self.path)
        if self.validation is not None and not self.train:
            raise ValueError(
                "found validation beside train: false; expected test alone, because a task that is not trained on "
                "chooses nothing. Remove validation"
            )
        if self.columns is not None and set(self.columns) != {"prompt", "completion"}:
            raise ValueError("found columns with one key; expected both prompt and completion. Add the other")
        if self.instruction is not None and self.columns is None:
            raise ValueError(
                "found instruction without columns, where it has no effect; expected both. Add columns, or remove it"
            )
        object.__setattr__(self, "name", name)
        return self


class DataFields(_Section):
    """What is read, how it is split and rendered."""

    tasks: Annotated[tuple[TaskFields, ...], Field(min_length=1)]
    """The sources."""
    validation_fraction: Fraction = 0.1
    """Expected share of each task that hyper-parameters are chosen on."""
    test_fraction: Fraction = 0.1
    """Expected share of each task that is opened once, at the end."""
    template: Literal["auto", "chat", "chatml", "alpaca", "plain"] = "auto"
    """How messages become text; auto: the tokenizer's chat template, else alpaca (encoder-decoder: plain)."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens of an example at most (encoder-decoder: of each side)."""
    over_length: Literal["error", "drop", "cut"] = "error"
    """A longer record stops the run, is dropped, or loses the middle of its prompt."""
    train_on: Literal["all", "last"] = "all"
    """Train on every assistant message of a conversation, or on the last alone."""
    drop_incomplete: bool = False
    """Count and drop rows that cannot be read or are no valid record, instead of stopping."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to an exact copy of a record."""
    leaks: Literal["drop", "keep"] = "drop"
    """What happens to train records that overlap with validation or test."""

    @model_validator(mode="after")
    def _consistent(self) -> DataFields:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"found the task name {twice[0]!r} twice; expected each once. Give one of them another `name`"
            )
        if not any(task.train for task in self.tasks):
            raise ValueError(
                "found train: false in every task; expected one or more to train on. Remove it from one of them"
            )
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError("found validation_fraction + test_fraction >= 1; expected a rest to train on. Lower them")
        return self


class MethodFields(BaseModel):
    """How the parameters train. Other keys go to PEFT's config class by PEFT's own names."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: str | None = None
    """PEFT's name of the method (LORA, IA3, ...); none: full fine-tuning."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate; default 2e-5 for full fine-tuning and 2e-4 for PEFT."""
    replay_fraction: Fraction = 0.0
    """Share of the training's tokens that is replayed text of `retention.replay`."""

    @field_validator("peft_type")
    @classmethod
    def _upper(cls, value: str | None) -> str | None:
        return value.upper() if value else None

    @model_validator(mode="after")
    def _consistent(self) -> MethodFields:
        if "lr" in (self.model_extra or {}):
            raise ValueError("found lr; expected learning_rate. Rename the key")
        if self.peft_type is None and self.model_extra:
            near = [difflib.get_close_matches(key, type(self).model_fields, n=1) for key in sorted(self.model_extra)]
            meant = next((f"Did you mean {names[0]!r}?" for names in near if names), "")
            raise ValueError(
                f"found {', '.join(sorted(self.model_extra))} without peft_type; expected only learning_rate for full "
                f"fine-tuning. {meant or 'Add `peft_type: LORA`, or remove these keys'}"
            )
        return self


class TrainingFields(_Section):
    """The training loop."""

    num_train_epochs: Positive = 3
    """Passes over the train split at most."""
    tokens_per_step: Positive | Literal["auto"] = "auto"
    """Tokens of one optimizer update; auto: 8,192, or fewer so that small data give enough steps."""
    tokens_per_micro_batch: Positive = 1024
    """Tokens of one forward and backward pass; less needs less memory."""
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_cooldown"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    cooldown_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the steps over which `constant_with_cooldown` falls to 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """The gradient's Euclidean norm is clipped to this."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay of the gradient's mean."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay of the squared gradient's mean."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's addend to the denominator."""
    bf16: bool | None = None
    """Compute in bf16 while the trained weights stay fp32; null: on a GPU, not on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    evals_per_epoch: Positive = 2
    """Validation losses in an epoch."""
    eval_steps: Positive | None = None
    """Steps between validations, in place of `evals_per_epoch`."""
    save_steps: Positive | None = None
    """Steps between checkpoints; default: at each end of an epoch."""
    patience: Positive | None = 3
    """Stop after this many values of `evaluation.select_by` in a row without a better one; null: never."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingFields:
        default = type(self).model_fields
        if self.eval_steps is not None and self.evals_per_epoch != default["evals_per_epoch"].default:
            raise ValueError("found eval_steps and evals_per_epoch; expected one of them. Remove the other")
        cooldown_changed = self.cooldown_fraction != default["cooldown_fraction"].default
        if self.lr_scheduler_type != "constant_with_cooldown" and cooldown_changed:
            raise ValueError(
                "found cooldown_fraction without effect; "
                "expected it only with lr_scheduler_type: constant_with_cooldown. Remove it"
            )
        return self


class EvaluationFields(_Section):
    """How answers are made and scored."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("rougeL", "exact_match")
    """What every answer on test is scored by; loss and perplexity are always added."""
    select_by: str = "loss"
    """The value on validation that chooses the checkpoint and the method: loss or one of `metrics`."""
    baselines: tuple[Literal["zero-shot", "few-shot", "nearest"], ...] = ("zero-shot", "few-shot")
    """The base model's answers set beside the tuned ones: alone, after solved examples, after the most similar ones."""
    num_shots: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 4)
    """Solved examples of the train split in a few-shot prompt, a row each; `nearest` shows the largest number."""
    num_draws: Positive = 3
    """Random choices of these examples for each of `num_shots`, to see how much the choice matters."""
    max_new_tokens: Positive | Literal["auto"] = "auto"
    """Tokens of an answer at most; auto: the 99th percentile of the train completions, and a little more."""
    num_validation_records: Positive = 200
    """Validation records that `select_by` generates answers for at most."""
    tokens_per_batch: Positive = 16384
    """Tokens, prompts and answers together, that are decoded side by side."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationFields:
        if problems := metric_problems(list(dict.fromkeys([*self.metrics, self.select_by]))):
            raise ValueError(" ".join(problems))
        if self.select_by != "loss" and self.select_by not in self.metrics:
            raise ValueError(f"found select_by: {self.select_by}; expected loss or one of metrics. Add it to metrics")
        self._refuse_shots_without_effect()
        return self

    def _refuse_shots_without_effect(self) -> None:
        default = type(self).model_fields
        few, nearest = "few-shot" in self.baselines, "nearest" in self.baselines
        if not few and self.num_draws != default["num_draws"].default:
            raise ValueError(
                "found num_draws without effect; expected it only with few-shot among baselines. Add few-shot, or "
                "remove num_draws"
            )
        if self.num_shots == default["num_shots"].default:
            return
        if not few and not nearest:
            raise ValueError(
                "found num_shots without effect; expected it only with few-shot or nearest among baselines. Add one, "
                "or remove num_shots"
            )
        if not few and len(self.num_shots) > 1:
            raise ValueError(
                "found several num_shots for nearest alone, which shows the largest; expected one number. Keep the "
                "largest, or add few-shot to baselines"
            )
        if len(set(self.num_shots)) < len(self.num_shots):
            raise ValueError("found a number of num_shots twice; expected each once. Remove one of them")


class TextFields(_Section):
    """A source of general text: what the model knew of it is measured before and after, document by document."""

    path: str
    """File (.jsonl, .json, .csv or .parquet with a column `text`; .txt, documents apart by blank lines) or hub id."""
    name: str = ""
    """The suite's name; default: the file's name without its suffixes."""
    max_records: Positive = 600
    """Keep at most this many documents, chosen by hash."""

    @model_validator(mode="after")
    def _named(self) -> TextFields:
        object.__setattr__(self, "name", _checked_name(self.name, path=self.path))
        return self


class RetentionFields(_Section):
    """What must not be lost, and how much of it may be."""

    texts: tuple[TextFields, ...] = ()
    """General text, as suites beside the tasks with `train: false`."""
    self_texts: Annotated[int, Field(ge=0)] = 256
    """Texts that the base model writes before training, the suite `self`: the rise of their loss is the KL divergence
    from the base. As many again are written for a certificate; 0: none."""
    text_tokens: Annotated[int, Field(ge=16)] = 128
    """Tokens of a text that are measured at most."""
    replay: str = SELF_TEXTS
    """The suite that methods with `replay_fraction` train on again: self, or one of `texts` or of the tasks with
    `train: false`, which give three tenths of their groups to it; `others`: all of those tasks."""
    budget: dict[str, str] = Field(default_factory=dict)
    """Suite → what it may lose, with its unit: `1 point of exact_match`, `0.02 nats`. Suites are the tasks with
    `train: false`, `others` (all of them together), `texts` by name, and self."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Of the certificate: one minus the chance that it is given wrongly."""
    alphas: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | Literal["auto"] = "auto"
    """Points of the path from the base (0) to the tuned model (1) that are measured, in rising order; auto: 0.1, 0.2
    … 1.0 where there is a budget, else 1.0 alone."""

    @model_validator(mode="after")
    def _consistent(self) -> RetentionFields:
        if self.alphas != "auto" and (not self.alphas or list(self.alphas) != sorted(set(self.alphas))):
            raise ValueError(f"found alphas: {list(self.alphas)}; expected different numbers that rise. Sort them")
        return self


class Recipe(_Section):
    """A whole run."""

    model: str
    """Folder or hub id (`id@revision` pins one) of the pre-trained model."""
    output_dir: str
    """The run folder."""
    data: DataFields
    methods: Annotated[dict[str, MethodFields], Field(min_length=1)] = Field(
        default_factory=lambda: {"full": MethodFields(), "lora": MethodFields(peft_type="LORA")}
    )
    """Each is trained and scored; the report sets them side by side."""
    training: TrainingFields = TrainingFields()
    evaluation: EvaluationFields = EvaluationFields()
    retention: RetentionFields = RetentionFields()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides splits, order, initial adapters and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: the GPU if there is one."""

    @field_validator("methods")
    @classmethod
    def _method_names(cls, methods: dict[str, MethodFields]) -> dict[str, MethodFields]:
        bad = [name for name in methods if not _NAME.fullmatch(name) or name in _RESERVED_NAMES]
        if bad:
            raise ValueError(
                f"found the method name {bad[0]!r}; "
                "expected letters, digits, '.', '_' or '-', and no reserved name. Rename it"
            )
        return methods

    @model_validator(mode="after")
    def _suites(self) -> Recipe:
        texts = [text.name for text in self.retention.texts]
        untrained = [task.name for task in self.data.tasks if not task.train]
        names = [*texts, *(task.name for task in self.data.tasks)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"found {twice[0]!r} as a task and as a text; expected each name once. Rename the text")
        own = [SELF_TEXTS] if self.retention.self_texts else []
        suites = [*untrained, *texts, *own, *([OTHER_TASKS] if untrained else [])]
        for key, named in (("budget", self.retention.budget), ("replay", [self.retention.replay])):
            for name in named:
                if name not in suites and (key, name) != ("replay", SELF_TEXTS):
                    listed = ", ".join(suites) or "none, as nothing is named that could be kept"
                    near = difflib.get_close_matches(name, suites, n=1, cutoff=0.5)
                    remedy = f"Did you mean {near[0]!r}?" if near else "Add it as a task with train: false, or a text"
                    raise ValueError(f"found {name!r} in retention.{key}; expected a suite: {listed}. {remedy}")
        return self

    def to_yaml(self) -> str:
        """Return the recipe with every default written out."""
        return write_yaml(self.model_dump(mode="json"))


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `path` after `--set key=value` overrides, with relative paths left as they are.

    Raises:
        RecipeError: the file is missing or not YAML, or any key or value is wrong; all such problems at once.
    """
    value = read_yaml(path)
    if any(override.startswith("methods.") for override in overrides):
        value.setdefault("methods", {"full": {}, "lora": {"peft_type": "LORA"}})
    for override in overrides:
        apply_override(value, override)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        # A union reports one problem for each of its members.
        by_place: dict[str, list[Mapping[str, Any]]] = {}
        for problem in error.errors():
            place = str(problem["loc"]) if problem["type"] == "missing" else existing_key(problem["loc"], value)
            by_place.setdefault(place, []).append(problem)
        raise_collected(
            RecipeError,
            [describe_problem(path, problems, value=value, known_keys=_known_keys) for problems in by_place.values()],
        )


def _known_keys(section: Sequence[Any]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "data": DataFields,
        "training": TrainingFields,
        "evaluation": EvaluationFields,
        "tasks": TaskFields,
        "retention": RetentionFields,
        "texts": TextFields,
        "methods": MethodFields,
    }
    known = next((sections[part] for part in reversed(section) if part in sections), Recipe)
    return list(known.model_fields)
