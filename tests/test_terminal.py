"""What a person reads: plain lines for pipes, one live line for terminals, and no steering by data."""

from __future__ import annotations

import io

from rich.console import Console

from keeptune.terminal import LiveProgress, PlainProgress, show_tokens, visible
from keeptune.text.tokens import PreviewToken


def plain() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_progress_says_what_was_done() -> None:
    console = plain()
    progress = PlainProgress(console, quiet=False)
    progress.start("Tokenising", total=3, unit="records")
    progress.advance(2)
    progress.advance(note="the last")
    progress.finish()
    progress.say("all done")
    first, second = text_of(console).splitlines()
    assert first.startswith("Tokenising: 3 records in ")
    assert first.endswith(", the last")
    assert second == "all done"


def test_one_is_not_a_plural_and_work_cut_short_says_of_how_much() -> None:
    console = plain()
    progress = PlainProgress(console, quiet=False)
    progress.start("Reading", total=1, unit="tasks")
    progress.advance()
    progress.start("Epoch 1 of 2", total=900, unit="tokens")
    progress.advance(300)
    progress.finish()
    first, second = text_of(console).splitlines()
    assert first.startswith("Reading: 1 task in ")
    assert second.startswith("Epoch 1 of 2: 300/900 tokens in ")


def test_quiet_progress_says_nothing() -> None:
    console = plain()
    progress = PlainProgress(console, quiet=True)
    progress.start("Tokenising", total=3, unit="records")
    progress.advance(3)
    progress.finish()
    progress.say("all done")
    assert text_of(console) == ""


def test_live_progress_shows_rate_and_time_left() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    progress = LiveProgress(console)
    progress.start("Epoch 1 of 2", total=1000, unit="tokens")
    progress.advance(400, note="loss 2.310")
    progress.finish()
    shown = text_of(console)
    assert "Epoch 1 of 2" in shown
    assert "400/1,000 tokens" in shown
    assert "loss 2.310" in shown
    assert "left" in shown


def test_control_characters_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b]0;title\x07\rb\u202e").plain == "a\\x1b]0;title\\x07\\rb\\u202e"


def test_what_carries_loss_stands_between_markers_without_colour() -> None:
    console = plain()
    tokens = [PreviewToken("Hi", 1, False), PreviewToken(" you", 2, True), PreviewToken("</s>", 3, True)]
    show_tokens(console, "first", tokens=tokens)
    assert text_of(console) == "first\nHi⟦ you</s>⟧\n"
