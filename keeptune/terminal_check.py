"""What a check found arrives; its audit, methods, budgets and records as the model reads them leave as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from keeptune.progress import noun
from keeptune.stages.check import CheckOutcome
from keeptune.terminal import show_audit, show_table, visible

if TYPE_CHECKING:
    from keeptune.text.tokens import PreviewToken


def show_check(console: Console, outcome: CheckOutcome) -> None:
    """Print the audit, the methods and the budgets, then records as the model reads them and the first one's tokens."""
    show_audit(console, outcome.audit)
    if outcome.mixture:
        rows = [
            (s.source, *(f"{n:,}" for n in (s.num_examples, s.num_per_epoch, s.num_repeats))) for s in outcome.mixture
        ]
        show_table(console, "Mixture", ("task", "train records", "an epoch shows", "of these again"), rows=rows)
    if outcome.idle:
        console.print(visible(f"{outcome.idle}."), highlight=False, soft_wrap=True)
    for remark in outcome.remarks:
        console.print(visible(remark), highlight=False, soft_wrap=True)
    rows = [
        (m.name, m.peft_type or "all parameters", f"{m.learning_rate:g}", f"{m.num_steps:,}", f"{m.tokens_per_step:,}")
        for m in outcome.methods
    ]
    header = ("method", "trains", "learning rate", "steps, about", "tokens a step")
    show_table(console, "Methods", header, rows=rows)
    if outcome.computes_on:
        console.print(visible(f"Training will compute on {outcome.computes_on}."), highlight=False, soft_wrap=True)
    if outcome.budgets:
        rows = [
            (b.suite, b.budget, *("counted by run" if n is None else f"{n:,}" for n in (b.num_records, b.num_needed)))
            for b in outcome.budgets
        ]
        show_table(console, "Budgets", ("suite", "may lose", "records to certify on", "needed"), rows=rows, num_left=2)
    console.print(f"\nTemplate: {outcome.template}. What carries loss is green (between ⟦ ⟧ without colour).\n")
    for title, tokens in outcome.previews:
        show_tokens(console, title, tokens=tokens)
        console.print()
    if outcome.others:
        listed = ", ".join(
            f"{task} ({number:,} train {noun(number, 'records')})" for task, number in outcome.others.items()
        )
        # In turn: with some task left out, each of the records shown is of another one.
        enough = len(outcome.previews) + len(outcome.others)
        line = f"No record shown of: {listed}. With --records {enough}, one of each task is.\n"
        console.print(visible(line), highlight=False, soft_wrap=True)
    if outcome.previews:
        show_token_table(console, tokens=outcome.previews[0][1], at_most=40)


def show_tokens(console: Console, title: str, *, tokens: Sequence[PreviewToken]) -> None:
    """Print a rendered record; what carries loss is green (and between markers where there is no colour)."""
    line = Text()
    colour = console.is_terminal and not console.no_color
    previous = False
    for token in tokens:
        if token.trained != previous and not colour:
            line.append("⟦" if token.trained else "⟧")
        line.append_text(visible(token.text))
        if token.trained:
            line.stylize("bold green", len(line) - len(visible(token.text)))
        previous = token.trained
    if previous and not colour:
        line.append("⟧")
    console.print(visible(title), style="bold")
    console.print(line, soft_wrap=True)


def show_token_table(console: Console, *, tokens: Sequence[PreviewToken], at_most: int) -> None:
    """Print position, id, text and whether it is trained on, for the ends of a record."""
    half = at_most // 2
    shown = list(enumerate(tokens))
    if len(shown) > at_most:
        shown = shown[:half] + shown[-half:]
    rows = [(str(i), str(t.id), repr(t.text), "trained" if t.trained else "") for i, t in shown]
    left_out = len(tokens) - len(shown)
    title = "Tokens of the first record" + (f" ({left_out} in the middle left out)" if left_out else "")
    show_table(console, title, ("position", "id", "text", "loss"), rows=rows)
