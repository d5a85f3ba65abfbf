"""The part of a recipe that names data: sections of YAML arrive, frozen and typed fields leave."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from keeptune.data.columns import label_key
from keeptune.data.record import ALL_TASKS, OTHER_TASKS, SELF_TEXTS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEAN_ROWS = frozenset({ALL_TASKS, OTHER_TASKS, SELF_TEXTS})
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
PathText = Annotated[str, Field(min_length=1)]
LEAST_LENGTH = 8
"""Tokens that an example has room for at least."""


class Section(BaseModel):
    """A section in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _checked_name(given: str, *, path: str | tuple[str, ...]) -> str:
    """Return a task's or suite's name, the given one or that of its file.

    Raises:
        ValueError: it cannot be a name, or means something else, or several files have none.
    """
    if not given and not isinstance(path, str):
        raise ValueError("found a list of files without a name; expected one for the task. Give the task a `name`")
    stem = Path(path.split("@")[0]).name.split(".")[0] if isinstance(path, str) else ""
    stem = stem.rstrip("*_-") if stem.endswith("*") else stem
    name = given or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64]
    if not NAME.fullmatch(name):
        raise ValueError(
            f"found the task name {name!r}; expected letters, digits, '.', '_' or '-'. Give the task a `name`"
        )
    if name in _MEAN_ROWS:
        raise ValueError(
            f"found the task name {name!r}, under which scores stand of several tasks together; expected another. "
            "Give the task a `name`"
        )
    return name


def _check_columns(columns: Mapping[str, str | Sequence[str]]) -> None:
    """Refuse columns that make no record.

    Raises:
        ValueError: they are neither prompt and completion nor messages, or several stand where one is expected.
    """
    if set(columns) not in ({"prompt", "completion"}, {"messages"}):
        found = ", ".join(columns) or "nothing"
        raise ValueError(
            f"found columns for {found}; expected both prompt and completion, or messages alone. Name them"
        )
    for part in ("completion", "messages"):
        if not isinstance(columns.get(part, ""), str):
            raise ValueError(f"found a list of columns for {part}; expected one. Lists are for the prompt alone")


class TaskFields(Section):
    """One source of rows; a task is scored on its own."""

    path: PathText | Annotated[tuple[PathText, ...], Field(min_length=1)]
    """File (.json, .jsonl, .csv, .tsv, .parquet, .arrow; .gz accepted), folder or hub id `owner/name`; or several files
    as one task: a list, or a pattern such as `ag_news_*.jsonl`."""
    name: str = ""
    """The task's name in scores and reports; default: the file's name without its suffixes."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    config: str | None = None
    """Configuration of a hub id, such as `sst2` of `nyu-mll/glue`; needed where it has several and no default."""
    split: str | None = None
    """The one split of a hub id to read, which keeptune splits; default: train, validation and test as they are."""
    validation: str | None = None
    """Own validation file, taken as it is."""
    test: str | None = None
    """Own test file, taken as it is."""
    columns: (
        dict[Literal["prompt", "completion", "messages"], str | Annotated[tuple[str, ...], Field(min_length=1)]] | None
    ) = None
    """Names of the columns that hold prompt and completion, or of the one that holds messages, where no known format
    fits. A list of columns makes one prompt, each behind its name."""
    labels: dict[str, str] | None = None
    """What completions are called: a list for the numbers 0, 1 …, or value → name."""
    ignore: tuple[str, ...] | None = None
    """Columns that need not be read, such as pictures that the text does not speak of."""
    instruction: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A line put before every prompt of the named columns; of a list the one that the prompt's hash chooses."""
    max_records: Positive | None = None
    """Keep at most this many records, chosen by hash; default: all."""
    train: bool = True
    """Train on it; false: score it only, to see what tuning on the others changed there."""

    @field_validator("labels", mode="before")
    @classmethod
    def _by_value(cls, value: Any) -> Any:
        """Return labels by the text of their value; YAML reads `no` and `1` as other things than text."""
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return value
        names = [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in value.values()]
        if any(isinstance(name, bool) for name in names):
            raise ValueError("found true or false in labels, as YAML reads yes and no; expected text. Quote the names")
        return {label_key(key): name for key, name in zip(value, names, strict=True)}

    @model_validator(mode="after")
    def _named(self) -> TaskFields:
        name = _checked_name(self.name, path=self.path)
        if self.validation is not None and not self.train:
            raise ValueError(
                "found validation beside train: false; expected test alone, because a task that is not trained on "
                "chooses nothing. Remove validation"
            )
        if self.columns is not None:
            _check_columns({part: named for part, named in self.columns.items()})
        if self.instruction is not None and self.columns is None:
            raise ValueError(
                "found instruction without columns, where it has no effect; expected both. Add columns, or remove it"
            )
        object.__setattr__(self, "name", name)
        return self


class MixtureFields(Section):
    """How many examples of each task an epoch shows; all together, the tasks' train records, up to `cap` of each."""

    cap: Positive | None = None
    """Train records of a task that count at most; default: all."""
    temperature: Annotated[float, Field(ge=1.0)] = 1.0
    """A task's part is proportional to its counted records to the power of 1 / temperature."""
    weights: dict[str, Annotated[float, Field(gt=0.0)]] | None = None
    """Task → its part in an epoch, relative to the others', in place of `cap` and `temperature`."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureFields:
        if self.weights is not None and (self.cap is not None or self.temperature != 1.0):
            found = "cap" if self.cap is not None else "temperature"
            raise ValueError(f"found {found} beside weights, where it has no effect; expected one of them. Remove one")
        return self


def _kind_of_mixture(value: Any) -> str:
    return "equal" if isinstance(value, str) else "section"


class DataFields(Section):
    """What is read, how it is split, mixed and rendered."""

    tasks: Annotated[tuple[TaskFields, ...], Field(min_length=1)]
    """The sources."""
    validation_fraction: Fraction = 0.1
    """Expected share of each task that hyper-parameters are chosen on."""
    test_fraction: Fraction = 0.1
    """Expected share of each task that is opened once, at the end."""
    template: Literal["auto", "chat", "chatml", "alpaca", "plain"] = "auto"
    """How messages become text; auto: the tokenizer's chat template, else alpaca (encoder-decoder: plain)."""
    max_length: Annotated[int, Field(ge=LEAST_LENGTH)] = 1024
    """Tokens of an example at most (encoder-decoder: of each side)."""
    over_length: Literal["error", "drop", "cut"] = "error"
    """A longer record stops the run, is dropped, or loses the middle of its prompt."""
    train_on: Literal["all", "last"] = "all"
    """Train on every assistant message of a conversation, or on the last alone."""
    enable_thinking: bool = False
    """Let answers begin with thoughts, where the chat template has that switch."""
    drop_incomplete: bool = False
    """Count and drop rows that cannot be read or are no valid record, instead of stopping."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to an exact copy of a record."""
    leaks: Literal["auto", "drop", "keep"] = "auto"
    """What happens to train records that overlap with validation or test. auto: they are dropped, but for those of a
    task that brings along the validation or test file that they overlap with."""
    mixture: (
        Annotated[
            Annotated[MixtureFields, Tag("section")] | Annotated[Literal["equal"], Tag("equal")],
            Discriminator(_kind_of_mixture),
        ]
        | None
    ) = None
    """How many examples of each task an epoch shows, `equal` for as many of each; null: every train record once."""

    @field_validator("mixture", mode="before")
    @classmethod
    def _a_form_of_mixture(cls, value: Any) -> Any:
        if value is None or value == "equal" or isinstance(value, dict | MixtureFields):
            return value
        forms = "equal, {cap: K, temperature: T} or {weights: {task: number}}"
        raise ValueError(f"found {value!r}; expected {forms}. Write one of these")

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
        if isinstance(self.mixture, MixtureFields) and self.mixture.weights is not None:
            self._refuse_weights_of_other_tasks(self.mixture.weights)
        if sum(task.train for task in self.tasks) == 1:
            self._refuse_parts_of_one_task()
        return self

    def _refuse_parts_of_one_task(self) -> None:
        """Of a mixture, only a cap does anything to a single task."""
        found = "equal" if self.mixture == "equal" else ""
        if isinstance(self.mixture, MixtureFields):
            parts = {"weights": self.mixture.weights is not None, "temperature": self.mixture.temperature != 1.0}
            found = next((key for key, is_given in parts.items() if is_given), "")
        if found:
            raise ValueError(
                f"found {found} as mixture, and one task that is trained on, where it has no effect; expected several "
                "such tasks. Remove it"
            )

    def _refuse_weights_of_other_tasks(self, weights: dict[str, float]) -> None:
        trained = [task.name for task in self.tasks if task.train]
        for name in weights:
            if name in trained:
                continue
            if any(task.name == name for task in self.tasks):
                raise ValueError(
                    f"found a weight for {name!r} in mixture.weights, a task with train: false; expected tasks that "
                    "are trained on. Remove the weight, or train: false"
                )
            near = difflib.get_close_matches(name, trained, n=1, cutoff=0.5)
            remedy = f"Did you mean {near[0]!r}?" if near else "Remove the weight"
            raise ValueError(
                f"found a weight for {name!r} in mixture.weights; expected a task that is trained on: "
                f"{', '.join(trained)}. {remedy}"
            )
        if missing := [name for name in trained if name not in weights]:
            raise ValueError(
                f"found no weight for {missing[0]!r} in mixture.weights; expected one for each task that is trained "
                "on. Add it, or set train: false in that task"
            )


class TextFields(Section):
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


class HarnessFields(Section):
    """Tasks of lm-evaluation-harness, each a suite under its own name; needs `keeptune[harness]`."""

    tasks: tuple[str, ...] = ()
    """Names of its tasks or groups, such as arc_easy or mmlu."""
    include_path: str | None = None
    """Folder with task files (.yaml) of one's own. Python functions that they name are run."""
    max_records: Positive | None = None
    """Keep at most this many documents of a suite, chosen by hash; default: all."""
    apply_chat_template: bool = False
    """Put the template of the run around every prompt; false: plain prompts, as the harness does by default."""

    @model_validator(mode="after")
    def _consistent(self) -> HarnessFields:
        given = [key for key in ("include_path", "max_records", "apply_chat_template") if getattr(self, key)]
        if given and not self.tasks:
            raise ValueError(f"found {given[0]} without tasks, where it has no effect; expected both. Name tasks")
        if taken := sorted(_MEAN_ROWS & set(self.tasks)):
            raise ValueError(f"found the harness task {taken[0]!r}, a name that means something else. Rename the task")
        return self


class RetentionFields(Section):
    """What must not be lost, and how much of it may be."""

    texts: tuple[TextFields, ...] = ()
    """General text, as suites beside the tasks with `train: false`."""
    harness: HarnessFields = HarnessFields()
    """Tasks of lm-evaluation-harness by name, as further suites."""
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
    `train: false`, `others` (all of them together), `texts` and `harness.tasks` by name, and self."""
    loss_cap: Annotated[float, Field(gt=0.0)] = 1.0
    """Nats per token that one record may lose or gain in a budget in nats; more counts as this. Without such a cap no
    number of records could rule out a rare large loss."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Of the certificate: one minus the chance that it is given wrongly."""
    probe_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Of each task with `train: false` under a budget, the share that a search may look at and no certificate does;
    `keeptune search` takes 0.2 where the recipe names none, and writes it into the recipe with its best settings."""
    ledger: str | None = None
    """File in which openings of certify records are counted, for all who share it; default: one of the user's own, in
    `$XDG_DATA_HOME/keeptune/ledger`."""
    alphas: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | Literal["auto"] = "auto"
    """Points of the path from the base (0) to the tuned model (1) that are measured, in rising order; auto: 0.1, 0.2
    … 1.0 where there is a budget, else 1.0 alone."""

    @field_validator("budget", mode="before")
    @classmethod
    def _with_its_unit(cls, value: Any) -> Any:
        """A bare number is text without a unit, which its own message says when budgets are read."""
        if not isinstance(value, dict):
            return value
        return {suite: str(text) if isinstance(text, int | float) else text for suite, text in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> RetentionFields:
        in_nats = any("nat" in text.lower() for text in self.budget.values())
        if self.loss_cap != type(self).model_fields["loss_cap"].default and not in_nats:
            raise ValueError("found loss_cap without effect; expected it with a budget in nats. Remove it")
        if not self.budget and (given := [key for key in ("ledger", "probe_fraction") if getattr(self, key)]):
            raise ValueError(f"found {given[0]} without effect; expected it with a budget. Remove it")
        if self.alphas != "auto" and (not self.alphas or list(self.alphas) != sorted(set(self.alphas))):
            raise ValueError(f"found alphas: {list(self.alphas)}; expected different numbers that rise. Sort them")
        return self
