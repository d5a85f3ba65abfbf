"""The normaliser that tokenizer.json describes arrives; one that would make short texts endless is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keeptune.errors import RecipeError

# Real ones write a few characters for one: U+2581 for a space, a space on each side of a Chinese character.
_MOST_TIMES_LONGER = 1000.0


def refuse_growth(normaliser: Any, *, path: Path) -> None:
    """Refuse a normaliser whose replacements, one after the other, can make a text more than 1000 times longer.

    Raises:
        RecipeError: they can.
    """
    growth = _growth(normaliser)
    if growth > _MOST_TIMES_LONGER:
        raise RecipeError(
            f"{path}: found a normalizer that can make a text {growth:.1e} times longer; expected at most "
            f"{_MOST_TIMES_LONGER:.0f} times. Fetch the file again, or choose another model."
        )


def _growth(normaliser: Any) -> float:
    """Return how many times longer a text can become."""
    if not isinstance(normaliser, dict):
        return 1.0
    parts = normaliser.get("normalizers")
    if isinstance(parts, list):
        growth = 1.0
        for part in parts:
            growth = min(growth * _growth(part), 1e300)
        return growth
    content, pattern = normaliser.get("content"), normaliser.get("pattern")
    if normaliser.get("type") != "Replace" or not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    found = pattern.get("String")
    # A regular expression may match nothing at all, before every character.
    return max(1.0, len(content) / len(found)) if isinstance(found, str) and found else len(content) + 1.0
