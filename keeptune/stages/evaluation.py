"""The test: trained methods arrive; scores, paired differences, what was forgotten and the instruct model leave.

This stage alone opens the test split, and each opening is written down.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.data.record import Record
from keeptune.errors import DataError
from keeptune.stages.certified import CERTIFICATE
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, evaluation_split, max_new_tokens_on_test, prepare
from keeptune.stages.harness import Harness, write_harness
from keeptune.stages.instruct import deliver, model_card
from keeptune.stages.methods import method_of
from keeptune.stages.openings import record_opening
from keeptune.stages.retention import measure
from keeptune.stages.run import CARD, SELECTION, Run, is_done, stage_key
from keeptune.stages.shots import SHOTS_VERSION, ShotRow, shot_rows, split_behind
from keeptune.stages.texts import Texts, keep_texts, write_texts
from keeptune.stages.training import artifact_folder, make_bench, training_key
from keeptune.stages.validation import describe_tie, higher_is_better
from keeptune.stages.way import BASE, TEST, ZERO_SHOT, load_at, points, trained_facts
from keeptune.storage import storage_errors, write_record

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.evaluate import Bench, Split
    from keeptune.evaluation.metrics import Answer
    from keeptune.model.methods import Method
    from keeptune.stages.keep import KeepTexts


@dataclass(frozen=True, slots=True)
class _Entrant:
    """A model that is tested: the base model where `method` is None, behind exemplars where there are `shots`."""

    name: str
    method: Method | None
    folder: Path
    key: str
    shots: ShotRow | None = None


def evaluate(
    run: Run, *, data: Data | None = None, texts: Texts | None = None, harness: Harness | None = None
) -> Path | None:
    """Score base and methods on test, measure what was forgotten, and deliver the method that validation selected.

    Returns the instruct model's folder; None where a budget leaves the choice to `certify`. `data`, `texts` and
    `harness` are what `prepare`, `write_texts` and `write_harness` returned for this run; without them, they are made
    here.

    Raises:
        DataError: a method is not trained yet.
    """
    from keeptune.model.card import card_to_json

    data = data or prepare(run)
    texts = texts or write_texts(run, data)
    harness = harness or write_harness(run, data)
    kept = keep_texts(run.recipe, data, texts)
    methods = [method_of(run.recipe, name) for name in run.recipe.methods]
    baselines = [None] if "zero-shot" in run.recipe.evaluation.baselines else []
    entrants = [_entrant(run, data, method, kept=kept) for method in baselines]
    entrants += [_entrant(run, data, None, shots=row) for row in shot_rows(run.recipe.evaluation)]
    entrants += [_entrant(run, data, method, kept=kept) for method in methods]
    if not _answer_test(run, data, entrants):
        run.context.progress.say(f"{run.folder}: evaluated before and unchanged")
    _write_paired(run, data, entrants)
    trained = {method.name: points(run, method)[-1] for method in methods}
    measure(run, data, texts, harness=harness)
    for point in trained.values():
        write_record(point.folder / CARD, card_to_json(model_card(run, data, point)))
    if run.recipe.retention.budget:
        return None
    # Validation alone chooses now; a certificate of the time when there was a budget speaks of another model.
    with storage_errors(run.folder):
        (run.folder / CERTIFICATE).unlink(missing_ok=True)
    return deliver(run, data, trained[_select(run, methods).name])


def answer_base(run: Run, data: Data) -> None:
    """Let the base model alone answer test, unless it did."""
    _answer_test(run, data, [_entrant(run, data, None)])


def _answer_test(run: Run, data: Data, entrants: Sequence[_Entrant]) -> bool:
    """Let the models answer test that have not, and write its opening down; tell whether there were any."""
    waiting = [entrant for entrant in entrants if not is_done(entrant.folder, entrant.key)]
    if not waiting:
        return False
    record_opening(run, data, keys={entrant.name: entrant.key for entrant in waiting})
    split = evaluation_split(data, "test")
    train = data.records("train") if any(entrant.shots for entrant in waiting) else []
    # The base model is loaded once for all of its rows.
    for _, of_one_model in itertools.groupby(waiting, key=lambda entrant: entrant.method):
        _evaluate_model(run, data, list(of_one_model), split=split, train=train)
    return True


def _entrant(
    run: Run, data: Data, method: Method | None, *, kept: KeepTexts | None = None, shots: ShotRow | None = None
) -> _Entrant:
    evaluation = run.recipe.evaluation
    trained = None
    if method is not None:
        facts = trained_facts(run, method)
        trained = facts["key"]
        if trained != training_key(run.recipe, data, method, texts=kept):
            _refuse_trained_elsewhere(run, method, facts)
            raise DataError(
                f"{run.folder / method.name}: found a model trained on other data, settings or base weights; expected "
                "those of this recipe. Run `keeptune train` first, or choose another output_dir."
            )
    key = stage_key(
        data=data.key,
        weights=data.base.facts.sha256,
        trained=trained,
        metrics=list(evaluation.metrics),
        max_new_tokens=max_new_tokens_on_test(run.recipe, data),
        **({"shots": [SHOTS_VERSION, shots.num_shots, shots.draw]} if shots else {}),
        **policy_of(run.recipe).answers_key(),
    )
    if shots is not None:
        return _Entrant(shots.name, None, run.folder / BASE / shots.folder, key, shots=shots)
    if method is None:
        return _Entrant(BASE, None, run.folder / BASE / ZERO_SHOT, key)
    return _Entrant(method.name, method, run.folder / method.name / TEST, key)


def _refuse_trained_elsewhere(run: Run, method: Method, facts: Mapping[str, Any]) -> None:
    """Refuse a model that was trained on another device or in another number format than this command's."""
    trained, here = (facts.get("device"), facts.get("dtype")), policy_of(run.recipe).trains_in
    if trained != here:
        raise DataError(
            f"{run.folder / method.name}: found a model trained on {trained[0]} in {trained[1]}; expected {here[0]} in "
            f"{here[1]}, as this command computes. Evaluate it where it was trained, set device or training.bf16, or "
            "choose another output_dir."
        )


def _evaluate_model(run: Run, data: Data, entrants: list[_Entrant], *, split: Split, train: Sequence[Record]) -> None:
    """Load the one model of the entrants and let it answer for each of them."""
    run.poll()
    name, method = entrants[0].name, entrants[0].method
    artifact = data.base.folder if method is None else artifact_folder(run.folder / method.name, method)
    model = load_at(run, data, artifact, name=name)
    bench = make_bench(run, data, model, max_new_tokens=max_new_tokens_on_test(run.recipe, data))
    for entrant in entrants:
        run.poll()
        _evaluate_entrant(run, data, entrant, split=split, train=train, model=model, bench=bench)
    del model
    gc.collect()


def _evaluate_entrant(
    run: Run,
    data: Data,
    entrant: _Entrant,
    *,
    split: Split,
    train: Sequence[Record],
    model: nn.Module,
    bench: Bench,
) -> None:
    from keeptune.evaluation.evaluate import evaluate_model
    from keeptune.evaluation.shots import write_left_out

    name, num_shots, exemplars = entrant.name, 0, None
    facts = {"key": entrant.key, "created": run.context.now()}
    if entrant.shots is not None:
        name, num_shots = BASE, entrant.shots.num_shots
        split, exemplars, left_out = split_behind(entrant.shots, run=run, data=data, split=split, train=train)
        if left_out:
            write_left_out(
                entrant.folder, name=name, shots=num_shots, exemplars=exemplars, reason=left_out, facts=facts
            )
            return
    run.context.progress.say(f"{entrant.name}: answering the {len(split.records):,} records of test")
    evaluate_model(
        model,
        split=split,
        bench=bench,
        metrics=run.recipe.evaluation.metrics,
        name=name,
        shots=num_shots,
        folder=entrant.folder,
        facts=facts,
        exemplars=exemplars,
    )


def _write_paired(run: Run, data: Data, entrants: list[_Entrant]) -> None:
    """Write every method against the base model, alone and behind examples, and the methods against each other.

    Behind examples the base answers the records of the trained tasks alone: the difference is over these.
    """
    from keeptune.evaluation.evaluate import SAMPLES, read_answers
    from keeptune.evaluation.metrics import with_loss
    from keeptune.evaluation.scores import paired_differences

    metrics = with_loss(run.recipe.evaluation.metrics)
    answered = [entrant for entrant in entrants if (entrant.folder / SAMPLES).is_file()]
    answers: dict[str, list[Answer]] = {entrant.name: read_answers(entrant.folder) for entrant in answered}
    paired = []
    for i, entrant in enumerate(answered):
        for against in answered[:i] if entrant.shots is None else []:
            theirs = answers[against.name]
            shared = {answer.id for answer in theirs} if against.shots else None
            mine = [answer for answer in answers[entrant.name] if shared is None or answer.id in shared]
            paired += [
                asdict(difference)
                for difference in paired_differences(
                    mine,
                    theirs,
                    metrics=metrics,
                    model=entrant.name,
                    against=against.name,
                    untrained_tasks=data.untrained_tasks,
                )
            ]
    write_record(run.folder / "paired.json", {"paired": paired})


def _select(run: Run, methods: list[Method]) -> Method:
    """Choose the method with the best value on validation and write down why.

    Of equal values the one with the lowest validation loss is best, of equal losses the first.
    """
    trained = {method.name: trained_facts(run, method) for method in methods}
    values = {name: facts["best_value"] for name, facts in trained.items()}
    losses = {name: facts.get("best_loss") for name, facts in trained.items()}
    sign = 1.0 if higher_is_better(run.recipe) else -1.0
    known = [method for method in methods if values[method.name] is not None]

    def merit(method: Method) -> tuple[float, float]:
        loss = losses[method.name]
        return sign * values[method.name], -loss if loss is not None and math.isfinite(loss) else -math.inf

    selected = max(known, key=merit, default=methods[0])
    metric = run.recipe.evaluation.select_by
    note = describe_tie(selected.name, metric=metric, values=values)
    if note:
        run.context.progress.say(note)
    facts = {"selected": selected.name, "metric": metric, "split": "validation", "values": values, "note": note}
    write_record(run.folder / SELECTION, facts)
    return selected
