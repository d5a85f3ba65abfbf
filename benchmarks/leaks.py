"""What the search for leaks finds: planted copies of held-out records, and clean records that it must not touch.

    python benchmarks/leaks.py --data FOLDER [--before FILE]

`--data` holds `alpaca_en_demo.json` and `p3_sample/*.jsonl.gz`. For each kind up to 60 records are a task's own test
file, and train has a changed copy of each beside 300 records of which none is planted; found are the copies that
`leaks: drop` removes. Below stand whole data sets of P3, each one task of all its templates, at the default fractions.
The tables go to `benchmarks/results/leaks.md`, the counts to `leaks.json` beside it; `--before` names the `leaks.json`
of another version, whose counts stand before an arrow.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training import machine, versions

from keeptune.data.prepare import Prepared, TaskSource, prepare_records
from keeptune.progress import Silent

RESULTS = Path(__file__).parent / "results" / "leaks.json"
PLANTED, CLEAN = 60, 300
# One template each, so that clean records share their instruction.
TEMPLATES = ("ag_news_classify", "app_reviews_convert_to_star_rating", "glue_qqp_same_thing", "sciq_Direct_Question")
DATA_SETS = ("ag_news", "duorc", "common_gen", "gigaword", "app_reviews")
Row = dict[str, str]


def prepared(train: Sequence[Row] | str, test: Sequence[Row] | None, *, folder: Path) -> Prepared:
    """Prepare rows, or the files of a pattern, as one task."""
    paths = []
    for name, rows in (("train", train), ("test", test)):
        path = folder / f"{name}.jsonl"
        if rows is not None and not isinstance(rows, str):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(rows if isinstance(rows, str) else str(path) if rows is not None else None)
    return prepare_records(
        [TaskSource("task", paths[0], test=paths[1])],
        seed=0,
        validation_fraction=0.1 if test is None else 0.0,
        test_fraction=0.1,
        drop_incomplete=True,
        duplicates="drop",
        leaks="drop",
        progress=Silent(),
        scratch=folder,
    )


def lost(train: Sequence[Row], test: Sequence[Row]) -> set[int]:
    """Return which of the train rows are removed as leaks."""
    with tempfile.TemporaryDirectory() as folder:
        result = prepared(train, test, folder=Path(folder))
        return set(range(len(train))) - {int(r.origin.rpartition(":")[2]) - 1 for r in result.records["train"]}


def template_rows(data: Path, name: str) -> list[Row]:
    """Return the rows of one template of P3."""
    with gzip.open(data / "p3_sample" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def changed(text: str, r: random.Random, *, share: float, vocabulary: Sequence[str]) -> str:
    """Return the text with a share of its words, and at least one, replaced."""
    words = re.split(r"(\s+)", text)
    places = [i for i in range(0, len(words), 2) if words[i]]
    for i in r.sample(places, max(1, round(share * len(places)))):
        words[i] = r.choice(vocabulary)
    return "".join(words)


def shuffled(text: str, r: random.Random) -> str:
    """Return the text with its sentences in another order."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    r.shuffle(sentences)
    return " ".join(sentences)


def length(row: Row) -> int:
    """Return the number of a prompt's words."""
    return len(row["prompt"].split())


def kinds(data: Path, alpaca: Sequence[Row], r: random.Random) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Yield the name of each kind, the held-out rows and the train row planted for each."""
    vocabulary = sorted({word for row in alpaca for word in row["prompt"].split() if word.isalpha()})

    def planted(make: Callable[[Row], Row | str], *, where: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
        rows = r.sample(fitting := [row for row in alpaca if where(row)], min(PLANTED, len(fitting)))
        made = ((row, make(row)) for row in rows)
        pairs = [(row, {"prompt": new, "completion": "Done."} if isinstance(new, str) else new) for row, new in made]
        return [row for row, _ in pairs], [new for _, new in pairs]

    def long(row: Row) -> bool:
        return length(row) >= 20

    def medium(row: Row) -> bool:
        return 8 <= length(row) < 20

    def short(row: Row) -> bool:
        return 3 <= length(row) < 8

    def other(text: str) -> Row:
        return next(row for row in iter(lambda: r.choice(alpaca), None) if row["prompt"] != text)

    def wrapped(row: Row) -> str:
        return f"Hello! Could you please help me with this? {row['prompt']} Thank you very much in advance."

    def few_shot(row: Row) -> str:
        shots = "".join(f"Q: {x['prompt']}\nA: {x['completion']}\n\n" for x in (other(row["prompt"]) for _ in range(3)))
        return f"{shots}Q: {row['prompt']}\nA:"

    yield "white space and case", *planted(lambda x: f" {x['prompt'].upper()}\n".replace(" ", "  "), where=long)
    yield "punctuation", *planted(lambda x: re.sub(r"[^\w\s]", "", x["prompt"]), where=lambda x: length(x) >= 8)
    for name, share, where in (
        ("5 % of words changed, 20 words or more", 0.05, long),
        ("5 % of words changed, 8 to 19 words", 0.05, medium),
        ("5 % of words changed, under 8 words", 0.05, short),
        ("20 % of words changed, 20 words or more", 0.2, long),
    ):
        yield name, *planted(lambda x, s=share: changed(x["prompt"], r, share=s, vocabulary=vocabulary), where=where)
    yield (
        "sentences shuffled",
        *planted(lambda x: shuffled(x["prompt"], r), where=lambda x: len(re.findall(r"[.!?]\s", x["prompt"])) > 1),
    )
    numbers = re.compile(r"\d+")
    yield (
        "number formats",
        *planted(
            lambda x: numbers.sub(lambda m: f"{int(m[0]):,}.0", x["prompt"]),
            where=lambda x: bool(numbers.search(x["prompt"])) and length(x) >= 8,
        ),
    )
    yield "polite wrapping, 8 words or more", *planted(wrapped, where=lambda x: length(x) >= 8)
    yield "polite wrapping, under 8 words", *planted(wrapped, where=short)
    yield (
        "same input, another instruction",
        *planted(
            lambda x: f"{other(x['prompt'])['instruction']}\n{x['input']}", where=lambda x: len(x["input"].split()) >= 8
        ),
    )
    yield "inside a few-shot prompt", *planted(few_shot, where=lambda x: length(x) >= 8)
    answered = [row for row in alpaca if len(row["completion"].split()) >= 20]
    yield (
        "test answer inside a train prompt",
        *planted(lambda x: f"Say this in fewer words: {x['completion']}", where=answered.__contains__),
    )
    yield (
        "train output contains the test prompt",
        *planted(
            lambda x: {
                "prompt": "Write an exercise for a class.",
                "completion": f"Here is one. {x['prompt']} Good luck!",
            },
            where=long,
        ),
    )
    yield from templates(data)


def templates(data: Path) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Yield the kinds that P3 has of itself: rows of one number are of one input under two templates."""
    for name, first, second in (
        ("another template (ag_news)", "ag_news_classify", "ag_news_which_section_choices"),
        ("another template (glue_qqp)", "glue_qqp_same_thing", "glue_qqp_meaning"),
        (
            "another template (commonsense_qa)",
            "commonsense_qa_most_suitable_answer",
            "commonsense_qa_answer_to_question",
        ),
    ):
        one, two = template_rows(data, first), template_rows(data, second)
        yield name, one[:PLANTED], two[:PLANTED]
    rows = template_rows(data, "adversarial_qa_droberta_question_context_answer")
    found: list[tuple[Row, Row]] = []
    for one, two in itertools.pairwise(rows):
        passages = [re.split(r"\n", row["prompt"]) for row in (one, two)]
        if set(passages[0]) & {line for line in passages[1] if len(line.split()) > 40}:
            found.append((one, two))
    yield "same passage, another question", [one for one, _ in found[:PLANTED]], [two for _, two in found[:PLANTED]]


def plant(data: Path, alpaca: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield how many of each kind's planted rows are found, and how many clean rows are lost with them."""
    for name, held_out, new in kinds(data, alpaca, random.Random(0)):
        prompts = {row["prompt"] for row in held_out}
        clean = [row for row in alpaca if row["prompt"] not in prompts][:CLEAN]
        removed = lost([*new, *clean], held_out)
        num_found = sum(i < len(new) for i in removed)
        yield {"kind": name, "planted": len(new), "found": num_found, "clean lost": len(removed) - num_found}


def clean_templates(data: Path) -> Iterator[dict[str, Any]]:
    """Yield how many rows of one template are lost though their inputs differ: three quarters are train."""
    for name in TEMPLATES:
        rows = template_rows(data, name)
        unlike = list({row["prompt"]: row for row in rows}.values())
        cut = len(unlike) // 4
        removed = lost(unlike[cut:], unlike[:cut])
        yield {"template": name, "train": len(unlike) - cut, "lost": len(removed)}


def data_sets(data: Path) -> Iterator[dict[str, Any]]:
    """Yield what is left of train where all templates of a data set are one task."""
    for name in DATA_SETS:
        with tempfile.TemporaryDirectory() as folder:
            audit = prepared(f"{data}/p3_sample/{name}_*.jsonl.gz", None, folder=Path(folder)).audit
        removed = audit.dropped.get("leak", 0)
        splits = audit.splits
        yield {
            "data set": name,
            "train": splits.train,
            "removed": removed,
            "validation": splits.validation,
            "test": splits.test,
            "largest group": audit.groups.largest_group,
        }


def table(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table, with what differs from another version's."""
    old = {next(iter(row.values())): row for row in before}

    def shown(row: Mapping[str, Any], column: str) -> str:
        was = old.get(next(iter(row.values())), row)[column]
        return str(row[column]) if was == row[column] else f"{was} → {row[column]}"

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([shown(row, column) for column in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Plant, count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="the leaks.json of another version")
    arguments = parser.parse_args()
    data = arguments.data
    before = json.loads(arguments.before.read_text(encoding="utf-8")) if arguments.before else {}
    rows = json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    alpaca = [
        {**row, "prompt": f"{row['instruction']}\n{row['input']}".strip(), "completion": row["output"]} for row in rows
    ]
    tables = {"planted": list(plant(data, alpaca)), "templates": list(clean_templates(data))}
    tables["data_sets"] = list(data_sets(data))
    RESULTS.write_text(
        json.dumps({"machine": machine(), "versions": versions(), **tables}, indent=1) + "\n", encoding="utf-8"
    )
    page = "# Leaks\n\n" + "\n".join(table(rows, before.get(name, [])) for name, rows in tables.items())
    RESULTS.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
