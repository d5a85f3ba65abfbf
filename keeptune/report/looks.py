"""Say how often the test split was opened, and for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from keeptune.progress import noun
from keeptune.report.tables import Report
from keeptune.report.wording import count

_SCORING = "scoring"
_TIMES = {1: "once", 2: "twice"}


def num_looks(report: Report) -> int:
    """Return how often test was looked at: going on with an interrupted look is not another one."""
    return sum("resumes" not in dict(opening) for opening in report.openings)


def looks_sentence(report: Report) -> str:
    """Return how often test was looked at and for what: "Opened 2 times: once for scoring, once for …"."""
    looks = Counter(_purpose(dict(opening)) for opening in report.openings if "resumes" not in dict(opening))
    number = num_looks(report)
    parts = [f"{_TIMES.get(times, f'{times} times')} for {purpose}" for purpose, times in looks.items()]
    first = (
        f"Opened {count(number)} {noun(number, 'times')}: {', '.join(parts)}."
        if number > 1
        else (f"Opened once, for {next(iter(looks), _SCORING)}.")
    )
    again = (
        " Each time that settings are changed after a look at test scores, the next test scores look better than they "
        "are."
    )
    return first + (again if looks[_SCORING] > 1 else "")


def _purpose(opening: Mapping[str, str]) -> str:
    models = [name.removeprefix("keys.") for name in opening if name.startswith("keys.")]
    if models and all(name.endswith(", again") for name in models):
        return "the noise check, in which the base model answers a second time"
    if models and all(" at " in name for name in models):
        return "models between the base and the trained one"
    if " compare " in opening.get("command", ""):
        return "a comparison"
    return _SCORING
