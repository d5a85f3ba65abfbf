"""The learning curve in words: what more records bring, and where nothing can be foretold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keeptune.report.growth import GrownMethod, growth_panels, read_growth
from keeptune.report.page import write_growth_report, write_report
from keeptune.report.reading import RunFolder
from keeptune.terminal_search import show_growth

DOUBLING = {"num_records": 800, "value": 0.8, "low": 0.7, "high": 0.85, "gain": 0.1, "gain_low": 0.02, "gain_high": 0.2}


def written(folder: Path, **facts: Any) -> Path:
    """Write a curve of one method with scores at 100, 200 and 400 records."""
    law = {"fits": True, "line": [[100, 0.4, 0.3, 0.5], [800, 0.8, 0.7, 0.85]], "doubling": DOUBLING, **facts}
    measured = [{"num_records": n, "seed": s, "value": n / 800 + s / 100} for n in (100, 200, 400) for s in (0, 1)]
    method = {"measured": measured, "failed": [{"name": "records-400-seed-2", "reason": "<b>killed</b>"}], "law": law}
    (folder / "curve").mkdir(exist_ok=True)
    value = {"metric": "rougeL", "higher_is_better": True, "num_validation_records": 50, "methods": {"full": method}}
    (folder / "curve" / "curve.json").write_text(json.dumps(value))
    return folder


def method(folder: Path, **facts: Any) -> GrownMethod:
    found = read_growth(RunFolder(written(folder, **facts)))
    assert found is not None
    return found.methods[0]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {},
            "full: ROUGE-L 0.505 after 400 records; by the law 0.700, and 0.800 after 800, better by +0.100 (95 % "
            "interval +0.020 to +0.200): more records of this kind help.",
        ),
        (
            {"tested": False},
            "more records of this kind help. Three numbers of records cannot show that the law is wrong: try a fourth.",
        ),
        (
            {"doubling": {**DOUBLING, "gain_low": 0.0}},
            "(95 % interval +0.000 to +0.200): no gain that stands out from chance, so more records of this kind are "
            "not worth much.",
        ),
        (
            {"fits": False},
            "; the scores follow no power law, so that nothing is foretold. Try more numbers of records.",
        ),
        ({"doubling": None}, "full: too few trainings came to their end to say what more records would bring."),
    ],
)
def test_the_words_say_whether_more_records_are_worth_it(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    found = method(tmp_path, **facts)
    assert found.sentence.endswith(said)
    assert (found.doubling is None) is (facts.get("fits") is False or facts.get("doubling", 1) is None)
    # A law that the scores do not follow is not drawn.
    assert bool(found.line) is (facts.get("fits") is not False)


def test_the_scores_stand_by_number_of_records_in_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    sizes = [(row.num_records, row.values) for row in method(tmp_path).sizes]
    assert sizes == [(100, (0.125, 0.135)), (200, (0.25, 0.26)), (400, (0.5, 0.51))]
    page = write_growth_report(tmp_path)
    assert page is not None
    for path in (page, write_report(tmp_path)):
        text = path.read_text(encoding="utf-8")
        assert "foretold: 0.7 to 0.85" in text and "&lt;b&gt;killed&lt;/b&gt;" in text and "<b>killed" not in text
    out = io.StringIO()
    show_growth(Console(file=out, width=120), tmp_path / "curve" / "curve.json")
    lines = out.getvalue().splitlines()
    assert any("400" in line and "0.505" in line and "0.500, 0.510" in line for line in lines)
    assert lines[-1] == "records-400-seed-2: <b>killed</b>"


@pytest.mark.parametrize(
    "broken",
    ["", "{", '{"metric": 3}', *(f'{{"metric": "loss", "methods": {{"full": {{"law": {law}}}}}}}'
     for law in ("3", '{"line": 3}', '{"line": [3, [1, null, 2, 3], [1, 2]]}'))],
)  # fmt: skip
def test_a_broken_curve_stops_no_report(tmp_path: Path, broken: str) -> None:
    (tmp_path / "curve").mkdir()
    (tmp_path / "curve" / "curve.json").write_text(broken)
    assert write_report(tmp_path).is_file()
    assert write_growth_report(tmp_path / "none") is None


def test_of_several_methods_the_title_says_which_more_records_help_and_the_figures_share_an_axis(
    tmp_path: Path,
) -> None:
    value = json.loads((written(tmp_path) / "curve" / "curve.json").read_text())
    first = value["methods"]["full"]
    lost = {"measured": [{"num_records": n, "seed": 0, "value": 40 / n} for n in (100, 200, 400)], "law": None}
    value |= {"metric": "loss", "higher_is_better": False, "methods": {"full": first, "lora": first, "wide": lost}}
    (tmp_path / "curve" / "curve.json").write_text(json.dumps(value))
    found = read_growth(RunFolder(tmp_path))
    assert found is not None
    assert found.headline == "More records of this kind help full and lora; nothing can be foretold of wide."
    assert found.span == (0.1, 0.85) and not found.is_logarithmic
    page = write_growth_report(tmp_path)
    assert page is not None and f"<h1>{found.headline}</h1>" in page.read_text()
    lost["measured"][2]["value"] = 0.04
    (tmp_path / "curve" / "curve.json").write_text(json.dumps(value))
    found = read_growth(RunFolder(tmp_path))
    assert found is not None and found.is_logarithmic
    figures = [str(panel.figure) for panel in growth_panels(found)]
    assert all(">0.1<" in figure and ">0.05<" in figure for figure in figures)


def test_the_title_of_one_method_is_not_said_again(tmp_path: Path) -> None:
    page = write_growth_report(written(tmp_path))
    assert page is not None and page.read_text().count("more records of this kind help") == 1
    assert write_report(tmp_path).read_text().count("more records of this kind help") == 1
