"""A recipe: YAML and `--set` overrides arrive, a frozen and typed `Recipe` leaves, or every problem at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keeptune.config_data import (
    NAME,
    DataFields,
    Fraction,
    HarnessFields,
    MixtureFields,
    Positive,
    RetentionFields,
    Section,
    TaskFields,
    TextFields,
)
from keeptune.data.record import ALL_TASKS, OTHER_TASKS, SELF_TEXTS
from keeptune.errors import RecipeError, printable, raise_collected
from keeptune.evaluation.metrics import metric_problems
from keeptune.recipe_text import apply_override, describe_problem, existing_key, read_yaml, write_yaml
from keeptune.search.space import range_keys

_RESERVED_NAMES = frozenset(
    {ALL_TASKS, "base", "comparisons", "curve", "data", "instruct-model", "parts", "search", "texts", "tokenizer"}
)

# Peak learning rates where a recipe names none, by PEFT's name of the method; docs/methods.md tells their source.
LEARNING_RATES: Mapping[str | None, float] = {
    None: 2e-5,
    "LORA": 2e-4,
    "ADALORA": 2e-3,
    "VERA": 7e-3,
    "IA3": 7e-3,
    "LOHA": 7e-4,
    "LOKR": 2e-3,
    "OFT": 2e-4,
    "BOFT": 2e-3,
    "OSF": 6e-5,
    "LN_TUNING": 7e-3,
    "PROMPT_TUNING": 7e-2,
    "PREFIX_TUNING": 7e-3,
    "P_TUNING": 2e-3,
}
_MAX_DESCRIBED = 10
ADAPTER_LEARNING_RATE = 2e-4
"""That of a method which has none of its own."""


class MethodFields(BaseModel):
    """How the parameters train. Other keys go to PEFT's config class by PEFT's own names."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: str | None = None
    """PEFT's name of the method (LORA, IA3, ...); none: full fine-tuning."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate; default: that of its kind in `LEARNING_RATES`."""
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    """Embeddings and this many of the first layers (encoder-decoder: of the encoder) stay as they are; full only."""
    l2_base: Annotated[float, Field(ge=0.0)] = 0.0
    """Adds this times the squared distance from the base model's weights to the objective; full only."""
    replay_fraction: Fraction = 0.0
    """Share of the trained tokens that are text of the suite `retention.replay`, added to the task's."""
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
                "which pulls LoRA's factors, and with them the model, to the base model"
            )
        if self.replay_kl and not self.replay_fraction:
            raise ValueError(
                "found replay_kl without replay_fraction, where it has no effect; expected both. "
                "Set replay_fraction, or remove replay_kl"
            )
        return self


class TrainingFields(Section):
    """The training loop."""

    num_train_epochs: Annotated[int, Field(ge=1, le=10_000)] = 3
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
    evals_per_epoch: Annotated[int, Field(ge=1, le=1_000)] = 2
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


class EvaluationFields(Section):
    """How answers are made and scored."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("rougeL_unicode", "exact_match")
    """What every answer on test is scored by; loss and perplexity are always added."""
    select_by: str = "loss"
    """The value on validation that chooses the checkpoint and the method: loss or one of `metrics`."""
    baselines: tuple[Literal["zero-shot", "few-shot", "nearest"], ...] = ("zero-shot", "few-shot")
    """The base model's answers set beside the tuned ones: alone, after solved examples, after the most similar ones."""
    num_shots: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 4)
    """Solved examples of the train split in a few-shot prompt, a row each; `nearest` shows the largest number."""
    num_draws: Annotated[int, Field(ge=1, le=100)] = 3
    """Random choices of these examples for each of `num_shots`, to see how much the choice matters."""
    max_new_tokens: Positive | Literal["auto"] = "auto"
    """Tokens of an answer at most; auto: the 99th percentile of the train completions, and a little more."""
    num_validation_records: Positive = 200
    """Validation records that `select_by` generates answers for at most."""
    tokens_per_batch: Positive = 16384
    """Tokens, prompts and answers together, that are decoded side by side."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationFields:
        if problems := metric_problems(list(dict.fromkeys(self.metrics))):
            raise ValueError(" ".join(problems))
        if self.select_by != "loss" and self.select_by not in self.metrics:
            unknown = metric_problems([self.select_by])
            remedy = unknown[0].partition(". ")[2] if unknown else "Add it to metrics"
            raise ValueError(f"found select_by: {self.select_by}; expected loss or one of metrics. {remedy}")
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


class Recipe(Section):
    """A whole run."""

    model: str
    """Folder or hub id (`id@revision` pins one) of the pre-trained model."""
    output_dir: str
    """The run folder."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Keep the base model's linear layers in so many bits; methods train beside them. Null: as they are stored."""
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs; auto: an NVIDIA or AMD GPU if there is one. mps is an Apple GPU."""

    @field_validator("model", "output_dir")
    @classmethod
    def _without_control_characters(cls, path: str) -> str:
        if printable(path) != path or "\n" in path:
            raise ValueError(f"found {path!r:.80}, which has a control character in it; expected a path. Remove it")
        if not path.strip():
            raise ValueError("found an empty text; expected a path. Name one")
        return path

    @field_validator("methods")
    @classmethod
    def _method_names(cls, methods: dict[str, MethodFields]) -> dict[str, MethodFields]:
        bad = [name for name in methods if not NAME.fullmatch(name) or name in _RESERVED_NAMES]
        if bad:
            raise ValueError(
                f"found the method name {bad[0]!r}; "
                "expected letters, digits, '.', '_' or '-', and no reserved name. Rename it"
            )
        return methods

    @model_validator(mode="after")
    def _base_answers(self) -> Recipe:
        tasks = {OTHER_TASKS, *(task.name for task in self.data.tasks)} & self.retention.budget.keys()
        if tasks and "zero-shot" not in self.evaluation.baselines:
            raise ValueError(
                f"found a budget of {min(tasks)} and evaluation.baselines without zero-shot; expected it, as a "
                "certificate sets the tuned answers beside the base model's own. Add zero-shot to evaluation.baselines"
            )
        return self

    @model_validator(mode="after")
    def _suites(self) -> Recipe:
        texts = [text.name for text in self.retention.texts]
        untrained = [task.name for task in self.data.tasks if not task.train]
        harness = list(self.retention.harness.tasks)
        names = [*texts, *harness, *(task.name for task in self.data.tasks)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"found {twice[0]!r} twice among tasks, texts and harness tasks; expected each name once. "
                "Rename the task or text"
            )
        own = [SELF_TEXTS] if self.retention.self_texts else []
        read = [*untrained, *texts, *own, *([OTHER_TASKS] if untrained else [])]
        for key, named, suites in (
            ("budget", self.retention.budget, [*read, *harness]),
            ("replay", [self.retention.replay], read),
        ):
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
    value = read_sections(path, overrides=overrides)
    if ranges := range_keys(value):
        expected = "expected a value, as only a search takes ranges. Write a value, or find one with `keeptune search`."
        raise_collected(RecipeError, [f"{path}: {key}: found a range; {expected}" for key in ranges])
    return make_recipe(value, path=path)


def read_sections(path: Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the recipe's sections as they stand in `path`, after `--set key=value` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, or an override names no place.
    """
    value = read_yaml(path)
    if any(override.startswith("methods.") for override in overrides):
        value.setdefault("methods", {"full": {}, "lora": {"peft_type": "LORA"}})
    for override in overrides:
        apply_override(value, override)
    return value


def make_recipe(value: Mapping[str, Any], *, path: Path) -> Recipe:
    """Return the recipe that these sections, which stand in `path`, are.

    Raises:
        RecipeError: any key or value is wrong; all such problems at once.
    """
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        # A union reports one problem for each of its members.
        by_place: dict[str, list[Mapping[str, Any]]] = {}
        for problem in error.errors():
            place = str(problem["loc"]) if problem["type"] == "missing" else existing_key(problem["loc"], value)
            by_place.setdefault(place, []).append(problem)
        inner = list(_inner_ones(by_place))
        # To look for the nearest key of each of thousands would take minutes.
        described = [describe_problem(path, problems, value=value, keys=_KEYS) for problems in inner[:_MAX_DESCRIBED]]
        more = [f"and {len(inner) - _MAX_DESCRIBED:,} more."] if len(inner) > _MAX_DESCRIBED else []
        raise RecipeError("\n".join(described + more)) from error


def is_fractional(key: str) -> bool:
    """Tell whether the setting of a method or of the training at a dotted key may lie between whole numbers."""
    fields = TrainingFields.model_fields if key.startswith("training.") else MethodFields.model_fields
    field = fields.get(key.rpartition(".")[2])
    return field is not None and "float" in str(field.annotation)


# Where each section of a recipe stands; `*` is a number or a name that the recipe chooses.
_SECTIONS: Mapping[str, type[BaseModel]] = {
    "": Recipe,
    "data": DataFields,
    "data.tasks.*": TaskFields,
    "data.mixture": MixtureFields,
    "methods.*": MethodFields,
    "training": TrainingFields,
    "evaluation": EvaluationFields,
    "retention": RetentionFields,
    "retention.texts.*": TextFields,
    "retention.harness": HarnessFields,
}
_KEYS = {section: tuple(fields.model_fields) for section, fields in _SECTIONS.items()}


def _inner_ones(by_place: Mapping[str, list[Mapping[str, Any]]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the problems without those of a place inside which there is another: they only follow from it."""
    parts = [place.split(".") for place in by_place]
    outer = {".".join(part[:i]) for part in parts for i in range(1, len(part))}
    yield from (problems for place, problems in by_place.items() if place not in outer)
