"""Without lm-evaluation-harness a recipe that names its tasks is refused with the extra to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keeptune.errors import RecipeError
from keeptune.evaluation.harness import load_suites


def test_without_the_harness_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"lm_eval: not installed.*pip install 'keeptune\[harness\]'"):
        load_suites(["arc_easy"], include_path=None)
