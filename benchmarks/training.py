"""Training with keeptune against TRL's SFTTrainer: throughput per CPU-second and peak memory, in alternating pairs.

Both sides train one epoch over the same records with the same 19M-parameter Llama, tokenizer and prompt wording, each
run in a process of its own. TRL runs with its documented defaults, completion-only loss and a batch of 8 records;
keeptune's step has as many tokens as 8 records have on average, so that both make about the same number of updates.
TRL's default computes in bf16; keeptune runs in bf16 (`training.bf16: true`) and in fp32, its default on a CPU.
Target-bearing tokens are those of the records that carry loss: all tokens of all records trained on, padding excluded.

    python benchmarks/training.py --data alpaca=FILE.json --data p3=FILE.jsonl.gz,FILE.jsonl.gz --pairs 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "training.json"
METHODS = ("full", "lora")
PRECISIONS = ("bf16", "fp32")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
MODEL: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def read_records(paths: list[str], *, limit: int, seed: int = 0) -> list[Any]:
    """Return `limit` records, drawn evenly at random from all files."""
    from keeptune.data.formats import to_record
    from keeptune.data.source import read_rows

    records = [
        to_record(row, task="benchmark", columns=None, instruction=None)
        for path in paths
        for row in read_rows(path, revision=None, validation=None, test=None)
    ]
    random.Random(seed).shuffle(records)
    return records[:limit]


def build_base(folder: Path, records: list[Any], *, seed: int = 0) -> None:
    """Write the model with random weights and a byte-level BPE tokenizer of 16,384 entries made from the records."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((f"{r.prompt}\n{r.completion}" for r in records), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def peak_bytes() -> int:
    """Return the largest resident size of this process since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("found no VmHWM in /proc/self/status; this benchmark runs on Linux")


def reset_peak() -> None:
    """Start the count of `peak_bytes` anew."""
    Path("/proc/self/clear_refs").write_text("5")


def train_with_trl(base: Path, records_path: Path, *, method: str, as_shipped: bool) -> dict[str, float]:
    """Train one epoch with SFTTrainer and return tokens, targets, CPU-seconds, seconds and peak bytes."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in records_path.read_text(encoding="utf-8").splitlines()]
    checkpointing: dict[str, Any] = {} if as_shipped else {"gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base),
            args=SFTConfig(
                output_dir=out,
                per_device_train_batch_size=8,
                num_train_epochs=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                **checkpointing,
            ),
            train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(**LORA) if method == "lora" else None,
        )
        data: Any = trainer.train_dataset
        num_tokens = sum(len(ids) for ids in data["input_ids"])
        num_targets = sum(sum(label != -100 for label in labels) for labels in data["labels"])
        reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        steps = trainer.train().global_step
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "num_tokens": num_tokens,
        "num_targets": num_targets,
        "num_steps": steps,
        "cpu_seconds": cpu,
        "seconds": wall,
        "peak_bytes": peak_bytes(),
    }


def train_with_keeptune(base: Path, records_path: Path, *, method: str, bf16: bool, seed: int = 0) -> dict[str, float]:
    """Train one epoch with keeptune's loop and return tokens, targets, CPU-seconds, seconds and peak bytes."""
    import torch

    from keeptune.data.record import record_from_json
    from keeptune.model.load import load_model
    from keeptune.model.loss import batch_loss
    from keeptune.model.methods import Method, apply_method
    from keeptune.progress import Silent
    from keeptune.text.batches import pack
    from keeptune.text.table import TokenTable
    from keeptune.text.template import make_template
    from keeptune.text.tokenizer import Tokenizer
    from keeptune.text.tokens import tokenize
    from keeptune.training.loop import TrainingSettings, train
    from keeptune.training.world import SINGLE

    tokenizer = Tokenizer.load(base)
    lines = records_path.read_text(encoding="utf-8").splitlines()
    records = [record_from_json(json.loads(line)["record"], where="benchmark") for line in lines]
    tokenized = tokenize(
        records,
        tokenizer=tokenizer,
        template=make_template("alpaca", tokenizer=tokenizer, encoder_decoder=False),
        train_on="all",
        max_length=1024,
        over_length="cut",
        encoder_decoder=False,
    )
    with tempfile.TemporaryDirectory() as out:
        table = TokenTable.write(Path(out) / "train.arrow", tokenized)
        nothing = TokenTable.write(Path(out) / "validation.arrow", [])
        device = torch.device("cpu")
        model = load_model(base, device=device, dtype=torch.float32)
        arguments = LORA if method == "lora" else {}
        peft_type = "LORA" if method == "lora" else None
        model = apply_method(model, Method(method, peft_type, 2e-5, arguments), seed=seed)
        settings = TrainingSettings(
            learning_rate=2e-5,
            num_train_epochs=1,
            tokens_per_step=round(8 * float(table.lengths.mean())),
            tokens_per_micro_batch=1024,
            lr_scheduler_type="linear",
            warmup_ratio=0.0,
            cooldown_fraction=0.2,
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            gradient_checkpointing=False,
            evals_per_epoch=1,
            eval_steps=None,
            save_steps=None,
            patience=None,
            seed=seed,
            layout="packed",
            select_by="loss",
        )
        reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        result = train(
            model=model,
            train_table=table,
            validation_table=nothing,
            loss=batch_loss,
            collate=pack,
            settings=settings,
            folder=Path(out),
            validate=None,
            higher_is_better=False,
            world=SINGLE,
            device=device,
            autocast=torch.bfloat16 if bf16 else None,
            progress=Silent(),
            stop_requested=lambda: False,
            run_key="benchmark",
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "num_tokens": int(table.lengths.sum()),
        "num_targets": int(table.num_targets.sum()),
        "num_steps": result.num_steps,
        "cpu_seconds": cpu,
        "seconds": wall,
        "peak_bytes": peak_bytes(),
    }


def gemm_rate(precision: str, *, seconds: float = 0.3) -> float:
    """Return this machine's best rate in FLOP/s over the matrix products of the model's layers."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    shapes = [(1024, 384, 1024), (1024, 1024, 384), (1024, 384, 384), (512, 384, 16384)]
    best = 0.0
    for rows, inner, columns in shapes:
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        torch.mm(left, right, out=out)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            torch.mm(left, right, out=out)
            count += 1
        best = max(best, 2.0 * rows * inner * columns * count / (time.perf_counter() - start))
    return best


def needed_flops(measured: dict[str, float], *, method: str, lengths: list[int]) -> float:
    """Return the floating-point operations that one epoch cannot do without.

    Each weight of a layer costs 2 a token forward, 2 for the gradient of its input and, where it trains, 2 for its own;
    the output layer costs that at target positions only. Causal attention costs 2 * 2 * D * L / 2 a token forward
    and twice that backward, in each layer. LoRA's own products (about 5 % of the weights) are counted as trained.
    """
    width, feed, layers = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_hidden_layers"]
    key_width = width * MODEL["num_key_value_heads"] // MODEL["num_attention_heads"]
    shapes = [(width, width)] * 2 + [(width, key_width)] * 2 + [(width, feed)] * 3
    per_token = {"full": 6, "lora": 4}[method] * sum(a * b for a, b in shapes)
    if method == "lora":
        per_token += 6 * LORA["r"] * sum(a + b for a, b in shapes)
    attention = sum(6 * width * length * length for length in lengths)
    head = {"full": 6, "lora": 4}[method] * width * MODEL["vocab_size"] * measured["num_targets"]
    return layers * (per_token * measured["num_tokens"] + attention) + head


def run_child(side: str, base: Path, records: Path, *, method: str) -> dict[str, float]:
    """Run one side in a process of its own and return what it measured."""
    command = [sys.executable, __file__, "--child", side, "--method", method, str(base), str(records)]
    # What keeptune's command line sets for itself.
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"} if side.startswith("keeptune") else None
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def child(side: str, base: Path, records: Path, *, method: str) -> dict[str, Any]:
    """Measure one side in this process."""
    if side.startswith("keeptune-"):
        return train_with_keeptune(base, records, method=method, bf16=side == "keeptune-bf16")
    if side == "gemm":
        return {precision: gemm_rate(precision) for precision in PRECISIONS}
    return train_with_trl(base, records, method=method, as_shipped=side == "trl-as-shipped")


def compare(name: str, base: Path, records: Path, *, method: str, pairs: int, as_shipped: bool) -> dict[str, Any]:
    """Alternate the sides; return every measurement, and the medians over the rounds of keeptune : TRL."""
    ours = [f"keeptune-{precision}" for precision in PRECISIONS]
    theirs = ["trl", *(["trl-as-shipped"] if as_shipped else [])]
    sides = [*ours, *theirs]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in [*sides, "gemm"]}
    for pair in range(pairs):
        for side in ["gemm", *(sides if pair % 2 == 0 else reversed(sides))]:
            runs[side].append(run_child(side, base, records, method=method))
    lengths = json.loads((base / "lengths.json").read_text())
    return {
        "data": name,
        "method": method,
        "runs": runs,
        "ratios": {left: {right: ratios(runs[left], runs[right]) for right in theirs} for left in ours},
        "gemm_share": {
            precision: statistics.median(
                needed_flops(run, method=method, lengths=lengths) / run["seconds"] / gemm[precision]
                for run, gemm in zip(runs[f"keeptune-{precision}"], runs["gemm"], strict=True)
            )
            for precision in PRECISIONS
        },
    }


def ratios(left: list[dict[str, float]], right: list[dict[str, float]]) -> dict[str, float]:
    """Return the median over pairs of runs of left ÷ right, in tokens per CPU-second and in peak memory."""
    pairs = list(zip(left, right, strict=True))
    return {
        "speed": statistics.median(speed(a) / speed(b) for a, b in pairs),
        "memory": statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs),
    }


def speed(run: dict[str, float]) -> float:
    """Return the tokens that a run trained on per CPU-second."""
    return run["num_tokens"] / run["cpu_seconds"]


def prepare_records(folder: Path, paths: list[str], *, limit: int) -> Path:
    """Write the base model and the records as both sides read them: rendered once, by keeptune's alpaca wording."""
    from keeptune.data.record import record_to_json
    from keeptune.text.template import make_template
    from keeptune.text.tokenizer import Tokenizer
    from keeptune.text.tokens import tokenize

    records = read_records(paths, limit=limit)
    build_base(folder, records)
    tokenizer = Tokenizer.load(folder)
    template = make_template("alpaca", tokenizer=tokenizer, encoder_decoder=False)
    policy: dict[str, Any] = {"max_length": 1024, "over_length": "drop"}
    tokenized = list(
        tokenize(records, tokenizer=tokenizer, template=template, train_on="all", encoder_decoder=False, **policy)
    )
    kept = [item for item in tokenized if item.example is not None]
    (folder / "lengths.json").write_text(json.dumps([item.prompt_tokens + item.completion_tokens for item in kept]))
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for item in kept:
            prompt = template.render_prompt(item.record.messages[:-1])
            line = {"prompt": prompt, "completion": item.record.completion, "record": record_to_json(item.record)}
            file.write(json.dumps(line) + "\n")
    return path


def main() -> None:
    """Measure every data set with every method and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE[,FILE...]")
    parser.add_argument("--records", type=int, default=320, help="records of each data set")
    parser.add_argument("--pairs", type=int, default=2, help="times that the sides alternate")
    parser.add_argument("--as-shipped", action="store_true", help="also measure TRL with gradient checkpointing on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for data in arguments.data:
        name, _, paths = data.partition("=")
        with tempfile.TemporaryDirectory() as scratch:
            base = Path(scratch)
            records = prepare_records(base, paths.split(","), limit=arguments.records)
            for method in METHODS:
                row = compare(
                    name, base, records, method=method, pairs=arguments.pairs, as_shipped=arguments.as_shipped
                )
                rows.append(row)
                print(describe(row), flush=True)
    means = mean_ratios(rows)
    for ours, against in means.items():
        for theirs, mean in against.items():
            print(f"{ours} : {theirs}, mean of {len(rows)}: {mean['speed']:.2f}x tokens, {mean['memory']:.2f}x memory")
    arguments.out.parent.mkdir(exist_ok=True)
    facts = {"machine": machine(), "versions": versions(), "records": arguments.records, "pairs": arguments.pairs}
    arguments.out.write_text(json.dumps({**facts, "rows": rows, "mean_ratios": means}, indent=1) + "\n")


def mean_ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean over all rows of each ratio."""
    return {
        ours: {
            theirs: {
                kind: statistics.mean(row["ratios"][ours][theirs][kind] for row in rows) for kind in ("speed", "memory")
            }
            for theirs in against
        }
        for ours, against in rows[0]["ratios"].items()
    }


def describe(row: dict[str, Any]) -> str:
    """Return a row of the result as rows of the table in README.md."""
    lines = []
    for precision in PRECISIONS:
        side = f"keeptune-{precision}"
        for against, ratio in row["ratios"][side].items():
            ours, theirs = row["runs"][side], row["runs"][against]
            speeds = [statistics.median(speed(run) for run in runs) for runs in (ours, theirs)]
            peaks = [statistics.median(run["peak_bytes"] / 1e6 for run in runs) for runs in (ours, theirs)]
            cells = [row["data"], row["method"], precision, against]
            cells += [f"{speeds[0]:.0f} : {speeds[1]:.0f}", f"{ratio['speed']:.2f}"]
            cells += [f"{peaks[0]:.0f} : {peaks[1]:.0f} MB", f"{ratio['memory']:.2f}"]
            cells += [f"{100 * row['gemm_share'][precision]:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform()}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that were measured."""
    from importlib.metadata import version

    return {name: version(name) for name in ("keeptune", "torch", "transformers", "peft", "trl", "accelerate")}


if __name__ == "__main__":
    if "--child" in sys.argv:
        _, _, side_, _, method_, base_, records_ = sys.argv
        print(json.dumps(child(side_, Path(base_), Path(records_), method=method_)))
    else:
        main()
