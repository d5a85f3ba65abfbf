"""What an answer is worth: a prediction and its references arrive, values and additive statistics leave.

Every metric is a function of sums over records. So one jackknife and one bootstrap (scores.py) serve means, corpus
BLEU and the loss per token alike. The metric libraries are imported when a metric is first used.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keeptune.errors import DataError

LOSS_METRICS = ("loss", "perplexity")
# Of a tuned model alone, since it needs the base model beside it; no recipe can ask for it.
DIVERGENCE = "kl"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BLEU_ORDER = 4
_CHRF_BETA_SQUARED = 4.0
# exp of more is no finite float; a perplexity that high means "knows nothing", whatever its digits.
_LARGEST_EXPONENT = 700.0
_CACHED_TEXTS = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of `samples.jsonl`: what a model answered to a record's prompt and what each metric says of it.

    `references` are raw text. `metrics` are the values of this record alone. `ended` is False where the answer was cut
    at the limit. `num_target_tokens` is the number of tokens that the loss of the reference completion averages over.
    """

    id: str
    task: str
    cluster: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    ended: bool
    metrics: Mapping[str, float]
    num_target_tokens: int


@dataclass(frozen=True, slots=True)
class Metric:
    """A function of sums over records.

    `value` scores one answer against its references, the best reference counting; none where the model's own loss, or
    what the harness said, is the value. `statistics` are a record's summands; `combine` maps sums (..., S) to values
    (...). `signature` takes the number of references of a record (-1: it varies) and returns implementation, version
    and options.
    """

    name: str
    higher_is_better: bool
    signature: Callable[[int], str]
    value: Callable[[str, Sequence[str]], float] | None
    statistics: Callable[[Answer], tuple[float, ...]]
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """Return the answer as a line of `samples.jsonl`."""
    return asdict(answer)


def answer_from_json(line: str, *, where: str) -> Answer:
    """Return the answer in a line of `samples.jsonl`.

    Raises:
        DataError: the line is not what `answer_to_json` wrote, so the file was edited.
    """
    try:
        value = json.loads(line)
        fields = {name: value[name] for name in Answer.__slots__}
        return Answer(**{**fields, "references": tuple(fields["references"])})
    except (KeyError, TypeError, ValueError) as error:
        found = f"no field {error}" if isinstance(error, KeyError) else f"no JSON object ({error})"
        raise DataError(
            f"{where}: found {found}; expected an answer written by `keeptune evaluate`. Evaluate again."
        ) from error


def metric_problems(names: Sequence[str]) -> list[str]:
    """Return `found; expected. remedy` for each name that no metric has; the remedy is the nearest that exists."""
    problems = []
    known = [name for name in METRICS if name != DIVERGENCE]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            remedy = f"Did you mean {nearest[0]}?" if nearest else "Choose one of these."
            problems.append(f"found {name!r}; expected one of {', '.join(known)}. {remedy}")
    return problems


def with_loss(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, each once, with loss and perplexity among them."""
    return tuple(dict.fromkeys((*names, *LOSS_METRICS)))


def measure(prediction: str, references: Sequence[str], *, loss: float, names: Sequence[str]) -> dict[str, float]:
    """Return the value of each named metric for one record; `loss` is in nats per token of its completion."""
    values = {}
    for name in names:
        value = METRICS[name].value
        if value is not None:
            values[name] = value(prediction, references)
        else:
            values[name] = float(METRICS[name].combine(np.array([loss, 1.0])))
    return values


def squad_normalised(text: str) -> str:
    """Return the text in lower case without punctuation, articles and surplus white space.

    A text of which nothing would be left ("A", "+") stays as it is, stripped and in lower case: otherwise an empty
    answer would match it. Source: SQuAD's evaluation script, v2.0, which has no such exception.
    """
    without_articles = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split()) or text.strip().lower()


def _exact_match(prediction: str, references: Sequence[str]) -> float:
    normalised = squad_normalised(prediction)
    return float(any(normalised == squad_normalised(reference) for reference in references))


def _raw_exact_match(prediction: str, references: Sequence[str]) -> float:
    return float(any(prediction.strip() == reference.strip() for reference in references))


def _token_f1(prediction: str, references: Sequence[str]) -> float:
    predicted = squad_normalised(prediction).split()
    return max(_overlap_f1(predicted, squad_normalised(reference).split()) for reference in references)


def _overlap_f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    num_same = sum((Counter(predicted) & Counter(expected)).values())
    # 2PR / (P + R) with P = same / predicted and R = same / expected is 2 same / (predicted + expected).
    return 2.0 * num_same / (len(predicted) + len(expected))


class _RougeWords:
    """rouge_score's own tokeniser with its stemmer; texts seen before are looked up, stemming being most of ROUGE."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = functools.lru_cache(_CACHED_TEXTS)(DefaultTokenizer(use_stemmer=True).tokenize)


@functools.cache
def _rouge_words() -> _RougeWords:
    return _RougeWords()


@functools.cache
def _rouge_scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], tokenizer=_rouge_words())


def _rouge(prediction: str, references: Sequence[str], *, name: str) -> float:
    return float(_rouge_scorer(name).score_multi(list(references), prediction)[name].fmeasure)


@functools.cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU() if name == "bleu" else CHRF()


def _sacrebleu_counts(prediction: str, references: Sequence[str], *, name: str) -> tuple[float, ...]:
    # The counts that sacrebleu adds up over a corpus; it has no public way to them, its own bootstrap uses this one.
    counts = _sacrebleu(name)._extract_corpus_statistics([prediction], [[reference] for reference in references])[0]
    return tuple(float(count) for count in counts)


def _sacrebleu_signature(num_references: int, *, name: str) -> str:
    scorer = _sacrebleu(name)
    scorer.num_refs = num_references
    return f"sacrebleu {'BLEU' if name == 'bleu' else 'chrF2'}|{scorer.get_signature()}"


def _bleu(sums: NDArray[np.float64], *, effective_order: bool = False) -> NDArray[np.float64]:
    """Return BLEU in [0, 100] from (..., [predicted, reference tokens, 4 matches, 4 totals]); exponential smoothing.

    `effective_order` averages over the orders that the text is long enough for, as sacrebleu advises for one sentence.
    Source: sacrebleu 2, `BLEU.compute_bleu`.
    """
    predicted, expected = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    possible = totals > 0
    unmatched = (matches == 0) & possible
    # The k-th order without a match counts as 1 / 2^k matches.
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matches)
    logs = np.log(np.where(possible, smoothed, 1.0) / np.where(possible, totals, 1.0))
    num_orders = possible.sum(axis=-1)
    mean_log = logs.sum(axis=-1) / np.maximum(num_orders, 1)
    brevity = np.minimum(0.0, 1.0 - expected / np.maximum(predicted, 1.0))
    scored = matches.any(axis=-1) & (effective_order | (num_orders == _BLEU_ORDER))
    return np.where(scored, 100.0 * np.exp(brevity + mean_log), 0.0)


def _bleu_of_one(prediction: str, references: Sequence[str]) -> float:
    return float(_bleu(np.array(_sacrebleu_counts(prediction, references, name="bleu")), effective_order=True))


def _chrf(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return chrF2 in [0, 100] from (..., 6 × [predicted, reference, matching character n-grams]).

    Source: sacrebleu 2, `CHRF._compute_f_score`: precision and recall are averaged over the orders that both have.
    """
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    predicted, expected, matches = counts[..., 0], counts[..., 1], counts[..., 2]
    both = (predicted > 0) & (expected > 0)
    num_orders = np.maximum(both.sum(axis=-1), 1)
    precision = np.where(both, matches / np.maximum(predicted, 1.0), 0.0).sum(axis=-1) / num_orders
    recall = np.where(both, matches / np.maximum(expected, 1.0), 0.0).sum(axis=-1) / num_orders
    weighted = _CHRF_BETA_SQUARED * precision + recall
    scored = weighted > 0
    return np.where(
        scored, 100.0 * (1.0 + _CHRF_BETA_SQUARED) * precision * recall / np.where(scored, weighted, 1.0), 0.0
    )


def _chrf_of_one(prediction: str, references: Sequence[str]) -> float:
    return float(_chrf(np.array(_sacrebleu_counts(prediction, references, name="chrf"))))


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]


def _exp_ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(_ratio(sums), _LARGEST_EXPONENT))


def _nats(answer: Answer, *, name: str = "loss") -> tuple[float, ...]:
    return (answer.metrics[name] * answer.num_target_tokens, float(answer.num_target_tokens))


def _mean(name: str, value: Callable[[str, Sequence[str]], float] | None, signature: Callable[[int], str]) -> Metric:
    return Metric(
        name,
        higher_is_better=True,
        signature=signature,
        value=value,
        statistics=lambda answer: (answer.metrics[name], 1.0),
        combine=_ratio,
    )


def _rouge_metric(name: str) -> Metric:
    return _mean(
        name,
        functools.partial(_rouge, name=name),
        lambda _: (
            f"rouge_score {metadata.version('rouge-score')}|{name} F1|stemmer:yes|mean over records|best reference"
        ),
    )


def _corpus_metric(
    name: str,
    value: Callable[[str, Sequence[str]], float],
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> Metric:
    return Metric(
        name,
        higher_is_better=True,
        signature=functools.partial(_sacrebleu_signature, name=name),
        value=value,
        statistics=lambda answer: _sacrebleu_counts(answer.prediction, answer.references, name=name),
        combine=combine,
    )


def _loss_metric(
    name: str,
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    signature: str,
    *,
    of: str = "loss",
) -> Metric:
    return Metric(
        name,
        higher_is_better=False,
        signature=lambda _: signature,
        value=None,
        statistics=functools.partial(_nats, name=of),
        combine=combine,
    )


_SQUAD = "SQuAD 2.0 normalisation, a text that it would empty kept|mean over records|best reference"
_ALL = (
    *(_rouge_metric(name) for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")),
    _corpus_metric("bleu", _bleu_of_one, _bleu),
    _corpus_metric("chrf", _chrf_of_one, _chrf),
    _mean("exact_match", _exact_match, lambda _: f"exact match|{_SQUAD}"),
    _mean("raw_exact_match", _raw_exact_match, lambda _: "exact match|outer white space stripped|mean over records"),
    _mean("token_f1", _token_f1, lambda _: f"F1 of words|{_SQUAD}"),
    _loss_metric("loss", _ratio, "nats of the reference completion and its end token, summed, by their tokens"),
    _loss_metric("perplexity", _exp_ratio, "exp(loss)"),
    _loss_metric(DIVERGENCE, _ratio, "KL(base || tuned) in nats over the whole vocabulary, by target tokens", of="kl"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric by its name. ROUGE, exact match and F1 lie in [0, 1], BLEU and chrF in [0, 100]."""


def metric_of(name: str) -> Metric:
    """Return the metric of that name; one that keeptune does not compute is a harness task's own, in [0, 1]."""
    return METRICS.get(name) or _mean(name, None, lambda _: f"lm-evaluation-harness {name}|mean over documents")
