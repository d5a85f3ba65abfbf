"""A run folder becomes tables; what is absent or broken becomes a note, never an error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from keeptune.data import audit as data_audit
from keeptune.data.leak_audit import leak_audits
from keeptune.errors import StorageError
from keeptune.report.audit import Parts, SplitCounts
from keeptune.report.curves import MAX_POINTS, read_curve
from keeptune.report.differences import Paired
from keeptune.report.layout import paired_groups, score_groups, task_tables
from keeptune.report.reading import RunFolder, number, whole
from keeptune.report.scores import read_scores
from keeptune.report.tables import read_report
from keeptune.storage import read_json
from tests.report.run_folder import events, sample, scores_file, write_json, write_lines, write_run
from tests.report.test_page import page_of


def test_a_finished_run_misses_nothing(tmp_path: Path) -> None:
    report = read_report(write_run(tmp_path / "news", num_steps=6))
    assert report.missing == ()
    assert (report.name, report.models, report.methods) == ("news", ("base", "full", "lora"), ("full", "lora"))
    assert (report.selection.selected, report.main_metric) == ("lora", "rougeL")
    assert report.tasks == ("ag_news",)
    assert [cost.trained_parameters for cost in report.costs] == [3_147_264, 589_824]


def test_a_small_perplexity_keeps_its_digits_beside_a_large_one(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("ag_news", "qa"), num_steps=1)
    means = {"base": 7171.2, "full": 1.414, "lora": 10.48}
    for model, mean in means.items():
        path = run / ("base/zero-shot" if model == "base" else f"{model}/test") / "scores.json"
        value = read_json(path)
        of_loss = [row for row in value["scores"] if row["metric"] == "loss"]
        rows = [{**row, "metric": "perplexity", "mean": mean, "standard_error": None} for row in of_loss]
        write_json(path, {**value, "scores": [*value["scores"], *rows]})
    tuned = {"model": "lora", "against": "full", "task": "all", "metric": "perplexity", "low": 8.9, "high": 9.2}
    other = {"model": "full", "against": "base", "task": "ag_news", "metric": "perplexity", "difference": -7169.786}
    pairs = [tuned | {"difference": 9.066}, tuned | {"against": "base", "difference": -7160.72, "low": -7999.0}, other]
    write_json(run / "paired.json", {"paired": pairs})
    report = read_report(run)
    [scores] = [group for group in score_groups(report) if group.label == "Perplexity"]
    assert [row.mean for row in scores.rows] == ["7,171.2", "1.414", "10.48"]
    [differences] = [group for group in paired_groups(report) if group.label == "Perplexity"]
    assert [row.difference for row in differences.rows] == ["+9.066", "−7,160.7"]
    [tasks] = [table for table in task_tables(report) if table.label == "Perplexity"]
    assert [cell.mean for cell in tasks.groups[0].rows[0].cells] == ["7,171.2", "1.414", "10.48"]
    # Not "−7,169.786": a difference has as many digits as it is large.
    assert tasks.groups[0].rows[0].cells[1].difference == "−7,169.8"


def test_where_no_score_differs_nothing_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    same = {"model": "lora", "task": "all", "metric": "rougeL", "difference": 0.0, "low": 0.0, "high": 0.0}
    pairs = [{**same, "against": against, "better": 0, "worse": 0} for against in ("base", "full")]
    write_json(run / "paired.json", {"paired": pairs})
    (group,) = paired_groups(read_report(run))
    assert [row.figure for row in group.rows] == ["", ""] and group.axis == ""
    assert "= no score changed" in page_of(run).words


def test_the_test_records_that_no_score_is_from_are_counted_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path, others=("boolq",), num_steps=1)
    audit = read_json(run / "data/audit.json")
    write_json(run / "data/audit.json", {**audit, "parts": {"boolq": {"probe": 19, "certify": 38}}})
    report = read_report(run)
    assert report.audit.parts == (Parts("boolq", 19, 38, 0),)
    words = page_of(run).words
    assert "boolq 19 38 0" in words and "Parts: " not in words
    # 96 of each task, without the 57 that were set aside.
    assert "test (135 records: 96 of what was trained on, 39 of other tasks) was used for neither" in words


def test_methods_stand_in_the_order_of_the_selection(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_json(run / "selection.json", {"selected": "lora", "metric": "rougeL", "values": {"lora": 0.5, "full": 0.4}})
    assert read_report(run).methods == ("lora", "full")


def test_a_method_of_an_earlier_recipe_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_json(run / "manifest.json", {**read_json(run / "manifest.json"), "methods": ["full"]})
    assert read_report(run).methods == ("full",)


def test_a_half_written_or_hidden_folder_is_no_method(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_json(run / "lora.tmp-12ab34cd/training.json", {})
    write_json(run / ".cache/training.json", {})
    write_json(run / "instruct-model/training.json", {})
    assert read_report(run).methods == ("full", "lora")


def test_an_interval_is_what_scores_json_says() -> None:
    row = {"model": "lora", "task": "all", "metric": "rougeL", "mean": 0.5, "low": 0.3, "high": 0.69}
    score, alone = read_scores({"scores": [row, row | {"low": None, "high": None}]})
    assert (score.low, score.high, alone.low, alone.high) == (0.3, 0.69, None, None)


def test_examples_in_the_prompt_make_no_second_base(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    value = scores_file("base", ["ag_news"])
    rows = [r | {"shots": 3, "mean": r["mean"] + 0.1} for r in value["scores"]]
    write_json(run / "base/3-shot/scores.json", value | {"scores": rows})
    report = read_report(run)
    assert report.models == ("base", "full", "lora")
    base = report.score("base", "rougeL")
    assert base is not None and base.mean == 0.118
    assert [(f.name, f.mean) for f in report.few_shot if (f.task, f.metric) == ("all", "rougeL")] == [
        ("base, 3 shots", pytest.approx(0.218))
    ]


@pytest.mark.parametrize(
    ("low", "high", "higher", "verdict"),
    [
        (0.1, 0.2, True, "better"),
        (0.1, 0.2, False, "worse"),
        (-0.2, -0.1, False, "better"),
        (-0.1, 0.1, True, "unclear"),
        (0.0, 0.1, True, "unclear"),
        (None, None, True, "unclear"),
    ],
)
def test_a_difference_counts_only_where_its_interval_excludes_zero(
    low: float | None, high: float | None, higher: bool, verdict: str
) -> None:
    pair = Paired("lora", "base", "all", "m", 0.1, low, high, 1, 1)
    assert pair.verdict(higher_is_better=higher) == verdict


def test_a_difference_that_no_record_has_is_not_unclear() -> None:
    assert Paired("lora", "base", "all", "m", 0.0, 0.0, 0.0, 0, 0).verdict(higher_is_better=True) == "same"
    # Where records were not counted, nothing is claimed of them.
    assert Paired("lora", "base", "all", "m", 0.0, 0.0, 0.0, None, None).verdict(higher_is_better=True) == "unclear"


def test_selecting_by_loss_leaves_the_headline_to_the_recipes_first_metric(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_json(run / "selection.json", {"selected": "full", "metric": "loss", "split": "validation", "values": {}})
    assert read_report(run).main_metric == "rougeL"


def test_a_chosen_name_is_never_followed_out_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    write_lines(tmp_path / "secret/test/samples.jsonl", [sample("t", 1, value=1.0, prediction="secret")])
    write_json(run / "selection.json", {"selected": "../secret", "metric": "rougeL", "split": "validation"})
    answers = read_report(run).answers
    assert answers is not None
    assert answers.model == "full"


def test_an_empty_folder_gives_a_report_that_says_what_is_missing(tmp_path: Path) -> None:
    report = read_report(tmp_path)
    assert report.methods == report.scores == report.curves == ()
    assert report.answers is None
    assert "manifest.json: not there" in report.missing
    assert "data/audit.json: not there" in report.missing


def test_broken_files_are_noted_with_their_names(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=2)
    (run / "paired.json").write_text("{", encoding="utf-8")
    (run / "selection.json").write_text("[1]", encoding="utf-8")
    (run / "manifest.json").write_bytes(b"\xff\xfe{}")
    with (run / "lora/events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "st\n[1]\n')
    missing = "\n".join(read_report(run).missing)
    assert "paired.json: no valid JSON" in missing
    assert "selection.json: found list; expected a JSON object" in missing
    assert "manifest.json: no valid JSON" in missing
    assert "lora/events.jsonl: left out broken lines 7, 8" in missing


def test_wrong_types_in_every_field_count_as_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_json(run / "lora/training.json", {"trained_parameters": "many", "train_seconds": [1], "peft_type": 3})
    write_json(run / "paired.json", {"paired": [1, None, {"model": 4, "difference": "x"}]})
    write_json(run / "lora/test/scores.json", {"scores": {"a": 1}, "metrics": [1], "decoding": "greedy"})
    write_json(run / "data/audit.json", {"rows_in": "x", "dropped": [1], "tasks": {"t": 3}, "tokens": None})
    report = read_report(run)
    cost = report.cost("lora")
    assert cost is not None
    assert (cost.trained_parameters, cost.train_seconds, cost.peft_type) == (None, None, None)
    assert report.paired[0].difference is None


def test_a_file_that_the_disk_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, num_steps=1)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(StorageError, match="permission denied"):
        read_report(run)


def test_numbers_are_numbers_and_nothing_else() -> None:
    assert [number(v) for v in (1, 2.5, True, "3", None)] == [1.0, 2.5, None, None, None]
    assert number(10**400) == math.inf
    assert [whole(v) for v in (3, 2.0, math.nan, math.inf)] == [3, 2, None, None]


def test_the_audit_is_read_as_the_data_room_writes_it(tmp_path: Path) -> None:
    read = read_report(write_run(tmp_path, num_steps=1)).audit
    assert (read.rows_in, read.kept, read.truncated) == (1020, 1000, 4)
    assert read.dropped == (("exact_duplicate", 12), ("leak", 6), ("empty_completion", 2))
    assert read.splits == (SplitCounts("ag_news", 812, 92, 96),)
    assert [(leak.kind, leak.num_train_records, leak.num_removed) for leak in read.leaks][2:] == [
        ("ngram_cover", 2, 2),
        ("ngram_13", 31, 0),
    ]
    assert [(lengths.part, lengths.p99) for lengths in read.lengths] == [
        ("prompt", 240),
        ("completion", 5),
        ("total", 244),
    ]
    assert ("near_duplicates.num_pairs", "2") in read.other
    assert ("tokens.supervised_tokens", "30120") in read.other
    shown = {group.title: (len(group.cases), group.num_more) for group in read.examples}
    assert shown["leaks.ngram_13.examples"] == (6, 3)


def test_an_audit_of_the_data_room_itself_is_read(tmp_path: Path) -> None:
    lengths = data_audit.Lengths()
    lengths.add(5, 2)
    lengths.add(7, 2)
    written = data_audit.Audit(
        rows_in=12,
        kept=10,
        dropped={"leak": 2},
        dropped_rows=(),
        exact_duplicates=0,
        near_duplicates=data_audit.NearAudit(0, ()),
        groups=data_audit.GroupAudit(10, 0, 0, 1),
        tasks={"a": data_audit.SplitCounts(8, 1, 1)},
        leaks=leak_audits({}, [], removed={}),
        tokens=data_audit.token_audit(lengths, truncated=3, completion_cut=0, too_long=0, supervised_tokens=4),
    )
    write_json(tmp_path / "data/audit.json", written.to_json())
    read = read_report(tmp_path).audit
    assert (read.rows_in, read.kept, read.truncated, read.num_train) == (12, 10, 3, 8)
    assert (read.splits, read.dropped) == ((SplitCounts("a", 8, 1, 1),), (("leak", 2),))
    assert [leak.num_removed for leak in read.leaks] == [0, 0, 0, 0]
    assert [lengths.max for lengths in read.lengths] == [7, 2, 9]


def test_the_audit_hides_no_count_that_it_does_not_know(tmp_path: Path) -> None:
    write_json(tmp_path / "data/audit.json", {"rows_in": 3, "num_odd": 7, "inner": {"share": 0.5}, "odd": [{"a": 1}]})
    audit = read_report(tmp_path).audit
    assert audit.other == (("num_odd", "7"), ("inner.share", "0.5"))
    assert audit.examples[0].cases == ((("a", "1"),),)


def test_the_headline_compares_with_the_base_and_not_with_another_method(tmp_path: Path) -> None:
    report = read_report(write_run(tmp_path, num_steps=1))
    pair = report.difference("lora", "rougeL")
    assert pair is not None
    assert pair.against == "base"


def test_weights_are_named_by_their_hashes(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    files = {"adapter_model.safetensors": {"bytes": 3, "sha256": "ab12"}, "README.md": {"bytes": 1, "sha256": "cd"}}
    write_json(run / "lora/adapter/manifest.json", {"files": files})
    assert ("lora/adapter/adapter_model.safetensors SHA-256", "ab12") in read_report(run).facts


def test_a_curve_leaves_out_and_counts_what_is_not_finite(tmp_path: Path) -> None:
    lines = [{"event": "step", "step": 1, "loss": 2.0}, {"event": "step", "step": 2, "loss": None}]
    lines += [{"event": "step", "step": 3, "loss": float("nan")}, {"event": "step", "step": 4, "loss": 1e300}]
    lines += [{"event": "validation", "step": 4, "loss": 1.5}, {"event": "non_finite", "step": 5}]
    write_lines(tmp_path / "lora/events.jsonl", lines)
    curve = read_curve(RunFolder(tmp_path), "lora")
    assert curve is not None
    assert (curve.train, curve.validation) == (((1.0, 2.0),), ((4.0, 1.5),))
    assert (curve.num_left_out, curve.stopped_at) == (3, 5)


def test_a_curve_has_the_drift_where_it_was_measured(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"event": "drift", "step": step, "kl": step / 4} for step in (1, 2)]
    lines += [{"event": "drift", "step": 3, "kl": None}, {"event": "drift", "step": None, "kl": 1.0}]
    write_lines(tmp_path / "lora/events.jsonl", lines)
    curve = read_curve(RunFolder(tmp_path), "lora")
    assert curve is not None
    assert curve.drift == ((1.0, 0.25), (2.0, 0.5))
    assert curve.is_empty and curve.num_left_out == 0


def test_a_long_curve_is_averaged_to_a_bounded_number_of_points(tmp_path: Path) -> None:
    write_lines(tmp_path / "lora/events.jsonl", events(20_000))
    curve = read_curve(RunFolder(tmp_path), "lora")
    assert curve is not None
    assert (len(curve.train), curve.steps_per_point) == (318, 63)
    assert len(curve.train) <= MAX_POINTS
    assert curve.train[0][0] == 32.0
    assert curve.num_steps == 20_000
