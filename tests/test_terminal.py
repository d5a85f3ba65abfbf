"""What a person reads: plain lines for pipes, one live line for terminals, and no steering by data."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from keeptune.progress import Joined
from keeptune.report.page import write_report
from keeptune.stages import CheckOutcome
from keeptune.stages.check import CheckedBudget, CheckedMethod
from keeptune.storage import read_json
from keeptune.terminal import (
    LiveProgress,
    PlainProgress,
    show_audit,
    show_certificate,
    show_scores,
    visible,
)
from keeptune.terminal_change import show_change
from keeptune.terminal_check import show_check, show_tokens
from keeptune.text.mixture import Share
from keeptune.text.tokens import PreviewToken
from tests.report.run_folder import audit, write_certificate, write_forgetting, write_json, write_run, write_shots
from tests.stages.world import Notes


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


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_work_that_cannot_be_counted_yet_shows_its_time_and_no_rate() -> None:
    console, clock = plain(), Clock()
    progress = PlainProgress(console, quiet=False, clock=clock)
    progress.start("Reading", total=4, unit="tasks")
    for seconds, count, note in ((20.0, 0, "9,000 rows"), (40.0, 1, ""), (60.0, 3, "")):
        clock.now = seconds
        progress.advance(count, note=note)
    progress.finish()
    assert text_of(console).splitlines() == [
        "Reading: 4 tasks, 20 s so far, 9,000 rows",
        "Reading: 1/4 tasks, 120 s left, 9,000 rows",
        "Reading: 4 tasks in 60.0 s, 9,000 rows",
    ]


def test_no_ten_seconds_pass_without_a_line_whatever_the_work_tells() -> None:
    console, clock = plain(), Clock()
    progress = PlainProgress(console, quiet=False, clock=clock)
    progress.say("full: answering the 105 records of test")
    silent, longest, shown = 0, 0, 1
    steps = [(None, 0)] * 25 + [("start", 0)] + [("wait", 0)] * 24 + [("advance", 30)] + [("wait", 0)] * 23
    for kind, count in steps:
        clock.now += 1.0
        if kind == "start":
            progress.start("Answers", total=105, unit="records")
        if kind == "advance":
            progress.advance(count)
        progress.beat()
        lines = len(text_of(console).splitlines())
        silent, shown = (0, lines) if lines > shown else (silent + 1, lines)
        longest = max(longest, silent)
    assert longest <= 10
    assert text_of(console).splitlines() == [
        "full: answering the 105 records of test",
        "Still at work, 10 s after the line above",
        "Still at work, 20 s after the line above",
        "Answers: 105 records, 4 s so far",
        "Answers: 105 records, 14 s so far",
        "Answers: 105 records, 24 s so far",
        "Answers: 30/105 records, 1.2/s, 54 s left",
        "Answers: 30/105 records, 1.2/s, 44 s left",
    ]


def test_a_quiet_run_has_no_beat() -> None:
    console, clock = plain(), Clock()
    progress = PlainProgress(console, quiet=True, clock=clock)
    clock.now = 100.0
    progress.beat()
    progress.start("Answers", total=105, unit="records")
    clock.now = 200.0
    progress.beat()
    assert text_of(console) == ""


def test_stages_that_stood_there_are_told_in_one_line() -> None:
    notes = Notes()
    progress = Joined(notes)
    progress.say("run/data: prepared before and unchanged")
    progress.say("run/full: trained before and unchanged")
    assert notes.lines == []
    progress.say("lora: 10 of 20 parameters train")
    progress.say("run/base: evaluated before and unchanged")
    progress.finish()
    progress.finish()
    assert notes.lines == [
        "run/data: prepared, run/full: trained before and unchanged",
        "lora: 10 of 20 parameters train",
        "run/base: evaluated before and unchanged",
    ]
    progress.say("run/data: prepared before and unchanged")
    progress.start("Epoch 1", total=2, unit="tokens")
    assert notes.lines[3:] == ["run/data: prepared before and unchanged"]


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


def scores_of(run: Path) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    show_scores(console, write_report(run).with_name("report.json"))
    return text_of(console)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_each_task_has_a_row_with_its_score_before_and_after(tmp_path: Path) -> None:
    rows = [cells(line) for line in scores_of(write_run(tmp_path, tasks=("news", "boolq"), num_steps=1)).splitlines()]
    assert ["task", "records", "full", "lora"] in rows
    # 0.6 and 0.76 times the means over all; the interval is 1.96 standard errors to each side.
    assert ["news", "100", "0.071 → 0.241 [0.203, 0.279]", "0.071 → 0.259 [0.218, 0.299]"] in rows
    assert ["boolq", "100", "0.090 → 0.306 [0.258, 0.353]", "0.090 → 0.328 [0.276, 0.379]"] in rows
    assert ["all together", "200", "0.118 → 0.402 [0.357, 0.447]", "0.118 → 0.431 [0.383, 0.479]"] in rows


def test_what_each_suite_lost_stands_there_for_the_delivered_model_too(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news",), others=("boolq", "wiki"), num_steps=1)
    rows = [cells(line) for line in scores_of(write_forgetting(run, verdict="CERTIFIED")).splitlines()]
    shown = [row for row in rows if row[:2] in (["others together", "rougeL"], ["self", "nats per token"])]
    lost = [row[:2] + [cell.split()[0] for cell in row[2:]] for row in shown]
    # 0.7 of 0.3 and of 0.2, and a fifth of that at the alpha that is delivered; texts lost half.
    assert "lora at alpha 0.3 (delivered)" in [row[0] for row in rows if row[1:2] == ["rougeL"]]
    assert [row[2].split()[0] for row in rows if row[:1] == ["others together but wiki"]] == ["+0.300"]
    assert lost == [
        ["others together", "rougeL", "+0.210", "+0.140", "+0.028"],
        ["self", "nats per token", "+0.150", "+0.100", "+0.020"],
    ]


def test_tasks_that_were_not_trained_on_stand_below_the_others(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news", "qa"), others=("boolq", "wiki"), num_steps=1)
    rows = [cells(line) for line in scores_of(run).splitlines()]
    labels = [row[0] for row in rows[rows.index(["trained on", "", "", ""]) :] if row]
    trained = ["trained on", "news", "qa", "all together", "mean of the tasks"]
    assert labels == [*trained, "not trained on", "boolq", "wiki", "others together", "mean of the others"]
    assert ["boolq", "100", "0.106 → 0.042 [0.035, 0.048]", "0.106 → 0.042 [0.035, 0.048]"] in rows
    assert ["others together", "200", "0.106 → 0.042 [0.037, 0.046]", "0.106 → 0.042 [0.037, 0.046]"] in rows
    console = plain()
    show_audit(console, audit(("news",), others=("boolq",)))
    assert ["boolq (not trained on)", "0", "0", "96"] in [cells(line) for line in text_of(console).splitlines()]


def test_the_last_lines_say_what_each_method_learned_and_what_it_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news",), others=("boolq",), num_steps=1)
    console = plain()
    show_change(console, write_report(run).with_name("report.json"))
    assert text_of(console).splitlines() == [
        "full: learned 0.118 → 0.402, the other tasks 0.106 → 0.042 (rougeL)",
        "lora: learned 0.118 → 0.431, the other tasks 0.106 → 0.042 (rougeL)",
    ]
    run = write_run(tmp_path / "alone", num_steps=1)
    console = plain()
    show_change(console, write_report(run).with_name("report.json"))
    assert text_of(console).splitlines()[0] == "full: learned 0.118 → 0.402 (rougeL)"


def test_the_last_lines_say_what_the_delivered_model_learned_and_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("ag_news",), others=("boolq", "wiki"), num_steps=1)
    write_forgetting(run, verdict="CERTIFIED")
    forgetting = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    write_json(run / "forgetting.json", {**forgetting, "rows": forgetting["rows"][::-1]})
    console = plain()
    show_change(console, write_report(run).with_name("report.json"))
    # 0.8 of the whole training's 0.431; of others 0.028 of 0.6 are lost at alpha 0.3.
    assert text_of(console).splitlines()[-1] == (
        "Delivered, lora at alpha 0.3: learned 0.118 → 0.345, the other tasks 0.600 → 0.572 (rougeL)"
    )


def test_methods_of_which_nothing_was_certified_have_their_lines_too(tmp_path: Path) -> None:
    run = write_forgetting(write_run(tmp_path, others=("boolq", "wiki"), num_steps=1), verdict="INFEASIBLE")
    selection = read_json(run / "selection.json")
    write_json(run / "selection.json", {**selection, "values": {}})
    console = plain()
    show_change(console, write_report(run).with_name("report.json"))
    assert [line.split(":")[0] for line in text_of(console).splitlines()] == ["full", "lora"]


@pytest.mark.parametrize("is_certified", [True, False])
def test_a_certificate_is_shown_with_what_is_to_be_used(tmp_path: Path, is_certified: bool) -> None:
    run = write_certificate(tmp_path, "CERTIFIED" if is_certified else "INFEASIBLE")
    console = plain()
    show_certificate(console, run / "certificate.json")
    words = " ".join(text_of(console).split())
    assert ("No tuned model is delivered. Use the base model with 4 solved examples in its" in words) != is_certified
    assert ("Instruct model:" in words) == is_certified


def test_a_single_task_is_shown_once(tmp_path: Path) -> None:
    shown = scores_of(write_run(tmp_path, num_steps=1))
    assert "ag_news" not in shown
    assert [row[:3] for row in map(cells, shown.splitlines()) if row[:2] == ["lora", "rougeL"]] == [
        ["lora", "rougeL", "0.431 [0.363, 0.499]"]
    ]


def test_few_shot_scores_take_a_line_for_each_number_of_examples(tmp_path: Path) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    rows = [row for row in map(cells, scores_of(run).splitlines()) if row and ("shot" in row[0] or row[0] == "prompt")]
    # The intervals of three draws are over these too, and wider than 0.160 to 0.200 and 0.210 to 0.300, their ends.
    assert [row[:2] for row in rows] == [
        ["prompt", "rougeL"],
        ["base, 1 shot, 3 draws", "0.180 [0.143, 0.223]"],
        ["base, 4 shots, 3 draws", "0.250 [0.175, 0.344]"],
        ["base, 4 nearest shots", "0.280 [0.236, 0.324]"],
    ]
    assert "solved examples" not in scores_of(write_run(tmp_path / "without", num_steps=1)).lower()


def test_the_choice_says_what_each_method_reached(tmp_path: Path) -> None:
    lines = scores_of(write_run(tmp_path, num_steps=1)).splitlines()
    assert lines[-1] == "Selected on validation: lora (rougeL: full 0.3991, lora 0.4312)"


def test_where_nothing_is_delivered_every_method_still_has_its_column(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news", "boolq"), num_steps=1)
    path = run / "selection.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "selected": None, "values": {}}), encoding="utf-8")
    lines = scores_of(run).splitlines()
    assert lines[-1] == "No method is delivered: none was shown to keep the budgets."
    assert ["task", "records", "full", "lora"] in [cells(line) for line in lines]


def test_the_interval_of_a_perplexity_has_two_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    value = json.loads((run / "lora/test/scores.json").read_text())
    row = {"model": "lora", "shots": 0, "task": "all", "num_records": 9, "num_clusters": 9}
    of = {"metric": "perplexity", "mean": 7.389, "standard_error": 5.0, "low": 2.773, "high": 19.687}
    value["scores"] = [row | of]
    write_json(run / "lora/test/scores.json", value)
    assert "7.389 [2.773, 19.687]" in scores_of(run)


def test_a_zero_has_no_sign(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news", "qa"), num_steps=1)
    pair = {"model": "lora", "against": "base", "task": "all", "metric": "rougeL", "better": 0, "worse": 0}
    write_json(run / "paired.json", {"paired": [pair | {"difference": -1e-9, "low": -1e-5, "high": 0.071}]})
    assert "0.000 [0.000, +0.071]" in [row[-1] for row in map(cells, scores_of(run).splitlines()) if row]


def test_the_audit_has_no_empty_header(tmp_path: Path) -> None:
    console = plain()
    show_audit(console, audit(("ag_news",)))
    lines = text_of(console).splitlines()
    assert cells(lines[lines.index(next(line for line in lines if line.startswith("Audit"))) + 2])[0] == "rows read"


def test_the_audit_tells_what_was_not_asked_for_from_what_was_taken_out_and_overlaps_in_words() -> None:
    value = audit(("ag_news",))
    value["dropped"] = {"leak": 6, "max_records": 7_900, "not_trained": 91_106, "empty_completion": 2}
    console = plain()
    show_audit(console, value)
    rows = [cells(line) for line in text_of(console).splitlines()]
    assert ["not used: above max_records", "7,900"] in rows
    assert ["not used: non-test rows of tasks not trained on", "91,106"] in rows
    assert ["removed: overlaps of train with validation or test", "6"] in rows
    assert ["removed: empty completion", "2"] in rows
    assert ["target tokens, all splits", "30,120"] in rows
    first = rows.index(["train records that share with a held-out record", ""])
    assert rows[first + 1 : first + 4] == [
        ["a near-duplicate prompt", "4, removed"],
        ["more than half of its words, in runs of 8", "2, removed"],
        ["a short phrase only (13 words in a row)", "31, kept"],
    ]
    assert ["", "median", "90 % have at most", "99 % have at most", "longest"] in rows
    # What is over the limit is longest before it is cut.
    assert "Tokens of a record, before cutting" in text_of(console)
    whole = plain()
    show_audit(whole, {**value, "truncated": 0})
    assert "Tokens of a record\n" in re.sub(" +\n", "\n", text_of(whole))


def test_a_check_names_the_methods_and_the_tasks_of_which_it_shows_nothing() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    methods = [CheckedMethod("full", None, 2e-5, 1200, 505), CheckedMethod("lora", "LORA", 2e-4, 1200, 505)]
    shown = [("news · a:1", [PreviewToken("Hi", 1, False)])]
    others = {"boolq": 812, "one": 1}
    budgets = [CheckedBudget("self", "0.02 nats", 256, 180), CheckedBudget("mmlu", "2 points", None, None)]
    show_check(console, CheckOutcome(audit(("news", "boolq")), "plain", shown, others, methods, budgets))
    rows = [cells(line) for line in text_of(console).splitlines()]
    assert ["full", "all parameters", "2e-05", "1,200", "505"] in rows
    assert ["lora", "LORA", "0.0002", "1,200", "505"] in rows
    assert ["self", "0.02 nats", "256", "180"] in rows
    assert ["mmlu", "2 points", "counted by run", "counted by run"] in rows
    assert (
        "No record shown of: boolq (812 train records), one (1 train record). With --records 3, one of each task is.\n"
    ) in text_of(console)


def test_a_check_says_what_an_epoch_of_the_mixture_shows_of_each_task() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    shares = [Share("news", 1_460, 60), Share("qa", 12, 60)]
    show_check(console, CheckOutcome(audit(("news",)), "plain", [], {}, [], [], shares, "temperature has no effect"))
    rows = [cells(line) for line in text_of(console).splitlines()]
    assert ["task", "train records", "an epoch shows", "of these again"] in rows
    assert ["news", "1,460", "60", "0"] in rows and ["qa", "12", "60", "48"] in rows
    assert "\ntemperature has no effect.\n" in text_of(console)


def test_control_characters_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b]0;title\x07\rb\u202e").plain == "a\\x1b]0;title\\x07\\rb\\u202e"


def test_what_carries_loss_stands_between_markers_without_colour() -> None:
    console = plain()
    tokens = [PreviewToken("Hi", 1, False), PreviewToken(" you", 2, True), PreviewToken("</s>", 3, True)]
    show_tokens(console, "first", tokens=tokens)
    assert text_of(console) == "first\nHi⟦ you</s>⟧\n"
