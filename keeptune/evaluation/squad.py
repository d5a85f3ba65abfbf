"""SQuAD's exact match and F1 as transformers had them before version 5, for task files of the harness that import them.

Source: SQuAD's evaluation script, v2.0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PLACE = "transformers.data.metrics"


def normalize_answer(text: str) -> str:
    """Return the text in lower case without punctuation, articles and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def compute_exact(gold: str, answer: str) -> int:
    """Return 1 where both are the same when normalised, else 0."""
    return int(normalize_answer(gold) == normalize_answer(answer))


def compute_f1(gold: str, answer: str) -> float:
    """Return the F1 of normalised words; where one side has none, whether the other has none either."""
    right, given = normalize_answer(gold).split(), normalize_answer(answer).split()
    if not right or not given:
        return float(right == given)
    # 2PR / (P + R) with P = same / given and R = same / right.
    return 2.0 * sum((Counter(right) & Counter(given)).values()) / (len(right) + len(given))


@contextlib.contextmanager
def importable_squad_metrics() -> Iterator[None]:
    """Let task files import these functions from transformers inside the block, where its version has them no more."""
    try:
        has_them = importlib.util.find_spec(f"{_PLACE}.squad_metrics") is not None
    except ModuleNotFoundError:
        has_them = False
    if has_them:
        yield
        return
    package, module = ModuleType(_PLACE), ModuleType(f"{_PLACE}.squad_metrics")
    for function in (normalize_answer, compute_exact, compute_f1):
        setattr(module, function.__name__, function)
    package.squad_metrics = module  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {package.__name__: package, module.__name__: module}
    try:
        yield
    finally:
        for name in (package.__name__, module.__name__):
            sys.modules.pop(name, None)
