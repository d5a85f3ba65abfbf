"""A recipe: YAML and `--set` overrides arrive, a frozen and typed `Recipe` leaves, or every problem at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keeptune.data.lines import json_kind
from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.errors import RecipeError, raise_collected
from keeptune.evaluation.metrics import metric_problems
from keeptune.recipe_text import apply_override, read_yaml, write_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEAN_ROWS = frozenset({ALL_TASKS, OTHER_TASKS})
_RESERVED_NAMES = frozenset({ALL_TASKS, "base", "data", "instruct-model", "tokenizer"})
# pydantic's kinds of problem, by the beginning of their names, in the words of a recipe.
_EXPECTED = {"int_": "a whole number", "float_": "a number", "bool_": "true or false", "string_type": "text"}
_EXPECTED |= {
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_": "a section",
    "too_short": "at least one entry",
}
_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


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
        stem = Path(self.path.split("@")[0]).name.split(".")[0]
        name = self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64]
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"found the task name {name!r}; expected letters, digits, '.', '_' or '-'. Give the task a `name`"
            )
        if name in _MEAN_ROWS:
            raise ValueError(
                f"found the task name {name!r}, under which scores stand of several tasks together; expected another. "
                "Give the task a `name`"
            )
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
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    """Embeddings and this many of the first layers (encoder-decoder: of the encoder) stay as they are; full only."""
    l2_base: Annotated[float, Field(ge=0.0)] = 0.0
    """Adds this times the squared distance from the base model's weights to the objective; full only."""
    replay_fraction: Fraction = 0.0
    """Share of the trained tokens that are general text, added to the task's."""
    replay_kl: Annotated[float, Field(ge=0.0)] = 0.0
    """Loss of the replay: this times KL(base‖tuned) per target token; 0: the text's own cross-entropy."""

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
                f"found {', '.join(sorted(self.model_extra))} without peft_type; expected only learning_rate, "
                "frozen_layers, l2_base, replay_fraction or replay_kl for full fine-tuning. "
                f"{meant or 'Add `peft_type: LORA`, or remove these keys'}"
            )
        if self.peft_type is not None and self.frozen_layers:
            raise ValueError(
                "found frozen_layers with peft_type, where the base model stays as it is; expected it for full "
                "fine-tuning alone. Use layers_to_transform, PEFT's own list of the layers that it adapts"
            )
        if self.peft_type is not None and self.l2_base:
            raise ValueError(
                "found l2_base with peft_type; expected it for full fine-tuning alone. Use training.weight_decay, "
                "which pulls an adapter to the base model already"
            )
        if self.replay_kl and not self.replay_fraction:
            raise ValueError(
                "found replay_kl without replay_fraction, where it has no effect; expected both. "
                "Set replay_fraction, or remove replay_kl"
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
    baselines: tuple[Literal["zero-shot"], ...] = ("zero-shot",)
    """Answers of the base model set beside the tuned ones."""
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
            place = str(problem["loc"]) if problem["type"] == "missing" else _existing_key(problem["loc"], value)
            by_place.setdefault(place, []).append(problem)
        raise_collected(RecipeError, [_problem(path, problems, value) for problems in by_place.values()])


def _problem(path: Path, problems: Sequence[Mapping[str, Any]], value: Any) -> str:
    """Return the problems of one place in the form `where: found; expected. remedy.`"""
    problem = problems[0]
    key = _existing_key(problem["loc"], value)
    where = f"{path}: {key}" if key else f"{path}"
    if problem["type"] == "extra_forbidden":
        *section, last = problem["loc"]
        known = _known_keys(section)
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys here: {', '.join(known)}."
        return f"{where}: found an unknown key; expected one that keeptune knows. {hint}"
    if problem["type"] == "missing":
        missing = ".".join(map(str, problem["loc"]))
        return f"{path}: {missing}: found nothing; expected a value. Add this key."
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}: {message}{'' if message.endswith(('?', '.')) else '.'}"
    given = problem["input"]
    found = json_kind(given) if isinstance(given, dict) else _YAML_WORDS.get(str(given), f"{given!r:.80}")
    words = [next((w for k, w in _EXPECTED.items() if p["type"].startswith(k)), p["msg"]) for p in problems]
    expected = " or ".join(dict.fromkeys(word.removeprefix("Input should be ") for word in words))
    return f"{where}: found {found}; expected {expected}. Mend this value."


def _existing_key(location: Sequence[Any], value: Any) -> str:
    """Return the dotted part of `location` that the recipe holds; pydantic appends the names of union members."""
    kept: list[str] = []
    for part in location:
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not in_list and not (isinstance(value, dict) and part in value):
            break
        value = value[part]
        kept.append(str(part))
    return ".".join(kept)


def _known_keys(section: Sequence[Any]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "data": DataFields,
        "training": TrainingFields,
        "evaluation": EvaluationFields,
        "tasks": TaskFields,
        "methods": MethodFields,
    }
    known = next((sections[part] for part in reversed(section) if part in sections), Recipe)
    return list(known.model_fields)
