from __future__ import annotations

import json
import math
import random
import re
import string
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from keeptune.errors import DataError
from keeptune.evaluation.corpus import BLEU_TOKENISERS, load_tokenisers, missing_package
from keeptune.evaluation.metrics import (
    METRICS,
    Answer,
    answer_from_json,
    answer_to_json,
    measure,
    metric_of,
    metric_problems,
    with_loss,
)
from keeptune.evaluation.words import characters, squad_normalised, unicode_words

# The others need packages or files that may not be here.
USABLE = {name: metric for name, metric in METRICS.items() if not name.endswith(("mecab", "flores200"))}

# Punctuation, numbers, other scripts, articles and words that share a stem.
WORDS = re.findall(
    r"\S+",
    """the a an cat cats running ran runs quickly report reports reported Person1 #Person1# Wall-Street U.S. 3.5 %, .
    , ! ... don't it's Ünïcode naïve 你好 + - (sic) house houses market's and or not yes no true""",
)


def random_text(rng: random.Random) -> str:
    num_words = rng.choice([0, 1, 1, 2, 3, 5, 8, 13, 30])
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "  ", "\n", ".\n", ", "]) for _ in range(num_words))


def random_pairs(count: int, *, seed: int) -> list[tuple[str, str]]:
    """Half of the predictions are noisy copies of their references, so that long matches occur."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        reference = random_text(rng)
        kept = " ".join(word for word in reference.split(" ") if rng.random() < 0.8)
        pairs.append((kept if rng.random() < 0.5 else random_text(rng), reference))
    return pairs


def value(name: str, prediction: str, *references: str) -> float:
    score = METRICS[name].value
    assert score is not None
    return score(prediction, references)


def answer(prediction: str = "", *references: str, metrics: dict[str, float] | None = None, tokens: int = 1) -> Answer:
    return Answer("id", "task", "cluster", "prompt", prediction, references, True, metrics or {}, tokens)


def corpus(name: str, predictions: list[str], references: list[list[str]]) -> float:
    answers = [answer(p, *r) for p, r in zip(predictions, references, strict=True)]
    metric = METRICS[name]
    return float(metric.combine(np.array([metric.statistics(a) for a in answers]).sum(axis=0)))


# SQuAD's evaluation script v2.0, as published (https://rajpurkar.github.io/SQuAD-explorer/).
def normalize_answer(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def get_tokens(s: str) -> list[str]:
    return normalize_answer(s).split() if s else []


def compute_exact(a_gold: str, a_pred: str) -> int:
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    gold_toks = get_tokens(a_gold)
    pred_toks = get_tokens(a_pred)
    common = Counter(gold_toks) & Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_equals_rouge_score_with_its_stemmer(name: str) -> None:
    scorer = RougeScorer([name], use_stemmer=True)
    for prediction, reference in random_pairs(500, seed=1):
        assert value(name, prediction, reference) == scorer.score(reference, prediction)[name].fmeasure


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_unicode_rouge_equals_rouge_on_ascii_and_rouge_score_with_the_same_words_elsewhere(kind: str) -> None:
    class Words:
        def tokenize(self, text: str) -> list[str]:
            return unicode_words(text)

    for prediction, reference in random_pairs(200, seed=4):
        ascii_only = [text.encode("ascii", "ignore").decode() for text in (prediction, reference)]
        assert value(f"{kind}_unicode", *ascii_only) == value(kind, *ascii_only)
    pair = ("привет мир и все\nмир", "мир и привет\nвсем мир")
    expected = RougeScorer([kind], tokenizer=Words()).score(pair[1], pair[0])[kind].fmeasure
    assert value(f"{kind}_unicode", *pair) == expected > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("这个 Python 3.5，很好", ["这", "个", "python", "3", "5", "很", "好"]),
        ("Привет, мир!", ["привет", "мир"]),
        ("l'été naïf", ["l", "été", "naïf"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
        ("カード ｶ ＡＢ", ["カ", "ー", "ド", "カ", "ab"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("snake_case a+b", ["snake", "case", "a", "b"]),
        ("😀 +", []),
    ],
)
def test_words_are_those_between_spaces_and_single_letters_where_a_script_has_no_spaces(
    text: str, words: list[str]
) -> None:
    assert unicode_words(text) == words


@pytest.mark.parametrize(
    ("right", "near"),
    [
        ("这个东西的颜色是红色", "这个东西的颜色是蓝色"),
        ("この箱は赤いです", "この箱は青いです"),
        ("กล่องนี้สีแดง", "กล่องนี้สีฟ้า"),
        ("الصندوق أحمر جدا", "الصندوق أزرق جدا"),
        ("यह डिब्बा लाल है", "यह डिब्बा नीला है"),
        ("το κουτί είναι κόκκινο", "το κουτί είναι μπλε"),
        ("эта коробка красная", "эта коробка синяя"),
        ("l'été est là", "l'hiver est là"),
    ],
)
def test_in_every_script_the_right_answer_is_perfect_and_a_near_one_less(right: str, near: str) -> None:
    for name in ("rouge1_unicode", "rougeL_unicode", "char_f1", "chrf"):
        assert value(name, right, right) == pytest.approx(METRICS[name].scale)
        assert 0.3 < value(name, near, right) / METRICS[name].scale < 0.99


def test_character_f1_is_the_f1_of_bags_of_characters() -> None:
    for prediction, reference in random_pairs(200, seed=5):
        mine, theirs = (Counter("".join(text.lower().split())) for text in (prediction, reference))
        same = sum((mine & theirs).values())
        if characters(prediction) and characters(reference):
            precision, recall = same / mine.total(), same / theirs.total()
            expected = 2 * precision * recall / (precision + recall) if same else 0.0
            assert value("char_f1", prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["bleu_zh", "bleu_char"])
def test_a_bleu_with_a_tokeniser_equals_sacrebleus(name: str) -> None:
    rows = [(p.replace(" ", "红"), r.replace(" ", "红")) for p, r in random_pairs(40, seed=6)]
    predictions, references = [p for p, _ in rows], [r for _, r in rows]
    expected = BLEU(tokenize=BLEU_TOKENISERS[name]).corpus_score(predictions, [references]).score
    assert corpus(name, predictions, [[r] for r in references]) == pytest.approx(expected, rel=1e-12)


def test_rouge_stems_words_and_lsum_reads_lines() -> None:
    assert value("rouge1", "houses", "house") == 1.0
    swapped = ("the cat sat\nthe dog ran", "the dog ran\nthe cat sat")
    assert value("rougeL", *swapped) == pytest.approx(0.5)
    assert value("rougeLsum", *swapped) == 1.0


@pytest.mark.parametrize(
    "name", ["rouge1", "rougeLsum", "rougeL_unicode", "chrf", "exact_match", "raw_exact_match", "token_f1", "char_f1"]
)
def test_the_best_of_several_references_counts(name: str) -> None:
    assert value(name, "blue sky", "red", "blue sky", "green") == value(name, "blue sky", "blue sky") > 0


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_equal_sacrebleu(name: str) -> None:
    for seed in range(60):
        pairs = random_pairs(1 + seed, seed=seed)
        predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
        expected = (BLEU() if name == "bleu" else CHRF()).corpus_score(predictions, [references]).score
        assert corpus(name, predictions, [[r] for r in references]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_with_two_references_equal_sacrebleu(name: str) -> None:
    rng = random.Random(7)
    rows = [(random_text(rng), random_text(rng), random_text(rng)) for _ in range(200)]
    predictions, first, second = ([row[i] for row in rows] for i in range(3))
    expected = (BLEU() if name == "bleu" else CHRF()).corpus_score(predictions, [first, second]).score
    ours = corpus(name, predictions, [[a, b] for a, b in zip(first, second, strict=True)])
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_value_of_one_record_is_sacrebleus_sentence_score(name: str) -> None:
    scorer = BLEU(effective_order=True) if name == "bleu" else CHRF()
    for prediction, reference in random_pairs(300, seed=2):
        expected = scorer.sentence_score(prediction, [reference]).score
        assert value(name, prediction, reference) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_squads_exact_match_and_f1_equal_its_script_wherever_it_leaves_a_text() -> None:
    compared = 0
    for prediction, reference in random_pairs(2000, seed=3):
        if any(text.strip() and not normalize_answer(text) for text in (prediction, reference)):
            continue
        compared += 1
        assert value("exact_match_squad", prediction, reference) == compute_exact(reference, prediction)
        assert value("token_f1", prediction, reference) == pytest.approx(compute_f1(reference, prediction), abs=1e-15)
    assert compared > 1500


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
        ("a black cat", "the cat", 0.0, 2 / 3),
        ("A", "A", 1.0, 1.0),
        ("", "A", 0.0, 0.0),
        ("the", "A", 0.0, 0.0),
        (" + ", "+", 1.0, 1.0),
        ("-", "+", 0.0, 0.0),
    ],
)
def test_squads_exact_match_and_f1_by_hand(prediction: str, reference: str, exact: float, f1: float) -> None:
    assert value("exact_match_squad", prediction, reference) == exact
    assert value("token_f1", prediction, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("-5", "5"),
        ("3.5", "35"),
        ("C++", "C"),
        ("C#", "C"),
        ("1,5", "15"),
        ("50%", "50"),
        ("$5", "5"),
        ("x²", "x2"),
        ("the cat", "cat"),
        ("a-b", "ab"),
        ("<=", "<"),
        ("!", "?"),
        ("été", "t"),
        ("红色", "蓝色"),
        ("", "."),
        ("", "a"),
        ("..", "..."),
    ],
)
def test_exact_match_tells_signs_points_symbols_and_words_apart(prediction: str, reference: str) -> None:
    assert value("exact_match", prediction, reference) == 0.0 == value("exact_match", reference, prediction)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        (" Paris.\n", "paris"),
        ("New  York", "new york"),
        ("A.", "a"),
        ("e\u0301te\u0301", "été"),
        ("是。", "是"),
        ("STRASSE", "straße"),
        ("3.5.", "3.5"),
        ("-5", "-5"),
    ],
)
def test_exact_match_forgives_case_white_space_composition_and_one_final_full_stop(
    prediction: str, reference: str
) -> None:
    assert value("exact_match", prediction, reference) == 1.0


def test_raw_exact_match_forgives_outer_white_space_only() -> None:
    assert value("raw_exact_match", " The Cat\n", "The Cat") == 1.0
    assert value("raw_exact_match", "the cat", "The Cat") == 0.0


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_has_a_finite_value_in_range_and_itself_is_perfect(prediction: str, reference: str) -> None:
    for metric in USABLE.values():
        if metric.value is not None:
            assert 0.0 <= metric.value(prediction, [reference]) <= metric.scale * (1 + 1e-12)
    for name in ("exact_match", "exact_match_squad", "raw_exact_match", "token_f1", "char_f1"):
        assert value(name, reference, reference) == 1.0
    assert squad_normalised(squad_normalised(reference)) == squad_normalised(reference)


def test_loss_averages_over_tokens_and_perplexity_is_its_exponential() -> None:
    answers = [answer(metrics={"loss": 1.0}, tokens=30), answer(metrics={"loss": 5.0}, tokens=10)]
    sums = np.array([METRICS["loss"].statistics(a) for a in answers]).sum(axis=0)
    assert METRICS["loss"].combine(sums) == pytest.approx(2.0)
    assert METRICS["perplexity"].combine(sums) == pytest.approx(math.exp(2.0))


def test_a_hopeless_loss_still_has_a_finite_perplexity() -> None:
    values = measure("", ("x",), loss=5000.0, names=("loss", "perplexity"))
    assert values["loss"] == 5000.0
    assert math.isfinite(values["perplexity"])


def test_loss_and_perplexity_join_the_metrics_once() -> None:
    assert with_loss(("loss", "bleu")) == ("loss", "bleu", "perplexity")


def test_only_losses_are_better_when_lower() -> None:
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {"loss", "perplexity", "kl"}


def test_signatures_name_implementation_version_and_options() -> None:
    bleu = METRICS["bleu"].signature(1)
    assert bleu.startswith("sacrebleu BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert METRICS["chrf"].signature(-1).startswith("sacrebleu chrF2|nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|")
    assert re.match(r"rouge_score \d\S*\|rougeL F1\|stemmer:yes\|", METRICS["rougeL"].signature(1))
    assert METRICS["rougeL_unicode"].signature(1).replace("|words:unicode", "") == METRICS["rougeL"].signature(1)
    assert "|tok:zh|" in METRICS["bleu_zh"].signature(1)
    signatures = [metric.signature(1) for metric in USABLE.values()]
    assert len(set(signatures)) == len(signatures)


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    assert metric_problems(["rougeL", "loss", "chrf"]) == []
    rouge = "rouge1, rouge2, rougeL, rougeLsum, rouge1_unicode, rouge2_unicode, rougeL_unicode, rougeLsum_unicode"
    bleu = "bleu, bleu_char, bleu_zh, bleu_ja_mecab, bleu_ko_mecab, bleu_flores200"
    rest = "chrf, exact_match, exact_match_squad, raw_exact_match, token_f1, char_f1, loss, perplexity"
    assert metric_problems(["rouge_l", "rougeL", "zzz"]) == [
        f"found 'rouge_l'; expected one of {rouge}, {bleu}, {rest}. Did you mean rougeL?",
        f"found 'zzz'; expected one of {rouge}, {bleu}, {rest}. Choose one of these.",
    ]


@pytest.mark.skipif(missing_package("bleu_ja_mecab") is None, reason="MeCab is installed")
def test_a_tokeniser_that_is_not_installed_is_refused_with_its_package() -> None:
    assert metric_problems(["bleu_ja_mecab"]) == [
        "found bleu_ja_mecab, whose tokeniser is not installed; expected its package. Run pip install "
        "'sacrebleu[ja]', or use chrf, which needs none."
    ]
    (problem,) = load_tokenisers(["bleu", "bleu_ja_mecab"])
    assert problem.startswith("found bleu_ja_mecab, whose tokeniser does not load (")


def test_an_answer_survives_its_line_of_json() -> None:
    before = answer("yes", "no", "m\u00e4ybe\n", metrics={"loss": 0.1}, tokens=3)
    assert answer_from_json(json.dumps(answer_to_json(before)), where="samples.jsonl:1") == before


def test_an_edited_answer_is_refused_with_its_line() -> None:
    value = answer_to_json(answer("yes", "no"))
    del value["cluster"]
    with pytest.raises(DataError) as error:
        answer_from_json(json.dumps(value), where="samples.jsonl:7")
    remedy = "expected an answer written by `keeptune evaluate`. Evaluate again."
    assert str(error.value) == f"samples.jsonl:7: found no field 'cluster'; {remedy}"
    for line in ("{", "[1]", "null"):
        with pytest.raises(DataError, match=r"^samples\.jsonl:8: found no JSON object \(.*Evaluate again\.$"):
            answer_from_json(line, where="samples.jsonl:8")


def test_metrics_and_scores_start_without_torch_and_without_metric_libraries() -> None:
    unwanted = ("torch", "transformers", "rouge_score", "nltk", "absl", "sacrebleu")
    code = f"import sys, keeptune.evaluation.scores; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_metric_that_only_the_harness_knows_is_a_mean_over_documents() -> None:
    found = metric_of("acc")
    assert found.higher_is_better and found.value is None
    right = Answer("a", "t", "c", "", "", ("x",), True, {"acc": 0.25}, 0)
    assert found.statistics(right) == (0.25, 1.0)
    assert found.combine(np.array([3.0, 4.0])) == 0.75
    assert metric_of("rougeL") is METRICS["rougeL"]
