"""How often the test split was opened, and for what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keeptune.report.looks import looks_sentence
from keeptune.report.tables import read_report
from tests.report.run_folder import write_lines, write_run
from tests.report.test_page import page_of

OPTIMISTIC = (
    " Each time that settings are changed after a look at test scores, the next test scores look better than they are."
)


def opening(*models: str, command: str = "keeptune run news.yaml", **more: Any) -> dict[str, Any]:
    return {"command": command, "models": list(models), "keys": dict.fromkeys(models, "ab12"), **more}


SCORING = opening("base", "base, 2 shots, draw 1", "full")
NOISE = opening("base, again")
POINTS = opening("lora at 0.5", "lora at 0.75")
COMPARISON = opening("owner/name", command="keeptune compare runs/x owner/name")


@pytest.mark.parametrize(
    ("openings", "sentence"),
    [
        ([SCORING], "Opened once, for scoring."),
        (
            [SCORING, NOISE],
            "Opened 2 times: once for scoring, once for the noise check, in which the base model answers a second "
            "time.",
        ),
        (
            [SCORING, POINTS, COMPARISON, COMPARISON],
            "Opened 4 times: once for scoring, once for models between the base and the trained one, twice for a "
            "comparison.",
        ),
        ([SCORING, opening("full"), opening("lora")], "Opened 3 times: 3 times for scoring." + OPTIMISTIC),
        ([SCORING, {**SCORING, "resumes": True}], "Opened once, for scoring."),
        ([{"models": ["base"]}], "Opened once, for scoring."),
    ],
)
def test_each_opening_is_said_with_its_purpose(tmp_path: Path, openings: list[dict[str, Any]], sentence: str) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_lines(run / "test_openings.jsonl", openings)
    assert looks_sentence(read_report(run)) == sentence
    assert sentence in page_of(run).words
