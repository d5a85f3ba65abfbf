"""Few-shot baselines: the recipe's rows arrive; a split's records leave behind solved examples of the train split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from keeptune.config import EvaluationFields
from keeptune.data.record import Record
from keeptune.progress import noun
from keeptune.stages.data import Data, max_new_tokens_on_test
from keeptune.stages.run import Run

if TYPE_CHECKING:
    from keeptune.evaluation.evaluate import Exemplars, Split
    from keeptune.text.shots import Room

# Part of the key of every row: raise it when the same row shows other exemplars, or shows them otherwise.
SHOTS_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShotRow:
    """Answers of the base model behind `num_shots` exemplars: of one random choice, counted from 1, or the nearest."""

    num_shots: int
    draw: int | Literal["nearest"]

    @property
    def name(self) -> str:
        """The row as openings, differences and the report name it."""
        if self.draw == "nearest":
            return f"base, {self.num_shots} nearest {noun(self.num_shots, 'shots')}"
        return f"base, {self.num_shots} {noun(self.num_shots, 'shots')}, draw {self.draw}"

    @property
    def folder(self) -> str:
        """The name of its folder among the base model's."""
        return f"{self.num_shots}-shot-{'nearest' if self.draw == 'nearest' else f'draw-{self.draw}'}"


def shot_rows(evaluation: EvaluationFields) -> list[ShotRow]:
    """Return the rows that a recipe asks for."""
    rows = []
    if "few-shot" in evaluation.baselines:
        draws = range(1, evaluation.num_draws + 1)
        rows += [ShotRow(number, draw) for number in evaluation.num_shots for draw in draws]
    if "nearest" in evaluation.baselines:
        rows.append(ShotRow(max(evaluation.num_shots), "nearest"))
    return rows


def split_behind(
    row: ShotRow, *, run: Run, data: Data, split: Split, train: Sequence[Record]
) -> tuple[Split, Exemplars, str]:
    """Return a split's records of the trained tasks behind the row's exemplars, and why the row is left out, if it is.

    How many records show fewer exemplars than the row asks for is said.
    """
    from keeptune.evaluation.shots import shown_split, trained_part
    from keeptune.text.shots import Room

    base, asked = data.base, trained_part(split)
    chosen = _chosen(row, questions=asked.records, train=train, seed=run.recipe.seed)
    room = Room(max_new_tokens_on_test(run.recipe, data), base.facts.max_positions, base.facts.encoder_decoder)
    behind, exemplars, refusal = shown_split(
        asked,
        chosen,
        row=row.name,
        draw=row.draw,
        num_shots=row.num_shots,
        tokenizer=base.tokenizer,
        template=base.template,
        room=room,
        progress=run.progress,
    )
    total, without = len(chosen), exemplars.num_without_exemplars
    if without == total:
        left_out = _left_out(row, asked=asked, room=room, refusal=refusal) if any(chosen) else _no_train(row, asked)
        run.progress.say(left_out)
        return behind, exemplars, left_out
    if exemplars.num_fitted:
        refused = f" ({exemplars.num_refused:,} of these, since the template refuses: {refusal})" if refusal else ""
        run.progress.say(f"{row.name}: {_fewer(exemplars, num_records=total, num_shots=row.num_shots)}{refused}")
    return behind, exemplars, ""


def _fewer(exemplars: Exemplars, *, num_records: int, num_shots: int) -> str:
    """Return how many records show fewer examples than were asked for."""
    of_all = f"{exemplars.num_fitted:,} of {num_records:,} records show"
    if num_shots == 1:
        return f"{of_all} no example, as there is none or no room for it"
    return (
        f"{of_all} fewer than {num_shots} examples, as many as there are or have room (mean "
        f"{exemplars.num_shown_mean:.2f}); {exemplars.num_without_exemplars:,} show none"
    )


def _chosen(row: ShotRow, *, questions: Sequence[Record], train: Sequence[Record], seed: int) -> list[Sequence[Record]]:
    from keeptune.data.exemplars import drawn_exemplars, nearest_exemplars

    if row.draw == "nearest":
        return list(nearest_exemplars(train, questions=questions, num_shots=row.num_shots))
    drawn = drawn_exemplars(train, seed=seed, num_shots=row.num_shots, draw=row.draw)
    return [drawn.get(question.task, []) for question in questions]


def _left_out(row: ShotRow, *, asked: Split, room: Room, refusal: str) -> str:
    baseline = "nearest" if row.draw == "nearest" else "few-shot"
    if refusal:
        return (
            f"{row.name}: the template refuses solved examples before a prompt ({refusal}). Remove {baseline} from "
            "evaluation.baselines, or choose another data.template in another output_dir."
        )
    return (
        f"{row.name}: no solved example fits before any of the {len(asked.records):,} {asked.name} prompts. The model "
        f"has {room.max_positions:,} positions, and {room.max_new_tokens:,} of them are kept for the answer. Lower "
        f"evaluation.max_new_tokens, or remove {baseline} from evaluation.baselines."
    )


def _no_train(row: ShotRow, asked: Split) -> str:
    return (
        f"{row.name}: the tasks in {asked.name} have no train record to show as an example. Give these tasks train "
        "records."
    )
