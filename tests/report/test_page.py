"""The page: whole, safe and self-contained whatever the run folder holds; `report.json` beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from keeptune.errors import StorageError
from keeptune.report.guide import guide
from keeptune.report.headline import headline
from keeptune.report.page import write_report
from keeptune.report.tables import read_report
from tests.report.run_folder import (
    FIRST_COMMAND,
    RECIPE,
    events,
    sample,
    scores_file,
    write_json,
    write_lines,
    write_run,
)

VOID = {"meta", "br", "link", "input", "img", "hr"}
WORDS = """
    html head title style body header main section footer nav a p h1 h2 h3 h4 dl dt dd div span i b strong bdi
    table thead tbody tr th td ol ul li pre code details summary
    figure figcaption svg defs g path text line circle use clippath rect
"""
TAGS = {"meta", *re.findall(r"\S+", WORDS)}
PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "</title></head><body onload=alert(1)>",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    "<!--<script>-->",
    "]]><iframe srcdoc='<script>alert(1)</script>'>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<base href=http://evil.example/>",
    "<math><mtext></p><style><a id='</style><img src onerror=alert(1)>'>",
]


class Page(HTMLParser):
    """Reads a page and holds what it is made of; a tag that closes nothing or is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        self.text.append(" " if tag in {"td", "th", "dd", "dt", "p", "h4"} else "")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def assert_safe(page: Page) -> None:
    assert {tag for tag, _ in page.tags} <= TAGS
    ids = {attributes.get("id") for _, attributes in page.tags}
    for tag, attributes in page.tags:
        forbidden = {"src", "srcdoc", "style", "action", "formaction"}
        assert not [name for name in attributes if name.startswith("on") or name in forbidden]
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or (target.startswith("#") and target[1:] in ids), (tag, target)


def poisoned(value: Any, payload: str) -> Any:
    """Put the payload behind every text of a JSON value, but for the names of events, splits and all tasks."""
    if isinstance(value, dict):
        kept = {"event", "split"}
        return {key: inner if key in kept else poisoned(inner, payload) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, payload) for inner in value]
    return f"{value}{payload}" if isinstance(value, str) and value != "all" else value


def write_poisoned_run(run: Path, payload: str) -> Path:
    """Write a run in which tasks, methods, metrics, texts, versions, reasons and notes all carry the payload."""
    write_run(run, tasks=("a", "b"), num_steps=3)
    for path in sorted([*run.rglob("*.json"), *run.rglob("*.jsonl")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        values = [poisoned(json.loads(line), payload) for line in lines]
        if path.name == "scores.json":
            values[0]["metrics"] = {f"{name}{payload}": facts for name, facts in values[0]["metrics"].items()}
        if path.name == "samples.jsonl":
            values = [v | {"metrics": {f"{k}{payload}": x for k, x in v["metrics"].items()}} for v in values]
        if path.name == "audit.json":
            audit = values[0]
            for part in ("dropped", "leaks", "tasks"):
                audit[part] = {f"{key}{payload}": inner for key, inner in audit[part].items()}
            audit[f"odd{payload}"] = payload
        if path.name == "manifest.json":
            values[0][f"key{payload}"] = payload
        if path.name == "selection.json":
            # A folder cannot have a slash in its name.
            method = "lora" if "/" in payload else f"lora{payload}"
            chosen: dict[str, Any] = {"selected": method, "metric": f"rougeL{payload}", "split": payload}
            values[0] = chosen | {"values": {f"full{payload}": 0.1, f"lora{payload}": 0.2}}
        write_lines(path, values)
    (run / "recipe.yaml").write_text(RECIPE + payload, encoding="utf-8")
    for method in ("full", "lora"):
        if "/" not in payload:
            (run / method).rename(run / f"{method}{payload}")
    return run


def test_what_the_audit_counts_for_metrics_stays_off_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    audit = json.loads((run / "data/audit.json").read_text())
    counts = {"num_references": 7913, "num_short": 0, "unread": {}}
    write_json(run / "data/audit.json", {**audit, "references": {"ag_news": counts}})
    assert "7,913" not in page_of(run).words


def test_the_page_says_that_the_validation_loss_chose_among_equal_methods(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    note = "full, lora have the same exact_match on validation, 0.000: <b>lora has the lowest validation loss of these."
    facts = json.loads((run / "selection.json").read_text())
    write_json(run / "selection.json", {**facts, "note": note})
    page = page_of(run)
    assert_safe(page)
    assert note in page.text
    assert json.loads((run / "report.json").read_text())["selection"]["note"] == note


def test_a_finished_run_gives_a_safe_page_with_every_section(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "news"))
    assert_safe(page)
    assert len([tag for tag, a in page.tags if tag == "svg" and a.get("class") == "curve"]) == 2
    for words in (
        "english-3m, tuned with lora on 812 records of ag_news, raises ROUGE-L on 100 test records from 0.118 to "
        "0.431, a difference of +0.313 (95 % interval +0.265 to +0.361), at the cost of 590 k trained parameters (15.8 "
        "% of all) and 3 min 12 s of training.",
        "keeptune run recipes/news.yaml --set training.num_train_epochs=3",
        "lora was chosen among 2 methods by ROUGE-L on the validation split. The test split played no part in it.",
        "lora chosen 0.0002 590 k 15.8 % 911 MB 3 min 12 s 4,222 120 2.40 MB cpu float32",
        "rouge_score 0.1.2|rougeL|stemmer|F1|max over 1 reference",
        "1.00 % cut at the limit",
        "How much another seed would change was not measured.",
    ):
        assert words in page.words
    assert "Missing:" not in page.words


def test_tasks_that_were_not_trained_on_stand_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news", "qa"), others=("boolq", "wiki"), num_steps=1)
    page = page_of(run)
    assert_safe(page)
    for words in (
        "english-3m, tuned with lora on 1,624 records of news and qa, raises ROUGE-L on 200 test records of the same "
        "tasks from 0.118",
        "On 2 other tasks, which it was not trained on, it loses: ROUGE-L went from 0.106 to 0.042 (difference −0.064, "
        "95 % interval −0.080 to −0.048).",
        "here those of the tasks trained on. Dot",
        "Trained on news 100",
        "all 200 0.118",
        "Not trained on boolq 100",
        "others 200 0.106 (0.094 to 0.118) ≈ 0.042 (0.037 to 0.046) −0.064 ▼ 0.042 (0.037 to 0.046) −0.064",
        "boolq not trained on 0 0 96",
        "Of 20 test answers of lora to what was trained on, ranked by",
        "Beyond the other tasks of this page, what the tuned model lost",
        "To see it, boolq and wiki were answered before and after tuning, and not trained on in this run.",
    ):
        assert words in page.words, words
    assert "What the tuned model lost outside these tasks was not measured." not in page.words
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert value["untrained_tasks"] == ["boolq", "wiki"]
    assert value["headline"].endswith("95 % interval −0.080 to −0.048).")
    # The audit alone names them too.
    for path in run.rglob("scores.json"):
        write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "untrained_tasks"})
    assert read_report(run).other_tasks == ("boolq", "wiki")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.05, "it gains: ROUGE-L went from 0.106 to 0.042 (difference +0.030, 95 % interval +0.010 to +0.050)."),
        (-0.01, 0.05, "it shows no clear change: ROUGE-L went from"),
        (-0.05, -0.01, "it loses: ROUGE-L went from"),
    ],
)
def test_what_became_of_another_task_is_said_by_its_interval(
    tmp_path: Path, low: float, high: float, words: str
) -> None:
    run = write_run(tmp_path, others=("boolq",), num_steps=1)
    pair = {"model": "lora", "against": "base", "task": "others", "metric": "rougeL", "better": 9, "worse": 8}
    write_json(run / "paired.json", {"paired": [pair | {"difference": 0.03, "low": low, "high": high}]})
    assert f"On another task, boolq, which it was not trained on, {words}" in page_of(run).words
    scores = json.loads((run / "base/zero-shot/scores.json").read_text(encoding="utf-8"))
    scores["scores"] = [row | {"mean": 0.0} for row in scores["scores"]]
    write_json(run / "base/zero-shot/scores.json", scores)
    assert "). The base scored 0 there, and had no ROUGE-L to lose." in page_of(run).words
    write_json(run / "paired.json", {"paired": []})
    assert "it reaches ROUGE-L 0.042; the base was not scored there." in page_of(run).words


def test_a_run_without_other_tasks_says_that_nothing_outside_was_measured(tmp_path: Path) -> None:
    words = page_of(write_run(tmp_path, tasks=("news", "qa"), num_steps=1)).words
    assert "What the tuned model lost outside these tasks was not measured." in words
    assert "not trained on" not in words.lower()
    assert "all 200 0.118 (0.105 to 0.131) ▲ 0.402 (0.357 to 0.447) +0.284" in words


def test_the_guide_tells_in_plain_words_what_was_done(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    text = write_report(run).read_text(encoding="utf-8")
    assert "<details open>\n<summary>How to read this page</summary>" in text
    sentences = guide(read_report(run))
    assert len(re.findall(r"[.](?= |$)", " ".join(sentences))) <= 12
    for words in (
        "A model that already existed, english-3m (“base” on this page), was shown 812 examples of ag_news: prompts,",
        "Full fine-tuning (full, learning rate 2e-05) changes all of the model’s weights (3.15 M numbers).",
        "lora (PEFT’s LORA, learning rate 0.0002) leaves the model’s weights as they are and "
        "trains a small addition to them, of 590 k parameters.",
        "Validation (92 records) was kept out of training and chose when to stop",
        "ROUGE-L: how much of the wording agrees with the expected answer’s, in its order, 0 to 1",
        "Exact match: the share of answers that equal the expected one (case, white space and a final full stop aside)",
        "This run did not measure that: it has no task with train: false.",
    ):
        assert words in " ".join(" ".join(sentences).split())
    # Of many methods, the least and the most that are added.
    report = read_report(run)
    added = [replace(report.costs[1], model=f"m{i}", trained_parameters=n) for i, n in enumerate((900, 50, 70, 8))]
    for number, words in ((3, "of 900, 50 and 70 parameters."), (4, "of 8 to 900 parameters.")):
        assert words in " ".join(guide(replace(report, costs=tuple(added[:number]))))
    # Where nothing is known of the run, nothing is made up.
    empty = " ".join(guide(read_report(tmp_path / "none")))
    assert "the base model (“base” on this page), was shown examples: prompts" in empty
    assert "small addition" not in empty and "records)" not in empty


def test_the_page_names_the_command_that_makes_the_run_again_and_those_that_were_given(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", num_steps=1)
    page = page_of(run)
    again = f"keeptune run '{run}/recipe.yaml'"
    assert f"make everything anew.{again}" in page.words.replace("anew. ", "anew.")
    assert f"2026-11-23T20:30:00Z {FIRST_COMMAND}" in page.words
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert value["command"] == again
    assert [given["command"] for given in value["commands"]] == [
        FIRST_COMMAND,
        "keeptune report news.yaml",
    ]
    (run / "recipe.yaml").unlink()
    assert again not in page_of(run).words


def test_one_is_never_a_plural_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_lines(run / "lora/events.jsonl", [*events(1), {"event": "resumed", "step": 1}])
    write_lines(run / "lora/test/samples.jsonl", [sample("ag_news", 1, value=1.0, prediction="World")])
    write_json(run / "lora/test/scores.json", scores_file("lora", ["ag_news"], num_records=1))
    words = page_of(run).words
    assert "on 1 test record from" in words
    assert "1 step." in words and "Resumed 1 time." in words and "Of 1 test answer of" in words
    plurals = "records|steps|times|answers|methods|tasks|values|clusters"
    assert not re.findall(rf"(?<![\d,.])1 (?:test )?(?:{plurals})\b", words)


def test_the_policy_forbids_everything_but_the_one_style(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, num_steps=3))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert not re.search(r"url\(|@import|https?:", page.style)


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", num_steps=5)
    first = write_report(run).read_bytes(), (run / "report.json").read_bytes()
    assert (write_report(run).read_bytes(), (run / "report.json").read_bytes()) == first


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_of_a_run_becomes_markup(tmp_path: Path, payload: str) -> None:
    run = write_poisoned_run(tmp_path / "run", payload)
    for path in run.rglob("events.jsonl"):
        path.write_text("", encoding="utf-8")
    page = page_of(run)
    assert_safe(page)
    shown = " ".join(payload.split())
    assert page.words.count(shown) > 90
    for place in ("a", "base", "key", "World", "0.1.0", "ag_news.jsonl:12", "the article is about", "seed: 0"):
        assert f"{place}{shown}" in page.words or f"{place} {shown}" in page.words, place


def test_a_method_with_a_hostile_name_is_drawn_and_named(tmp_path: Path) -> None:
    payload = " $\\frac{1}{2}$ <img src=x onerror=alert(1)>"
    page = page_of(write_poisoned_run(tmp_path / "run", payload))
    assert_safe(page)
    assert f"lora{payload} chosen" in page.words
    assert [a.get("class") for tag, a in page.tags if tag == "svg"].count("curve") == 2


def test_direction_and_control_marks_are_made_visible(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=3)
    answer = sample("ag_news", 1, value=1.0, prediction="safe\u202eevil\x1b[31m\u200b\ud83d", prompt="a\u2066b")
    write_lines(run / "lora/test/samples.jsonl", [answer])
    text = write_report(run).read_text(encoding="utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x1b\ud800-\udfff]", text)
    marks = re.findall(r'<span class="mark">([^<]+)</span>', text)
    assert {"RLO", "ESC", "ZWSP", "U+D83D", "LRI"} <= set(marks)


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert_safe(page)
    for words in (
        "No method has been trained in this run yet.",
        "No model has been scored on test yet.",
        "No loss has been logged yet.",
        "The data have not been audited.",
        "The test split has not been opened.",
        "Missing: recipe.yaml: not there",
    ):
        assert words in page.words


PARTS = [
    "recipe.yaml",
    "manifest.json",
    "selection.json",
    "paired.json",
    "test_openings.jsonl",
    "data",
    "base",
    "full",
    "lora",
    "lora/test",
    "lora/test/samples.jsonl",
    "lora/test/scores.json",
    "lora/training.json",
    "lora/events.jsonl",
    "base/zero-shot/samples.jsonl",
    "base/zero-shot/scores.json",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_run_without_any_one_part_gives_a_page(tmp_path: Path, part: str) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    path = run / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert_safe(page_of(run))
    json.loads((run / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"scores": 3}', b"\xff\x00", b'{"a": NaN}'])
def test_a_run_whose_files_are_all_broken_gives_a_page(tmp_path: Path, content: bytes) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        path.write_bytes(content)
    assert_safe(page_of(run))


def test_numbers_that_are_not_finite_are_named_and_leave_valid_json(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    for name in ("lora/test/scores.json", "paired.json", "lora/training.json", "selection.json", "lora/events.jsonl"):
        text = (run / name).read_text(encoding="utf-8")
        (run / name).write_text(re.sub(r": -?\d+\.\d+(e-?\d+)?", ": NaN", text), encoding="utf-8")
    page = page_of(run)
    assert_safe(page)
    assert "not finite" in page.words
    value = json.loads((run / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert [s["mean"] for s in value["scores"] if s["model"] == "lora"] == [None] * 6


def test_an_unfinished_run_says_what_is_done(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=2)
    for part in ("selection.json", "paired.json", "lora/training.json"):
        (run / part).unlink()
    shutil.rmtree(run / "lora/test")
    page = page_of(run)
    assert "This run has chosen no method yet: full trained to the end; lora unfinished." in page.words
    assert "This training has not finished." in page.words


def test_a_loss_that_is_worse_is_called_worse_and_a_doubtful_gain_unclear(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    pair = {"model": "lora", "against": "base", "task": "all", "better": 9, "worse": 8}
    doubtful = pair | {"metric": "rougeL", "difference": 0.01, "low": -0.02, "high": 0.04}
    worse = pair | {"metric": "loss", "difference": 0.5, "low": 0.4, "high": 0.6}
    write_json(run / "paired.json", {"paired": [doubtful, worse]})
    page = page_of(run)
    assert "shows no clear change in ROUGE-L on 100 test records: 0.118 to 0.431, +0.010" in page.words
    assert "≈ unclear" in page.words
    assert "▼ worse" in page.words


def test_what_the_audit_counts_says_of_what(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    words = page_of(run).words
    assert "Lengths tokens, before cutting Part" in words
    assert "Overlap of train with validation and test each record once, under the first kind that holds Kind" in words
    assert "More than half in common runs of 8 words 2 2 No more than a common run of 13 words (no leak) 31 0" in words
    value = json.loads((run / "data/audit.json").read_text(encoding="utf-8"))
    write_json(run / "data/audit.json", value | {"truncated": 0})
    assert "Lengths tokens Part" in page_of(run).words


def test_a_method_that_changes_no_score_is_not_called_unclear(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("news", "qa"), others=("boolq",), num_steps=1)
    same = {"model": "lora", "against": "base", "metric": "rougeL", "better": 0, "worse": 0}
    pairs = [same | {"task": task, "difference": 0.0, "low": 0.0, "high": 0.0} for task in ("all", "news", "others")]
    write_json(run / "paired.json", {"paired": pairs})
    page = page_of(run)
    for words in (
        "on 1,624 records of news and qa, changes no record’s ROUGE-L on 200 test records of the same "
        "tasks: it stays 0.118",
        "On another task, boolq, which it was not trained on, it changes no record’s score: ROUGE-L went from",
        "0 0 = no score changed",
        "≈ unclear, = no record’s score changed, ∅ both have 0 in this metric, and the base had none of it to lose.",
    ):
        assert words in page.words, words
    assert "≈ unclear 0" not in page.words and "0 ≈ unclear" not in page.words


def test_a_base_that_was_not_scored_is_said_in_the_headline(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    (run / "paired.json").unlink()
    text = "".join(phrase.text for phrase in headline(read_report(run)))
    assert "reaches ROUGE-L 0.431 on 100 test records; the base was not scored on them" in text


def test_very_long_texts_and_runs_leave_a_page_of_bounded_size(tmp_path: Path) -> None:
    tasks = tuple(f"task-{i}" for i in range(40))
    run = write_run(tmp_path, tasks=tasks, num_steps=20_000)
    long = "word " * 200_000
    write_lines(
        run / "lora/test/samples.jsonl", [sample("t", i, value=0.5, prediction=long, prompt=long) for i in range(3)]
    )
    (run / "recipe.yaml").write_text(long, encoding="utf-8")
    page = write_report(run)
    assert page.stat().st_size < 2_000_000
    assert "characters left out …]" in page.read_text(encoding="utf-8")


def test_report_json_has_the_documented_fields(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=6)
    write_report(run)
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    documented = (Path(__file__).resolve().parents[2] / "docs/report.md").read_text(encoding="utf-8")
    assert value["version"] == 1
    assert value["selected"] == "lora"
    assert value["scores"][0].keys() == {
        "model", "shots", "task", "metric", "mean", "standard_error", "low", "high", "num_records", "num_clusters",
    }  # fmt: skip
    assert value["paired"][0].keys() == {
        "model", "against", "task", "metric", "difference", "low", "high", "better", "worse", "standard_error",
        "num_clusters",
    }  # fmt: skip
    assert {
        "model",
        "trained_parameters",
        "peak_memory_bytes",
        "train_seconds",
        "tokens_per_second",
        "artifact_bytes",
    } <= (value["cost"][0].keys())
    parts = [value[k][0] for k in ("scores", "paired", "cost", "metrics", "decoding")]
    for part in (value, value["selection"], value["answers"], value["audit"], *parts):
        for key in part:
            assert f"`{key}`" in documented, key


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, num_steps=1)
    before = write_report(run).read_bytes()
    write_lines(run / "lora/events.jsonl", events(9))

    replace = Path.replace

    def refuse_the_page(self: Path, target: Path) -> Path:
        if target.name == "report.html":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_the_page)
    with pytest.raises(StorageError, match="no space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))
