"""Numbers and foreign text are worded the same way everywhere."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.report import wording


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "1 min"),
        (192.4, "3 min 12 s"),
        (3600, "1 h"),
        (7260, "2 h 1 min"),
        (90061, "1 d 1 h"),
        (float("nan"), "not finite"),
    ],
)
def test_a_duration_has_its_two_largest_units(value: float | None, text: str) -> None:
    assert plain(wording.seconds(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (911_000_000, "911 MB"),
        (1_212_000_000, "1.21 GB"),
        (999_999, "1.00 MB"),
        (float("inf"), "not finite"),
    ],
)
def test_bytes_are_scaled_by_thousands(value: float | None, text: str) -> None:
    assert plain(wording.num_bytes(value)) == text


def test_parameters_are_short() -> None:
    assert [plain(wording.parameters(n)) for n in (512, 589_824, 3_147_264, 7e9)] == [
        "512",
        "590 k",
        "3.15 M",
        "7.00 B",
    ]


def test_a_share_keeps_two_digits_that_count() -> None:
    assert [plain(wording.percent(n, 1000)) for n in (0, 6.3, 158, 1000)] == ["0 %", "0.63 %", "15.8 %", "100 %"]
    assert wording.percent(1, 0) == wording.percent(None, 5) == wording.percent(float("nan")) == "–"


def test_decimals_have_a_true_minus_and_no_signed_zero() -> None:
    assert wording.decimal(-1.7084) == "−1.708"
    assert wording.decimal(0.25, signed=True) == "+0.250"
    assert wording.decimal(-0.0001, signed=True) == "0.000"
    assert wording.decimal(float("nan")) == "not finite"
    assert wording.decimal(1e300) == "1.00e+300"
    assert wording.interval(-0.1, 0.25, signed=True) == "−0.100 to +0.250"
    assert wording.interval(None, 0.25) == "–"


def test_a_scale_sets_the_decimals() -> None:
    assert [wording.decimals_for(0.431, None), wording.decimals_for(38.2), wording.decimals_for(512.0)] == [3, 2, 1]


def test_a_field_name_reads_as_prose() -> None:
    assert wording.key_label("leaks.num_near_pairs") == "Leaks: near pairs"
    assert wording.key_label("groups.num_moved") == "Records that this moved to another split"


def test_only_whole_numbers_get_their_thousands_separated() -> None:
    texts = ["12460", "999", "1000", "0.12345", "2e10", "ab1234", "-1234", "123456789012345678", "1234567890123456789"]
    assert [wording.thousands(text) for text in texts] == [
        "12,460", "999", "1,000", "0.12345", "2e10", "ab1234", "-1234", "123,456,789,012,345,678", "1234567890123456789"
    ]  # fmt: skip


def test_what_is_left_out_of_a_long_text_is_counted() -> None:
    text = "a" * 300 + "b" * 50
    assert wording.clipped(text, head=200, tail=50) == "a" * 200 + "\n[… 100 characters left out …]\n" + "b" * 50
    assert wording.clipped(text, head=300, tail=50) == text


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\u202e", "RLO"),
        ("\u2066", "LRI"),
        ("\u200b", "ZWSP"),
        ("\u200d", "ZWJ"),
        ("\x00", "NUL"),
        ("\x1b", "ESC"),
        ("\r", "CR"),
        ("\x85", "U+0085"),
        ("\ufeff", "BOM"),
        ("\ud800", "U+D800"),
        ("\U000e0041", "U+E0041"),
        ("\u2028", "LINE SEP"),
        ("\ue000", "U+E000"),
    ],
)
def test_hidden_characters_become_marks(character: str, name: str) -> None:
    assert wording.visible(f"a{character}b") == f'a<span class="mark">{name}</span>b'


@pytest.mark.parametrize("text", ["naïve café\n\tend", "日本語", "👩\u200d💻", "می\u200cخواهم", "שלום", "a\u00a0b"])
def test_ordinary_text_of_every_script_stays_as_it_is(text: str) -> None:
    assert wording.visible(text) == text


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_foreign_text_is_escaped_and_hides_nothing(text: str) -> None:
    shown = wording.visible(text)
    without_marks = re.sub(r'<span class="mark">[A-Z0-9+ ]+</span>', "\x00", shown)
    assert "<" not in without_marks and ">" not in without_marks
    kept = html.unescape(without_marks.replace("\x00", ""))
    # What the marks stand for is all that is missing from the text.
    remaining = iter(text)
    assert all(character in remaining for character in kept)
    assert len(kept) + without_marks.count("\x00") == len(text)


@pytest.mark.parametrize(
    ("nats", "words"),
    [
        (1.886, "a token becomes 6.6 times less likely"),
        (-1.0, "a token becomes 2.7 times more likely"),
        (3.64, "a token becomes 38 times less likely"),
        (900.0, "a token becomes more than a million times less likely"),
        (0.02, "a token is about as likely as before"),
        (0.0, "a token is about as likely as before"),
    ],
)
def test_nats_are_pictured_as_how_likely_a_token_becomes(nats: float, words: str) -> None:
    assert wording.likelihood(nats) == words
