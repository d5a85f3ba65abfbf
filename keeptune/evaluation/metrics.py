"""What an answer is worth: a prediction and its references arrive, values and additive statistics leave.

Every metric is a function of sums over records. So one jackknife (scores.py) serves means, corpus BLEU and the loss per
token alike. The metric libraries are imported when a metric is first used.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keeptune.errors import DataError
from keeptune.evaluation import corpus, labels
from keeptune.evaluation.words import RougeWords, UnicodeRougeWords, characters, plain, squad_normalised

LOSS_METRICS = ("loss", "perplexity")
# Of a tuned model alone, since it needs the base model beside it; no recipe can ask for it.
DIVERGENCE = "kl"
# exp of more is no finite float; a perplexity that high means "knows nothing", whatever its digits.
_LARGEST_EXPONENT = 700.0
_UNICODE = "_unicode"


Reads = Literal["ascii", "words", "spaced", "chinese", "japanese"]


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
    and options. `scale` is the largest value; 1 nat for the loss. `bounds` are the least and the greatest that a score
    can be. `is_mean`: over records or tokens. `reads` names what the metric sees of a text (legible.py), None where
    that is all of it.
    """

    name: str
    higher_is_better: bool
    signature: Callable[[int], str]
    value: Callable[[str, Sequence[str]], float] | None
    statistics: Callable[[Answer], tuple[float, ...]]
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    scale: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)
    is_mean: bool = True
    reads: Reads | None = None


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
        elif package := corpus.missing_package(name):
            problems.append(
                f"found {name}, whose tokeniser is not installed; expected its package. Run pip install '{package}', "
                "or use chrf, which needs none."
            )
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


def _exact_match(prediction: str, references: Sequence[str], *, normalised: Callable[[str], str]) -> float:
    mine = normalised(prediction)
    return float(any(mine == normalised(reference) for reference in references))


def _squad_words(text: str) -> list[str]:
    return squad_normalised(text).split()


def _f1(prediction: str, references: Sequence[str], *, parts: Callable[[str], list[str]]) -> float:
    predicted = parts(prediction)
    return max(_overlap_f1(predicted, parts(reference)) for reference in references)


def _overlap_f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    num_same = sum((Counter(predicted) & Counter(expected)).values())
    # 2PR / (P + R) with P = same / predicted and R = same / expected is 2 same / (predicted + expected).
    return 2.0 * num_same / (len(predicted) + len(expected))


@functools.cache
def _rouge_words(*, unicode: bool) -> RougeWords | UnicodeRougeWords:
    return UnicodeRougeWords() if unicode else RougeWords()


@functools.cache
def _rouge_scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name.removesuffix(_UNICODE)], tokenizer=_rouge_words(unicode=name.endswith(_UNICODE)))


def _rouge(prediction: str, references: Sequence[str], *, name: str) -> float:
    kind = name.removesuffix(_UNICODE)
    return float(_rouge_scorer(name).score_multi(list(references), prediction)[kind].fmeasure)


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]


def _exp_ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(_ratio(sums), _LARGEST_EXPONENT))


def _nats(answer: Answer, *, name: str = "loss") -> tuple[float, ...]:
    return (answer.metrics[name] * answer.num_target_tokens, float(answer.num_target_tokens))


def _mean(
    name: str,
    value: Callable[[str, Sequence[str]], float] | None,
    signature: str,
    *,
    reads: Reads | None = None,
) -> Metric:
    return Metric(
        name,
        higher_is_better=True,
        signature=lambda _: signature,
        value=value,
        statistics=lambda answer: (answer.metrics[name], 1.0),
        combine=_ratio,
        reads=reads,
    )


def _rouge_metric(kind: str, *, unicode: bool) -> Metric:
    name, tokeniser = (f"{kind}{_UNICODE}", "|words:unicode") if unicode else (kind, "")
    version = metadata.version("rouge-score")
    return _mean(
        name,
        functools.partial(_rouge, name=name),
        f"rouge_score {version}|{kind} F1|stemmer:yes{tokeniser}|mean over records|best reference",
        reads="words" if unicode else "ascii",
    )


def _corpus_metric(
    name: str,
    value: Callable[[str, Sequence[str]], float],
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    reads: Reads | None = None,
) -> Metric:
    return Metric(
        name,
        higher_is_better=True,
        signature=functools.partial(corpus.signature, name=name),
        value=value,
        statistics=lambda answer: corpus.counts(answer.prediction, answer.references, name=name),
        combine=combine,
        scale=100.0,
        bounds=(0.0, 100.0),
        is_mean=False,
        reads=reads,
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
        bounds=(1.0 if name == "perplexity" else 0.0, math.inf),
        is_mean=name != "perplexity",
    )


_BLEU_READS: Mapping[str, Reads | None] = {
    "bleu": "spaced",
    "bleu_ko_mecab": "spaced",
    "bleu_zh": "chinese",
    "bleu_ja_mecab": "japanese",
}
_PLAIN = "lower case, NFC, single spaces, without a final full stop|mean over records|best reference"
_SQUAD = "SQuAD 2.0 normalisation, a text that it would empty kept|mean over records|best reference"
_RAW = "outer white space stripped|mean over records"
_CHARACTERS = "lower case, NFKC, white space aside|mean over records|best reference"
_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ALL = (
    *(_rouge_metric(kind, unicode=unicode) for unicode in (False, True) for kind in _ROUGE_KINDS),
    *(
        _corpus_metric(name, functools.partial(corpus.bleu_of_one, name=name), corpus.bleu, reads=_BLEU_READS.get(name))
        for name in corpus.BLEU_TOKENISERS
    ),
    _corpus_metric("chrf", corpus.chrf_of_one, corpus.chrf),
    _mean("exact_match", functools.partial(_exact_match, normalised=plain), f"exact match|{_PLAIN}"),
    _mean("exact_match_squad", functools.partial(_exact_match, normalised=squad_normalised), f"exact match|{_SQUAD}"),
    _mean("raw_exact_match", functools.partial(_exact_match, normalised=str.strip), f"exact match|{_RAW}"),
    _mean("token_f1", functools.partial(_f1, parts=_squad_words), f"F1 of words|{_SQUAD}", reads="spaced"),
    _mean("char_f1", functools.partial(_f1, parts=characters), f"F1 of characters|{_CHARACTERS}"),
    _loss_metric("loss", _ratio, "nats of the reference completion and its end token, summed, by their tokens"),
    _loss_metric("perplexity", _exp_ratio, "exp(loss)"),
    _loss_metric(DIVERGENCE, _ratio, "KL(base || tuned) in nats over the whole vocabulary, by target tokens", of="kl"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric by its name. ROUGE, exact match and F1 lie in [0, 1], BLEU and chrF in [0, 100]."""


def _label_metric(
    name: str,
    signature: str,
    *,
    statistics: Callable[[Mapping[str, float]], tuple[float, ...]],
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    least: float = 0.0,
) -> Metric:
    return Metric(
        name,
        higher_is_better=True,
        signature=lambda _: signature,
        value=None,
        statistics=lambda answer: statistics(answer.metrics),
        combine=combine,
        bounds=(least, 1.0),
        is_mean=False,
    )


LABEL_METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _label_metric(
            "mcc", "Matthews' correlation of labels", statistics=labels.confusion, combine=labels.mcc, least=-1.0
        ),
        _label_metric("binary_f1", "F1 of label 1", statistics=labels.detection, combine=labels.binary_f1),
    )
}
"""Metrics of harness tasks with labels, by name. A record's own value is whether its label is right."""


def metric_of(name: str) -> Metric:
    """Return the metric of that name; one that keeptune does not compute is a harness task's own, in [0, 1]."""
    return (
        METRICS.get(name)
        or LABEL_METRICS.get(name)
        or _mean(name, None, f"lm-evaluation-harness {name}|mean over documents")
    )
