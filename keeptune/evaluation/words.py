"""Turn a text into what a metric compares: a normalised text, its words, its characters.

A letter of a script that is written without spaces (Chinese, Japanese, Thai and others) counts as a word of its own.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_STOPS = (".", "。", "।")
# Sets of letters, as they stand between brackets in a pattern of `regex`.
CHINESE = r"\p{Han}\p{Bopomofo}々〇"
JAPANESE = r"\p{Han}\p{Hiragana}\p{Katakana}ー々〇"
UNSPACED = rf"{CHINESE}{JAPANESE}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}\p{{Tibetan}}\p{{Javanese}}\p{{Yi}}"
_LETTERS = r"\p{L}\p{N}"
# Marks and joiners stay with the letter that they follow.
_MARKS = r"\p{M}\u200c\u200d"
_WORD = regex.compile(
    rf"(?V1)[[{_LETTERS}]&&[{UNSPACED}]][{_MARKS}]*|[[{_LETTERS}]--[{UNSPACED}]][[{_LETTERS}{_MARKS}]--[{UNSPACED}]]*"
)
_CACHED_TEXTS = 4096


def plain(text: str) -> str:
    """Return the text in lower case, composed (NFC), with single spaces and without one final full stop.

    Signs, decimal points, symbols, punctuation and articles stay: "-5" is not "5", "3.5" not "35", "C++" not "C".
    """
    text = " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())
    bare = text[:-1].rstrip() if text.endswith(_FULL_STOPS) else text
    return bare or text


def squad_normalised(text: str) -> str:
    """Return the text in lower case without punctuation, articles and surplus white space.

    A text of which nothing would be left ("A", "+") stays as it is, stripped and in lower case: otherwise an empty
    answer would match it. Source: SQuAD's evaluation script, v2.0, which has no such exception.
    """
    without_articles = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split()) or text.strip().lower()


def unicode_words(text: str) -> list[str]:
    """Return the words of a text of any script in lower case; of ASCII text, what rouge_score's tokeniser finds."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def written_words(text: str) -> list[str]:
    """Return the words of a text as they are written, neither in lower case nor with like characters made one."""
    return _WORD.findall(text)


def characters(text: str) -> list[str]:
    """Return the characters of a text in lower case, white space left out."""
    return [c for c in unicodedata.normalize("NFKC", text).casefold() if not c.isspace()]


class RougeWords:
    """rouge_score's own tokeniser with its stemmer; texts seen before are looked up, stemming being most of ROUGE."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = functools.lru_cache(_CACHED_TEXTS)(DefaultTokenizer(use_stemmer=True).tokenize)


class UnicodeRougeWords:
    """The words of any script, those of ASCII letters stemmed as rouge_score does: on ASCII texts the two are one."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stemmed = functools.lru_cache(_CACHED_TEXTS)(DefaultTokenizer(use_stemmer=True).tokenize)
        self.tokenize = functools.lru_cache(_CACHED_TEXTS)(self._tokenize)

    def _tokenize(self, text: str) -> list[str]:
        return [part for word in unicode_words(text) for part in (self._stemmed(word) if word.isascii() else [word])]
