"""The lab's four tables: what the base knows, what tuning on ten tasks gives, what one task more costs, and a curve.

    python benchmarks/lab.py [--out FOLDER] [--only knows few-shot multitask publish forgetting curve]

Every tuning is `keeptune run RECIPE.yaml` in a process of its own. The results go to `benchmarks/results/lab.json`;
docs/lab.md shows them. About an hour on two cores, half of it the tuning on ten tasks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml

from keeptune.data.formats import to_record
from keeptune.data.record import Message, Record
from keeptune.data.source import Row
from keeptune.evaluation.evaluate import Bench, Split, evaluate_model
from keeptune.evaluation.generate import Decoding, generate
from keeptune.lab.folder import MODELS, write_lab
from keeptune.lab.tasks import TASKS, LabTask, examples
from keeptune.lab.world import Fact, make_world
from keeptune.model.divergence import pair_divergences
from keeptune.model.load import load_model
from keeptune.model.loss import target_losses
from keeptune.progress import Silent
from keeptune.text.batches import pack
from keeptune.text.table import Table
from keeptune.text.template import make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example

RESULTS = Path(__file__).parent / "results" / "lab.json"
WORLD = make_world()
NUM_FALSE = 9
NUM_PROMPTED = 200
NUM_WORDINGS = 4
NUM_SHOTS = 3
SIZES = (100, 250, 500, 1_000, 4_000)
# Other tasks' records in the mixture: a tenth of the thousand of the new wording, over ten tasks.
MIXED_RECORDS = 10
FULL, LORA = {"learning_rate": 1e-3}, {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "learning_rate": 5e-3}


def with_error(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and half of its 95 % interval."""
    return {"mean": float(np.mean(values)), "half_width": float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values)))}


def knows(lab: Path) -> dict[str, Any]:
    """Return how often the base gives a true fact more likelihood than false ones, by kind of fact."""
    folder = lab / "models" / "lab-base"
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    rng = Random(0)
    answered = asked(model, tokenizer)
    ranks: dict[str, list[tuple[float, float, float]]] = {}
    for fact, right in zip(WORLD.facts, answered, strict=True):
        others = rng.sample(fact.others, min(NUM_FALSE, len(fact.others)))
        nats = answer_nats(model, tokenizer, fact=fact, answers=[fact.answer, *others])
        better = [float(nats[0] < other) for other in nats[1:]]
        ranks.setdefault(fact.relation, []).append((float(np.mean(better)), float(all(better)), right))
    everything = [values for of_kind in ranks.values() for values in of_kind]
    return {
        relation: {
            "num_facts": len(values),
            "true_over_false": with_error([value[0] for value in values]),
            "true_is_likeliest": with_error([value[1] for value in values]),
            "answered": with_error([value[2] for value in values]),
        }
        for relation, values in {**ranks, "all": everything}.items()
    }


def asked(model: Any, tokenizer: Tokenizer) -> list[float]:
    """Return for each fact whether the base names the answer where one person of the running text asks another."""
    questions = tokenizer.encode([f"Ada: {fact.question}\nMilo:" for fact in WORLD.facts], first=False)
    answers = generate(
        model,
        [[tokenizer.eos_id, *question] for question in questions],
        decoding=decoding(tokenizer),
        progress=Silent(),
        stop_requested=lambda: False,
    )
    texts = [tokenizer.decode(answer.ids).lower() for answer in answers]
    return [float(fact.answer.lower() in text) for fact, text in zip(WORLD.facts, texts, strict=True)]


def decoding(tokenizer: Tokenizer) -> Decoding:
    """Return how the base answers: greedily, up to the end of the line."""
    (newline,) = tokenizer.encode(["\n"], first=False)[0]
    return Decoding(
        max_new_tokens=48,
        stop_ids=(tokenizer.eos_id, newline),
        pad_id=tokenizer.pad_id,
        tokens_per_batch=16_384,
        encoder_decoder=False,
        max_positions=512,
    )


def answer_nats(model: Any, tokenizer: Tokenizer, *, fact: Fact, answers: Sequence[str]) -> list[float]:
    """Return the summed cross-entropy of each answer, and the full stop after it, behind the fact's statement."""
    opening = fact.statement.removesuffix(fact.answer).rstrip()
    assert opening != fact.statement.rstrip()
    texts = [tokenizer.encode([part], first=False)[0] for part in (opening, *(f" {answer}." for answer in answers))]
    rows = [np.array([tokenizer.eos_id, *texts[0], *answer], dtype=np.int32) for answer in texts[1:]]
    loss_masks = [np.arange(len(row)) > len(texts[0]) for row in rows]
    batch = pack([Example(row, loss_mask) for row, loss_mask in zip(rows, loss_masks, strict=True)])
    losses = target_losses(model, batch).numpy()
    return [float(part.sum()) for part in np.split(losses, np.cumsum([len(answer) for answer in texts[1:]])[:-1])]


def prompted(lab: Path, *, shots: int) -> dict[str, Any]:
    """Return the base's scores on each task behind `shots` solved examples; a line is an answer."""
    folder = lab / "models" / "lab-base"
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    records = [record for task in TASKS for record in few_shot_records(task, shots=shots)]
    bench = Bench(
        template=make_template("plain", tokenizer=tokenizer, encoder_decoder=False),
        decoding=decoding(tokenizer),
        collate=pack,
        target_losses=target_losses,
        pair_divergences=pair_divergences,
        autocast=None,
        progress=Silent(),
        stop_requested=lambda: False,
    )
    table = prompt_table(records, tokenizer=tokenizer)
    with TemporaryDirectory() as out:
        scores = evaluate_model(
            model,
            split=Split("test", records, table),
            bench=bench,
            metrics=["exact_match", "rougeL"],
            name="lab-base",
            shots=shots,
            folder=Path(out) / "scores",
            facts={},
        )
    return {
        task: {
            score.metric: [score.mean, 1.96 * (score.standard_error or 0.0)] for score in scores if score.task == task
        }
        for task in dict.fromkeys(score.task for score in scores)
    }


def prompt_table(records: Sequence[Record], *, tokenizer: Tokenizer) -> Table:
    """Return records as tokens, prompt and answer on lines of their own."""
    prompts = tokenizer.encode([f"{record.prompt}\n" for record in records], first=True)
    answers = tokenizer.encode([f"{record.completion}\n" for record in records], first=False)
    examples = [
        Example(
            np.array([*prompt, *answer], dtype=np.int32),
            loss_mask=np.arange(len(prompt) + len(answer)) >= len(prompt),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Table.of(examples, record_ids=[record.id for record in records])


def few_shot_records(task: LabTask, *, shots: int) -> list[Record]:
    """Return test records of a task, each behind `shots` train examples in the same wording."""
    records = []
    for seed, wording in enumerate(task.wordings[:NUM_WORDINGS]):
        worded = replace(task, wordings=(wording,) * len(task.wordings))
        solved = examples(worded, WORLD, split="train", seed=seed)
        for row in islice(examples(worded, WORLD, split="test", seed=seed), NUM_PROMPTED // NUM_WORDINGS):
            shown = ["\n".join(solved_pair(example, task=task)) for example in islice(solved, shots)]
            prompt, answer = solved_pair(row, task=task)
            messages = (Message("user", "\n\n".join([*shown, prompt])), Message("assistant", answer))
            id_ = f"{task.name}-{len(records)}"
            records.append(Record(id_, task=task.name, origin=id_, messages=messages))
    return records


def solved_pair(row: dict[str, object], *, task: LabTask) -> tuple[str, str]:
    """Return a row's prompt and answer as the ordinary reader reads them."""
    record = to_record(Row(row, task.name, None), task=task.name, columns=None, instruction=None)
    return record.prompt, record.completion


def run(name: str, recipe: dict[str, Any], *, out: Path) -> dict[str, Any]:
    """Run one recipe and return its scores, differences and costs."""
    path = out / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation = {**recipe["evaluation"], "baselines": ["zero-shot"]}
    made = {**recipe, "evaluation": evaluation, "output_dir": str(out / "runs" / name)}
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "keeptune.cli", "run", str(path)], check=True)
    report = json.loads((out / "runs" / name / "report.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("scores", "paired", "cost", "selection")}


def forgetting(lab: Path, out: Path) -> dict[str, Any]:
    """Return what a thousand examples of the new wording do to it and to every other task, by method.

    All of the old tasks' test records are asked, alone and mixed.
    """
    recipe = demo(lab)
    for task in recipe["data"]["tasks"][1:]:
        del task["max_records"]
    recipe["methods"] = {
        "full": FULL,
        "full-lower": {"learning_rate": 1e-4},
        "lora": LORA,
        "lora-lower": {**LORA, "learning_rate": 5e-4},
    }
    found = {"alone": run("forgetting-alone", recipe, out=out)}
    for task in recipe["data"]["tasks"][1:]:
        if Path(task["path"]).name not in {held.name for held in TASKS if held.held_out}:
            del task["train"]
            task["max_records"] = MIXED_RECORDS
    recipe["methods"] = {"full": FULL, "lora": LORA}
    return {**found, "mixed": run("forgetting-mixed", recipe, out=out)}


def curve(lab: Path, out: Path) -> dict[str, Any]:
    """Return the scores of the new wording after tuning on more and more examples."""
    found = {}
    for size in SIZES:
        recipe = demo(lab)
        recipe["data"]["tasks"] = [{**recipe["data"]["tasks"][0], "max_records": size}]
        recipe["methods"] = {"full": FULL, "lora": LORA}
        found[str(size)] = run(f"curve-{size}", recipe, out=out)
    return found


def demo(lab: Path) -> dict[str, Any]:
    """Return the demo's recipe without its budget: here every other test record is answered, and none certified on."""
    recipe = yaml.safe_load((lab / "lab-demo.yaml").read_text(encoding="utf-8"))
    return {**recipe, "retention": {"self_texts": recipe["retention"]["self_texts"]}}


def multitask(lab: Path, out: Path) -> dict[str, Any]:
    """Return the scores of the tuning on ten tasks."""
    recipe = yaml.safe_load((lab / "lab-multitask.yaml").read_text(encoding="utf-8"))
    return run("multitask", recipe, out=out)


def publish(lab: Path) -> None:
    """Write the model tuned on ten tasks into the package, in bf16, with its card."""
    source, target = lab / "runs" / "multitask" / "instruct-model", MODELS / "lab-instruct"
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("manifest.json", "card.json"):
            shutil.copy(path, target)
    card = (target / "README.md").read_text(encoding="utf-8")
    (target / "README.md").write_text(card.replace(f"{lab}/", "lab/"), encoding="utf-8")
    load_model(source, device=torch.device("cpu"), dtype=torch.bfloat16).save_pretrained(target)
    # safetensors writes files that only their owner may read.
    (target / "model.safetensors").chmod((target / "config.json").stat().st_mode & 0o777)
    shutil.copy(source / "generation_config.json", target)


def main() -> None:
    """Measure what was asked for and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lab"), help="where the lab and the runs go")
    parts = ["knows", "few-shot", "multitask", "publish", "forgetting", "curve"]
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    arguments = parser.parse_args()
    lab = arguments.out
    measured: dict[str, Callable[[], dict[str, Any] | None]] = {
        "knows": lambda: knows(lab),
        "few-shot": lambda: {str(shots): prompted(lab, shots=shots) for shots in (0, NUM_SHOTS)},
        "multitask": lambda: multitask(lab, lab),
        "publish": lambda: publish(lab),
        "forgetting": lambda: forgetting(lab, lab),
        "curve": lambda: curve(lab, lab),
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in arguments.only:
        write_lab(lab, progress=Silent())
        found = measured[name]()
        if found is None:
            continue
        results[name] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {RESULTS}")


if __name__ == "__main__":
    main()
