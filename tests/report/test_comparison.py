"""What a comparison says in words: honest about what is not clear, and nothing that a file brings breaks a table."""

from __future__ import annotations

from typing import Any

from keeptune.report.comparison import markdown, sentences, tables


def model(name: str, **facts: Any) -> dict[str, Any]:
    costs = ("peft_type", "trained_parameters", "total_parameters", "peak_memory_bytes", "estimated_memory_bytes")
    costs += ("train_seconds", "tokens_per_second", "artifact_bytes")
    return {"name": name, "cut_fraction": 0.0, **dict.fromkeys(costs), **facts}


def score(name: str, mean: float, *, task: str = "all", metric: str = "exact_match") -> dict[str, Any]:
    ends = {"low": mean - 0.1, "high": mean + 0.1}
    return {"model": name, "task": task, "metric": metric, "mean": mean, "num_records": 40, **ends}


def pair(
    name: str, against: str, difference: float, *, p: float, holm: float | None, metric: str = "exact_match"
) -> dict[str, Any]:
    return {
        "model": name,
        "against": against,
        "task": "all",
        "metric": metric,
        "difference": difference,
        "low": difference - 0.1,
        "high": difference + 0.1,
        "better": 7,
        "worse": 2,
        "p_value": p,
        "holm_p_value": holm,
        "mcnemar_p_value": 0.18 if metric == "exact_match" else None,
    }


def value(**changes: Any) -> dict[str, Any]:
    return {
        "test": {"run": "x", "num_records": 40, "num_clusters": 38, "max_new_tokens": 16},
        "main_metric": "exact_match",
        "untrained_tasks": [],
        "metrics": [{"name": "loss", "higher_is_better": False}, {"name": "exact_match", "higher_is_better": True}],
        "models": [model("x/base"), model("x/lora", trained_parameters=1200, peak_memory_bytes=2e9, train_seconds=75)],
        "scores": [
            score("x/base", 0.2),
            score("x/lora", 0.5),
            score("x/base", 2.0, metric="loss"),
            score("x/lora", 1.0, metric="loss"),
        ],
        "pairs": [
            pair("x/lora", "x/base", 0.3, p=0.0002, holm=0.0004),
            pair("x/lora", "x/base", -1.0, p=0.03, holm=None, metric="loss"),
        ],
        "replicates": [],
        "notes": [],
        **changes,
    }


def test_a_difference_is_clear_below_five_percent_after_holm_and_no_sooner() -> None:
    assert sentences(value()) == ["Clear in Exact match (Holm p below 0.05): x/lora better than x/base."]
    unclear = value(pairs=[pair("x/lora", "x/base", 0.3, p=0.02, holm=0.05)], notes=["a note."])
    assert sentences(unclear) == [
        "Clear in Exact match (Holm p below 0.05): nothing.",
        "No clear difference in Exact match: x/lora and x/base.",
        "a note.",
    ]


def test_the_better_model_comes_first_in_whatever_direction_is_good() -> None:
    worse = value(pairs=[pair("x/lora", "x/base", -0.3, p=0.001, holm=0.001)])
    assert sentences(worse)[0].endswith("x/base better than x/lora.")
    loss = value(main_metric="loss", pairs=[pair("x/lora", "x/base", -0.3, p=0.001, holm=0.001, metric="loss")])
    assert sentences(loss)[0].endswith("x/lora better than x/base.")
    three = [pair(*names, 0.3, p=0.001, holm=0.001) for names in (("b", "a"), ("c", "a"), ("c", "b"))]
    three.append(pair("d", "c", 0.01, p=0.5, holm=0.5))
    assert sentences(value(pairs=three)) == [
        "Clear in Exact match (Holm p below 0.05): b better than a; c better than a and b.",
        "No clear difference in Exact match: d and c.",
    ]


def test_the_main_metric_comes_first_and_its_p_is_holms() -> None:
    scores, pairs, costs = tables(value())
    assert scores.rows == (
        ("Exact match", "x/base", "0.200 [0.100, 0.300]"),
        ("Exact match", "x/lora", "0.500 [0.400, 0.600]"),
        ("Loss", "x/base", "2.000 [1.900, 2.100]"),
        ("Loss", "x/lora", "1.000 [0.900, 1.100]"),
    )
    assert pairs.header == ("model", "against", "difference", "Holm p", "better:worse")
    assert pairs.rows == (("x/lora", "x/base", "+0.300 [+0.200, +0.400]", "< 0.001", "7 : 2"),)
    cells = [cell.replace("\u00a0", " ") for cell in costs.rows[1]]
    assert cells == ["x/lora", "1.20 k", "2.00 GB", "1 min 15 s", "–", "–", "0 %"]


def test_markdown_holds_mcnemars_p_and_the_other_metrics_with_no_correction() -> None:
    text = markdown(value())
    assert "| model | against | difference | Holm p | McNemar p | better:worse |" in text
    assert "| x/lora | x/base | +0.300 [+0.200, +0.400] | < 0.001 | 0.180 | 7 : 2 |" in text
    assert "| model | against | difference | p | better:worse |" in text
    assert "| x/lora | x/base | −1.000 [−1.100, −0.900] | 0.030 | 7 : 2 |" in text
    assert "Holm's is corrected for all pairs in Exact match, any other for nothing." in text
    assert "40 records, 38 distinct inputs" in text


def test_estimated_memory_is_shown_by_its_kind_where_a_run_wrote_it_down() -> None:
    models = [model("x/base"), model("x/lora", estimated_memory_bytes={"weights": 4e6, "optimizer_states": 8e6})]
    table = tables(value(models=models))[-1]
    assert table.header == ("model", "Weights", "Optimizer states")
    assert table.rows == (("x/lora", "4.00\u00a0MB", "8.00\u00a0MB"),)


def test_tasks_that_were_not_trained_on_stand_apart() -> None:
    scores = [
        score(name, mean, task=task)
        for name in ("x/base", "x/lora")
        for task, mean in (("new", 0.1), ("old", 0.9), ("all", 0.1), ("others", 0.9))
    ]
    lost = {**pair("x/lora", "x/base", -0.4, p=0.001, holm=None), "task": "others"}
    found = value(scores=scores, untrained_tasks=["old"], pairs=[*value()["pairs"], lost])
    assert tables(found)[0].header == ("metric", "model", "trained tasks (40)", "other tasks (40)")
    assert tables(found)[0].rows[0] == ("Exact match", "x/base", "0.100 [0.000, 0.200]", "0.900 [0.800, 1.000]")
    assert tables(found)[2].title == "Model − against in Exact match, tasks not trained on"
    assert tables(found)[2].rows == (("x/lora", "x/base", "−0.400 [−0.500, −0.300]", "0.001", "7 : 2"),)
    assert "| old (not trained on) | 40 | 0.900 [0.800, 1.000] | 0.900 [0.800, 1.000] |" in markdown(found)


def test_a_score_that_is_left_out_is_a_dash_and_perplexity_shows_its_ends() -> None:
    scores = [score("x/base", 12.0, metric="perplexity"), score("x/lora", 0.5)]
    metrics = [{"name": name, "higher_is_better": True} for name in ("exact_match", "perplexity")]
    rows = tables(value(scores=scores, metrics=metrics))[0].rows
    assert rows[0] == ("Exact match", "x/base", "–")
    assert rows[2] == ("Perplexity", "x/base", "12.00 [11.90, 12.10]")


def test_one_input_has_no_interval_and_no_p() -> None:
    alone = {**pair("x/lora", "x/base", 0.3, p=0.5, holm=None), "low": None, "high": None, "p_value": None}
    only = {**score("x/base", 0.2), "low": None, "high": None}
    found = value(pairs=[alone], scores=[only])
    assert tables(found)[1].rows == (("x/lora", "x/base", "+0.300", "–", "7 : 2"),)
    assert tables(found)[0].rows[0] == ("Exact match", "x/base", "0.200")
    assert sentences(found)[1] == "No clear difference in Exact match: x/lora and x/base."


def test_a_bar_or_a_line_break_in_a_name_breaks_no_table() -> None:
    text = markdown(value(models=[model("a|b\nc"), model("x/lora")]))
    assert "| a\\|b c | – |" in text


def seeded() -> dict[str, Any]:
    """Return a comparison of one method trained with two seeds, beside its base."""
    rows = [
        {"task": "all", "metric": metric, "mean": mean, "standard_deviation": 0.02, "lowest": low, "highest": high}
        for metric, mean, low, high in (("exact_match", 0.5, 0.48, 0.52), ("loss", 1.0, 0.98, 1.02))
    ]
    group = {"name": "lora over 2 seeds", "models": ["x/lora", "y/lora"], "seeds": [0, 1], "scores": rows}
    pairs = [pair(name, "x/base", 0.3, p=0.0002, holm=0.0004) for name in ("x/lora", "y/lora")]
    return value(replicates=[group], pairs=pairs)


def test_models_that_differ_only_by_seed_are_shown_by_mean_and_spread() -> None:
    (table,) = [table for table in tables(seeded()) if table.title.startswith("Over seeds")]
    assert table.header == ("metric", "method", "score")
    assert table.rows == (
        ("Exact match", "lora over 2 seeds", "0.500 ± 0.020 (0.480 to 0.520)"),
        ("Loss", "lora over 2 seeds", "1.000 ± 0.020 (0.980 to 1.020)"),
    )
    assert sentences(seeded())[1] == (
        "x/lora and y/lora differ only by seed (0, 1): they are one method trained 2 times, so they are not compared "
        "with each other, and with others only at the same seed."
    )
    assert "**Over seeds: mean ± standard deviation" in markdown(seeded())
    assert not [table for table in tables(value()) if table.title.startswith("Over seeds")]
