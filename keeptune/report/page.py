"""A run folder arrives; `report.html`, one page that asks nothing of the outside, and `report.json` leave."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from keeptune import __version__
from keeptune.progress import noun
from keeptune.report import explained, losses, wording
from keeptune.report.broken import broken_rows, broken_sentence, label_sentences
from keeptune.report.curve_panels import curve_panels
from keeptune.report.growth import growth_panels, read_growth
from keeptune.report.guide import guide
from keeptune.report.headline import (
    KeyNumber,
    Phrase,
    broken_sentences,
    headline,
    key_numbers,
    others_sentence,
    shots_sentence,
)
from keeptune.report.layout import colours, paired_groups, score_groups, task_tables
from keeptune.report.looks import looks_sentence, num_looks
from keeptune.report.lost_words import forgotten_numbers
from keeptune.report.reading import RunFolder
from keeptune.report.search import read_search, setting
from keeptune.report.search_figures import search_panels
from keeptune.report.shots import few_shot_left_out
from keeptune.report.tables import Report, read_report
from keeptune.report.tested import tested_rows
from keeptune.report.verdict import alpha_sentence, opening_sentence, verdict_sentence
from keeptune.storage import write_atomic

VERSION = 1
_HERE = Path(__file__).parent
_FILTERS = (
    wording.about,
    wording.clipped,
    wording.count,
    wording.decimal,
    wording.key_label,
    wording.metric_label,
    wording.num_bytes,
    wording.parameters,
    wording.percent,
    wording.rate,
    wording.seconds,
    wording.thousands,
    noun,
    setting,
)


def write_report(run: Path) -> Path:
    """Write `report.json` and `report.html` into the run folder, each whole or not at all; return the page's path.

    Whatever part of the run exists is shown, and what is missing is said. The same folder gives the same bytes.

    Raises:
        StorageError: the folder cannot be read or written to.
    """
    report = read_report(run)
    write_atomic(run / "report.json", report_json(report))
    page = run / "report.html"
    write_atomic(page, render_page(report))
    return page


def render_page(report: Report) -> str:
    """Return the page. Every text from the run is escaped, its control and direction marks made visible."""
    return _rendered(
        "page.html.j2",
        alone=False,
        report=report,
        search=report.searched,
        search_panels=search_panels(report.searched) if report.searched else [],
        growth=report.growth,
        growth_panels=growth_panels(report.growth) if report.growth else [],
        headline=headline(report),
        more_sentences=_more_sentences(report),
        guide=guide(report),
        key_numbers=_tiles(report),
        **_forgotten(report),
        colours=colours(report),
        score_groups=score_groups(report),
        broken_rows=broken_rows(report),
        label_sentences=label_sentences(report),
        paired_groups=paired_groups(report),
        task_tables=task_tables(report),
        curve_panels=curve_panels(report),
        looks=looks_sentence(report),
        num_looks=num_looks(report),
        memory_sentence=explained.memory_sentence(report),
        forgot_more_sentence=explained.forgot_more_sentence(report),
    )


def write_search_report(run: Path) -> Path | None:
    """Write `search/report.html`, the page of a run folder's search alone; None where there was none."""
    found = read_search(RunFolder(run))
    if found is None:
        return None
    content = {"section": "search.html.j2", "search": found, "search_panels": search_panels(found)}
    content["context"] = found.context
    return _write_side_page(run, "search", sentence=found.headline, **content)


def write_growth_report(run: Path) -> Path | None:
    """Write `curve/report.html`, the page of a run folder's learning curve alone; None where there was none."""
    found = read_growth(RunFolder(run))
    if found is None:
        return None
    content = {"section": "growth.html.j2", "growth": found, "growth_panels": growth_panels(found)}
    content["context"] = found.context
    return _write_side_page(run, "curve", sentence=found.headline, **content)


def _write_side_page(run: Path, kind: str, **content: Any) -> Path:
    page = run / kind / "report.html"
    write_atomic(page, _rendered("side_page.html.j2", alone=True, kind=kind, name=run.resolve().name, **content))
    return page


def _rendered(template: str, **content: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_foreign,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS}
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        style=Markup(style),
        style_sha256=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=__version__,
        **content,
    )


def _tiles(report: Report) -> list[KeyNumber]:
    """Return the key numbers: what was learned, what was forgotten, then the rest."""
    found = key_numbers(report)
    return [*found[:1], *forgotten_numbers(report), *found[1:]]


def _more_sentences(report: Report) -> list[tuple[Phrase, ...]]:
    delivered = report.forgotten.delivered
    # The scores of other tasks are the trained model's: of one delivered on the way to it, its own losses are said.
    of_trained = (others_sentence,) if delivered is None or delivered[1] == 1.0 else ()
    sentences = (broken_sentences, alpha_sentence, shots_sentence, *of_trained, losses.forgetting_sentence)
    sentences += (explained.tied_sentence, explained.unfinished_sentence)
    return [found for sentence in sentences if (found := sentence(report))]


def _forgotten(report: Report) -> dict[str, Any]:
    """Return what the section on forgetting and its neighbours are made of."""
    forgotten, delivered = report.forgotten, report.forgotten.delivered
    on_the_way = delivered is not None and delivered[1] < 1.0
    flip_model = report.answers.model if report.answers else "tuned"
    return {
        "show_forgotten": bool(forgotten.rows or forgotten.certificate),
        "verdict": _verdict_sentence(report),
        "opening": opening_sentence(forgotten.certificate) if forgotten.certificate else "",
        "frontier": losses.frontier(report),
        "matrix": losses.matrix(report),
        "tested": tested_rows(forgotten.certificate) if forgotten.certificate else [],
        "drift_panels": losses.drift_panels(report),
        "not_measured": losses.not_measured(report),
        "flip_model": flip_model,
        "flip_label": f"{flip_model} at alpha {delivered[1]:g}" if on_the_way and delivered else "",
        "on_the_way": on_the_way,
    }


def _foreign(value: Any) -> Any:
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def report_json(report: Report) -> str:
    """Return the numbers of the page as JSON, field by field as `docs/report.md` describes them."""
    value = {
        "version": VERSION,
        "keeptune": __version__,
        "broken_answers": broken_sentence(report) or None,
        "headline": " ".join(
            [
                _text(headline(report)),
                *([_verdict(report)] if report.forgotten.certificate else []),
                *map(_text, _more_sentences(report)),
            ]
        ),
        "selected": report.selection.selected,
        "selection": {
            "metric": report.selection.metric,
            "split": report.selection.split,
            "values": dict(report.selection.values),
            "note": report.selection.note,
        },
        "main_metric": report.main_metric,
        "untrained_tasks": sorted(report.untrained_tasks),
        "metrics": [dataclasses.asdict(metric) for metric in report.metrics],
        "scores": [dataclasses.asdict(score) for score in report.scores],
        "macro_scores": [dataclasses.asdict(macro) for macro in report.macro],
        "validation_scores": [dataclasses.asdict(score) for score in report.validation],
        "paired": [dataclasses.asdict(paired) for paired in report.paired],
        "few_shot": [dataclasses.asdict(few_shot) for few_shot in report.few_shot],
        "few_shot_left_out": [{"name": name, "reason": reason} for name, reason in few_shot_left_out(report.shot_rows)],
        "prompting": [{**dataclasses.asdict(p), "queries": dict(p.queries)} for p in report.prompting],
        "cost": [dataclasses.asdict(cost) for cost in report.costs],
        "decoding": [{**dataclasses.asdict(d), "settings": dict(d.settings)} for d in report.decodings],
        "answers": _answers(report),
        "forgetting": [dataclasses.asdict(row) for row in report.forgotten.rows],
        "forgetting_under_budget": [dataclasses.asdict(row) for row in report.forgotten.under_budget],
        "forgetting_left_out": [dataclasses.asdict(row) for row in report.forgotten.left_out],
        "canaries": [dataclasses.asdict(canary) for canary in report.forgotten.canaries],
        "noise": dataclasses.asdict(report.forgotten.noise) if report.forgotten.noise else None,
        "certificate": _certificate(report),
        "search": list(report.searched.sentences) if report.searched else None,
        "examples": [method.sentence for method in report.growth.methods] if report.growth else None,
        "delivered": dict(zip(("model", "alpha"), report.forgotten.delivered, strict=True))
        if report.forgotten.delivered
        else None,
        "on_the_way": [{"alpha": alpha, **dataclasses.asdict(score)} for alpha, score in report.forgotten.targets],
        "drift": {c.model: [{"step": step, "kl": kl} for step, kl in c.drift] for c in report.curves if c.drift},
        "audit": _audit(report),
        "mixture": [dataclasses.asdict(row) for row in report.mixture],
        "test_looks": num_looks(report),
        "test_openings": [dict(opening) for opening in report.openings],
        "command": report.command,
        "commands": [{"time": time, "command": command} for time, command in report.commands],
        "run": dict(report.facts),
        "missing": list(report.missing),
    }
    # ASCII escapes keep a lone surrogate from a broken answer exact, where UTF-8 could not hold it.
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _verdict(report: Report) -> str:
    certificate = report.forgotten.certificate
    return f"{certificate.heading}: {_verdict_sentence(report)}" if certificate else ""


def _verdict_sentence(report: Report) -> str:
    certificate = report.forgotten.certificate
    if certificate is None:
        return ""
    delivered = report.forgotten.delivered
    elsewhere = [row for row in report.forgotten.left_out if (row.model, row.alpha) == delivered]
    return verdict_sentence(certificate, others=report.untrained_tasks, elsewhere=elsewhere)


def _text(phrases: Sequence[Phrase]) -> str:
    return "".join(phrase.text for phrase in phrases).replace("\u00a0", " ")


def _answers(report: Report) -> dict[str, Any] | None:
    answers = report.answers
    if answers is None:
        return None
    return {
        "model": answers.model,
        "metric": answers.metric,
        "num_records": answers.num_records,
        "best": [answer.id for answer in answers.best],
        "worst": [answer.id for answer in answers.worst],
    }


def _certificate(report: Report) -> dict[str, Any] | None:
    certificate = report.forgotten.certificate
    if certificate is None:
        return None
    return {
        **dataclasses.asdict(certificate),
        "items": dict(certificate.items),
        "sha256": dict(certificate.sha256),
    }


def _audit(report: Report) -> dict[str, Any] | None:
    audit = report.audit
    if audit.is_empty:
        return None
    return {
        "rows_in": audit.rows_in,
        "kept": audit.kept,
        "truncated": audit.truncated,
        "dropped": dict(audit.dropped),
        "leaks": [dataclasses.asdict(leak) for leak in audit.leaks],
        "splits": [dataclasses.asdict(split) for split in audit.splits],
        "parts": [dataclasses.asdict(part) for part in audit.parts],
        "lengths": [dataclasses.asdict(lengths) for lengths in audit.lengths],
        "remarks": list(audit.remarks),
    }


def _finite(value: Any) -> Any:
    """Return a JSON value with null in place of what JSON cannot say: NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
