"""One given model or adapter folder arrives; a verdict on what it lost against the run's base leaves.

It may be merged, quantised or saved anew, or another tool's tuning of the same base: the certificate that a run makes
for its own model does not speak of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.errors import RecipeError
from keeptune.report.certificate import read_certificate
from keeptune.stages.budgets import main_metric, require_budget
from keeptune.stages.certified import CERTIFICATE, CERTIFICATES, artifact_sha256, certificates_of, changed_file
from keeptune.stages.certify import certificate_facts, question_key
from keeptune.stages.certify_openings import Opening
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, max_new_tokens_on_test, prepare
from keeptune.stages.evaluation import answer_base
from keeptune.stages.harness import Harness, ask_base
from keeptune.stages.left_out import at_chance, judged_by_test, reported_answers, tested_budgets
from keeptune.stages.methods import method_of
from keeptune.stages.run import TRAINING, Run, intact_record, stage_key
from keeptune.stages.session import (
    Session,
    base_answers,
    certify_answers,
    drops_of,
    forget_answers,
    open_session,
    read_suites,
)
from keeptune.stages.way import load_at
from keeptune.storage import MANIFEST, read_record, require_unchanged, write_record

if TYPE_CHECKING:
    from torch import nn

    from keeptune.retention.budget import Budget
    from keeptune.retention.chance import LeftOut
    from keeptune.retention.drops import Drops
    from keeptune.retention.walk import Walk
    from keeptune.text.tokenizer import Tokenizer

_KEY_DIGITS = 8
# Train records whose texts two tokenizers are compared on.
_COMPARED_RECORDS = 1000


@dataclass(frozen=True, slots=True)
class ArtifactCertificate:
    """Where the certificate of a folder stands, and the lines that say what it says."""

    path: Path
    lines: tuple[str, ...]


def certify_artifact(run: Run, folder: Path) -> ArtifactCertificate:
    """Test whether a model or adapter folder keeps every budget, and write a certificate that names it by its hashes.

    It is one candidate. The base's answers are those of the run; the certify records are opened once more. The run's
    own certificate and model stay as they are. A folder that was certified and holds the same files is not asked again.

    Raises:
        DataError: the recipe has no budget, or one of suites alone that the base answers at chance.
        RecipeError: the folder is no model, or reads the records otherwise than the run's models.
        StorageError: a file in the folder is not as its manifest says.
    """
    from keeptune.retention.drops import largest_inputs

    require_budget(run.recipe)
    require_unchanged(folder)
    data = prepare(run)
    _refuse_unlike(folder, run=run, data=data)
    suites = read_suites(run, data)
    texts, harness, budgets = suites.texts, suites.harness, suites.budgets
    left_out = _left_out(run, data, budgets=budgets, harness=harness)
    hashes = artifact_sha256(folder)
    key = stage_key(
        data=data.key,
        texts=texts.key if texts is not None else None,
        harness=harness.key if harness is not None else None,
        artifact=hashes,
        base=data.base.facts.sha256,
        budgets={suite: asdict(budget) for suite, budget in budgets.items()},
        confidence=run.recipe.retention.confidence,
        metric=main_metric(run.recipe),
        max_new_tokens=max_new_tokens_on_test(run.recipe, data),
        left_out=[one.name for one in left_out],
        **policy_of(run.recipe).answers_key(),
    )
    session = Session(run, data, texts, harness, budgets, left_out, largest_inputs(reported_answers(run)), key)
    if (certified := _delivered(session, folder, hashes=hashes)) is not None:
        return certified
    name = f"{folder.resolve().name}-{stage_key(artifact=hashes)[:_KEY_DIGITS]}"
    path = run.folder / CERTIFICATES / f"{name}.json"
    if intact_record(path, say=run.context.progress.say).get("key") == key:
        run.context.progress.say(f"{path}: certified before and unchanged")
        return _read(path)
    for earlier in certificates_of(folder, runs=[run.folder]):
        if (changed := changed_file(earlier)) is not None:
            run.context.progress.say(f"{changed}. What stands there now gets a certificate of its own.")
    opening = open_session(session, [name], certificate=path)
    walked = _tested(session, folder, name=name, opening=opening)
    _write(session, walked, folder=folder, hashes=hashes, opening=opening, path=path)
    forget_answers(run, run.folder / CERTIFICATES / name)
    return _read(path)


def _delivered(session: Session, folder: Path, *, hashes: Mapping[str, str]) -> ArtifactCertificate | None:
    """Return the run's own certificate where it speaks of these very files and answers what the recipe asks now."""
    run, path = session.run, session.run.folder / CERTIFICATE
    value = intact_record(path, say=run.context.progress.say)
    if not value.get("artifact") or value["artifact"]["sha256"] != hashes:
        return None
    methods = {name: method_of(run.recipe, name) for name in run.recipe.methods}
    # A method that the recipe has now may not be trained yet: then the certificate answered another question.
    trained = all((run.folder / name / TRAINING).is_file() for name in methods)
    if not trained or value["key"] != question_key(session, methods):
        return None
    certificate = read_certificate(value)
    assert certificate is not None, "a certificate without a verdict"
    own = f"{folder}: its files are those that {path} speaks of; no record was opened."
    return ArtifactCertificate(path, (certificate.heading, value["sentence"], own, f"Certificate: {path}"))


def _left_out(run: Run, data: Data, *, budgets: Mapping[str, Budget], harness: Harness | None) -> tuple[LeftOut, ...]:
    """Return the suites with nothing to lose, by what the base answers to the report part: nothing is chosen by others.

    Raises:
        DataError: none is left to test.
    """
    if judged_by_test(budgets, data):
        answer_base(run, data)
    if harness is not None:
        ask_base(run, data, harness=harness)
    found = at_chance(run, data, reported_answers(run), budgets=budgets, harness=harness)
    tested_budgets(budgets, found)
    return found


def _refuse_unlike(folder: Path, *, run: Run, data: Data) -> None:
    """Refuse what is no model, and a model that would be asked other tokens than the base was."""
    from keeptune.model.folder import ADAPTER_CONFIG, adapter_base, adapter_quantization, check_model_folder
    from keeptune.text.tokenizer import Tokenizer

    base, bits = data.base, data.base.facts.quantization
    if (folder / ADAPTER_CONFIG).is_file():
        trained = adapter_quantization(folder)
        if (folder / MANIFEST).is_file() and trained != bits:
            raise RecipeError(
                f"{folder}: found an adapter that was trained over {trained or 'unquantised'} weights; expected one "
                f"over the run's {bits or 'unquantised'} ones. Certify it with a recipe of its own quantization."
            )
        named = Path(adapter_base(folder)).expanduser()
        # A hub id is the run's own, or nothing shows that it has the same weights. The run's base may be quantised as
        # it is read; the hash says so.
        found = replace(check_model_folder(named), quantization=bits).sha256 if named.is_dir() else None
        if found != base.facts.sha256 and (found is not None or str(named) != base.name):
            raise RecipeError(
                f"{folder}: found an adapter on {named}, whose weights are not those of the run's base model "
                f"{base.folder}; expected an adapter on that one. Certify it with a recipe of its own base."
            )
    elif not (folder / "config.json").is_file():
        inside = next((n for n in ("adapter", "model", "instruct-model") if (folder / n).is_dir()), None)
        remedy = f"Name {folder / inside}." if inside else "Name the folder that holds one of these files."
        raise RecipeError(
            f"--artifact {folder}: found no model; expected a folder with config.json or {ADAPTER_CONFIG}. {remedy}"
        )
    else:
        facts = check_model_folder(folder)
        mine, theirs = (f.encoder_decoder for f in (facts, base.facts))
        if mine != theirs or facts.vocab_size < base.tokenizer.vocab_size:
            raise RecipeError(
                f"{folder}: found a {facts.model_type} model of {facts.vocab_size} tokens; expected a tuning of the "
                f"run's base model, a {base.facts.model_type} model of {base.facts.vocab_size}. Certify it with a "
                "recipe of its own base."
            )
    if not (folder / "tokenizer.json").is_file():
        return
    own = Tokenizer.load(folder)
    if not _reads_alike(own, data):
        raise RecipeError(
            f"{folder / 'tokenizer.json'}: found a tokenizer that gives other ids than the run's; expected the same. "
            "What the base answered was asked in the run's tokens, so nothing could be compared record by record. "
            f"Put the tokenizer of {base.folder} there, or certify with a recipe whose base has this one."
        )
    if own.chat_template is not None and own.chat_template.strip() != base.template.chat_template.strip():
        raise RecipeError(
            f"{folder}: found another chat template than the run's ({base.template.name}); expected the same. Whoever "
            "serves this folder would put other prompts before the model than those that are certified. Copy "
            f"chat_template.jinja from an artifact of {run.folder} there, or certify with a recipe of that template."
        )


def _reads_alike(own: Tokenizer, data: Data) -> bool:
    """Tell whether a tokenizer gives the ids of the run's for the texts of train records."""
    theirs = data.base.tokenizer
    if own.special_tokens != theirs.special_tokens:
        return False
    records = data.records("train", at_most=_COMPARED_RECORDS)
    texts = [text for record in records for text in (record.prompt, record.completion)]
    return all(own.encode(texts, first=first) == theirs.encode(texts, first=first) for first in (True, False))


def _tested(session: Session, folder: Path, *, name: str, opening: Opening) -> Walk:
    from keeptune.model.folder import ADAPTER_CONFIG
    from keeptune.retention.ledger import confidence_left
    from keeptune.retention.walk import Candidate, walk

    run, data = session.run, session.data
    base = base_answers(session)
    if not (folder / ADAPTER_CONFIG).is_file():
        # A whole model is what its files hold, however the run reads its base.
        data = replace(data, base=replace(data.base, facts=replace(data.base.facts, quantization=None)))
    loaded: list[nn.Module] = []

    def model() -> nn.Module:
        if not loaded:
            loaded.append(load_at(run, data, folder, name=name))
        return loaded[0]

    def drops_at(_name: str, _alpha: float) -> Mapping[str, Drops]:
        place = run.folder / CERTIFICATES / name
        return drops_of(session, base, certify_answers(session, model, name=name, folder=place))

    left = 1.0 - run.recipe.retention.confidence
    delta = confidence_left(left, opening=opening.number, num_suites=len(session.budgets))
    candidate = Candidate(name, (1.0,))
    return walk([candidate], budgets=session.tested, delta=delta, drops_at=drops_at, watched=session.watched)


def _write(
    session: Session, walked: Walk, *, folder: Path, hashes: Mapping[str, str], opening: Opening, path: Path
) -> None:
    from keeptune.retention.verdict import verdict

    choice = next(iter(walked.certified), None)
    found = verdict(walked, choice=choice, left_out=session.left_out, one_model=True)
    value = {
        **certificate_facts(session, walked, found, opening=opening),
        "artifact": {"folder": str(folder.resolve()), "sha256": dict(hashes)},
        "base": {"name": session.data.base.name, "sha256": session.data.base.facts.sha256},
    }
    write_record(path, value)


def _read(path: Path) -> ArtifactCertificate:
    value = read_record(path)
    certificate = read_certificate(value)
    assert certificate is not None, "a certificate without a verdict"
    weights = [name for name in value["artifact"]["sha256"] if name.endswith(".safetensors")]
    named = ", ".join(f"{name} {value['artifact']['sha256'][name][:16]}" for name in weights)
    return ArtifactCertificate(
        path,
        (
            certificate.heading,
            value["sentence"],
            f"It speaks of {value['artifact']['folder']} ({named}), and of no other file.",
            f"Opening {value['opening']} of the certify records; each later one may use half of the error left.",
            f"Certificate: {path}",
        ),
    )
