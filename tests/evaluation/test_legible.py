from __future__ import annotations

import pytest

from keeptune.evaluation.legible import References, blind_problems, remarks
from keeptune.evaluation.metrics import METRICS, Answer
from keeptune.evaluation.scores import score_answers

TEXTS = {
    "Chinese": "这个东西的颜色是红色，大家都很喜欢它。",
    "Japanese": "東京は日本の首都であり、とても大きいです。",
    "Thai": "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
    "Arabic": "القاهرة هي عاصمة مصر الكبرى",
    "Hindi": "दिल्ली भारत की राजधानी है",
    "Greek": "Η Αθήνα είναι η πρωτεύουσα",
    "Russian": "Москва является столицей России",
    "English": "Paris is the capital of France",
}


def counted(**tasks: list[str]) -> dict[str, object]:
    references = References()
    for task, texts in tasks.items():
        for text in texts:
            references.add(task, text)
    return references.to_json()


def blind(metric: str, texts: list[str]) -> bool:
    return bool(blind_problems([metric], counted(t=texts)))


@pytest.mark.parametrize("script", TEXTS)
def test_rouge_is_blind_to_all_scripts_but_latin_and_its_unicode_kin_to_none(script: str) -> None:
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert blind(kind, [TEXTS[script]]) is (script != "English")
        assert not blind(f"{kind}_unicode", [TEXTS[script]])


@pytest.mark.parametrize("script", TEXTS)
def test_bleu_and_squads_f1_are_blind_to_scripts_without_spaces(script: str) -> None:
    unspaced = script in ("Chinese", "Japanese", "Thai")
    assert blind("bleu", [TEXTS[script]]) is blind("token_f1", [TEXTS[script]]) is unspaced
    # More than half of the Japanese text is kana.
    assert blind("bleu_zh", [TEXTS[script]]) is (script in ("Japanese", "Thai"))
    assert blind("bleu_ja_mecab", [TEXTS[script]]) is (script == "Thai")
    for name in ("bleu_char", "bleu_flores200", "chrf", "char_f1", "exact_match", "exact_match_squad"):
        assert not blind(name, [TEXTS[script]])


@pytest.mark.parametrize("script", TEXTS)
def test_a_metric_that_is_not_refused_gives_the_right_answer_its_best_value_and_a_wrong_one_less(script: str) -> None:
    text = TEXTS[script]
    other = text[: len(text) // 2]
    for name in ("rougeL", "rougeL_unicode", "bleu", "bleu_zh", "bleu_char", "chrf", "token_f1", "char_f1"):
        value = METRICS[name].value
        assert value is not None
        if not blind(name, [text]):
            assert value(text, [text]) == pytest.approx(METRICS[name].scale)
            assert 0.0 < value(other, [text]) < METRICS[name].scale


def test_words_that_lose_letters_count_as_lost() -> None:
    assert blind("rougeL", ["été"])
    assert blind("rougeL", ["tôi rất thích bún chả"])
    assert blind("rougeL", ["ＡＢＣ"])
    assert not blind("rougeL", ["un café, s'il vous plaît, et puis du pain"])
    assert not blind("rougeL_unicode", ["été"])


def test_references_without_any_word_are_blind_spots_of_rouge_alone() -> None:
    for symbols in (["😀", "👍"], ["+", "-", "<="]):
        assert blind("rougeL", symbols) and blind("rougeL_unicode", symbols)
        assert not any(blind(name, symbols) for name in ("bleu", "chrf", "exact_match", "token_f1", "char_f1"))
        (problem,) = blind_problems(["rougeL"], counted(t=symbols))
        assert problem.endswith("Use exact_match or chrf.")
    assert not blind("rougeL", ["", " "])


def test_a_task_of_two_scripts_is_refused_from_more_than_a_tenth_on() -> None:
    english, chinese = ["the red one"], ["红色"]
    assert not blind("rougeL", 18 * english + 2 * chinese)
    assert blind("rougeL", 17 * english + 3 * chinese)


def test_one_complaint_names_the_metrics_the_tasks_their_share_and_what_to_use() -> None:
    references = counted(zh=["红色"] * 40, en=["red"] * 40, ru=["красный"] * 3)
    assert blind_problems(["rougeL", "rouge1", "exact_match", "chrf", "loss"], references) == [
        "found rougeL, rouge1, which see only the letters a to z and digits, for zh (40 of 40 references lose most of "
        "their words, such as '红色'), ru (3 of 3 references lose most of their words, such as 'красный'); expected "
        "metrics that read them. Use rougeL_unicode, rouge1_unicode, char_f1 or chrf."
    ]
    assert blind_problems(["token_f1"], references) == [
        "found token_f1, which sees only words between spaces, for zh (40 of 40 references are not split into words, "
        "such as '红色'); expected metrics that read them. Use char_f1 or chrf."
    ]
    assert blind_problems(["bleu"], references)[0].endswith(
        "Use bleu_zh for Chinese, bleu_ja_mecab for Japanese, bleu_char, bleu_flores200 or chrf."
    )


def test_a_metric_that_reads_most_is_remarked_upon() -> None:
    french = counted(fr=["il fait beau", "le chat très noir dort", "bonjour", "merci à vous deux"])
    assert blind_problems(["rougeL"], french) == []
    assert remarks(["rougeL", "rougeL_unicode", "chrf"], french) == [
        "rougeL sees only the letters a to z and digits: 2 of 4 references of fr have other words, such as 'très'. To "
        "count these, use rougeL_unicode, char_f1 or chrf."
    ]
    few = counted(en=["the red one"] * 39 + ["红色"])
    assert remarks(["rougeL"], few)[0].startswith("rougeL sees only the letters a to z and digits: 1 of 40 references")
    assert remarks(["rougeL", "bleu_char", "token_f1"], counted(en=["the red one", "a naive idea"])) == []


def test_bleu_on_short_references_is_remarked_upon() -> None:
    labels = counted(labels=["yes", "no", "not at all, sir, by no means"])
    (remark,) = remarks(["bleu", "exact_match"], labels)
    assert remark == (
        "bleu: 2 of 3 references of labels have fewer than 4 words. BLEU counts runs of 4 words, and can be 0 where "
        "every answer is right; exact_match and chrf suit short answers."
    )
    assert remarks(["exact_match", "chrf", "bleu_char"], labels) == []
    assert remarks(["bleu"], counted(t=["the cat sat on the mat"])) == []
    right = Answer("i", "t", "c", "", "yes", ("yes",), True, {"exact_match": 1.0}, 1)
    scores = score_answers([right], metrics=["bleu", "exact_match"])
    assert [score.mean for score in scores if score.task == "t"] == [0.0, 1.0]
