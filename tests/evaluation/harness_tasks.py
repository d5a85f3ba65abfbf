"""Tasks of lm-evaluation-harness in a folder, with data that lie there too."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

COLOURS = ["red", "blue", "green", "black", "white"]


def colours(number: int, *, seed: int = 0) -> list[dict[str, object]]:
    """Return questions with four colours to choose from."""
    generator = random.Random(seed)
    return [
        {
            "question": f"Which colour has item {generator.randrange(10**9)} of box {i}?",
            "choices": generator.sample(COLOURS, 4),
            "label": generator.randrange(4),
        }
        for i in range(number)
    ]


def task(folder: Path, name: str, *, rows: Sequence[object] = (), metric: str = "acc", **settings: object) -> Path:
    """Write a task file with its data; `settings` replace its settings."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or colours(12)), encoding="utf-8")
    value = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        **settings,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(value), encoding="utf-8")
    return folder


def writing(folder: Path, name: str, *, rows: Sequence[object] = (), **settings: object) -> Path:
    """Write a task whose answers are written, behind two solved examples."""
    own = {
        "output_type": "generate_until",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "doc_to_choice": None,
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    }
    return task(folder, name, rows=rows, metric="exact_match", **{**own, **settings})
