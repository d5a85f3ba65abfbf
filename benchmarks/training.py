"""Training with keeptune against TRL's SFTTrainer: throughput per CPU-second and peak memory, in alternating pairs.

Both sides train one epoch over the same records with the same 19M-parameter Llama, tokenizer and prompt wording, each
run in a process of its own. TRL runs with its documented defaults, completion-only loss and a batch of 8 records;
keeptune's step has as many tokens as 8 records have on average, so that both make about the same number of updates.
Target-bearing tokens are those of the records that carry loss: all tokens of all records trained on, padding excluded.

    python benchmarks/training.py --data alpaca=FILE.json --data p3=FILE.jsonl.gz,FILE.jsonl.gz --pairs 2
"""

from __future__ import annotations

import argparse
import json
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
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
MODEL = {
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
    checkpointing = {} if as_shipped else {"gradient_checkpointing": False}
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
        data = trainer.train_dataset
        num_tokens = sum(len(ids) for ids in data["input_ids"])
        num_targets = sum(sum(label != -100 for label in labels) for labels in data["labels"])
        reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        steps = trainer.train().global_step
    return {
        "num_tokens": num_tokens,
        "num_targets": num_targets,
        "num_steps": steps,
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - wall,
        "peak_bytes": peak_bytes(),
    }


def train_with_keeptune(base: Path, records_path: Path, *, method: str, seed: int = 0) -> dict[str, float]:
    """Train one epoch with keeptune's loop and return tokens, targets, CPU-seconds, seconds and peak bytes."""
    import torch

    from keeptune.data.record import record_from_json
    from keeptune.model.attention import packed_attention
    from keeptune.model.load import load_model
    from keeptune.model.loss import batch_loss
    from keeptune.model.methods import Method, apply_method
    from keeptune.progress import Silent
    from keeptune.text.batches import pack
    from keeptune.text.template import make_template
    from keeptune.text.tokenizer import Tokenizer
    from keeptune.text.tokens import TokenTable, tokenize
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
        TokenTable.write(Path(out) / "train.arrow", tokenized)
        table = TokenTable.open(Path(out) / "train.arrow")
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
        with packed_attention(model):
            result = train(
                model=model, train_table=table, validation_table=table[:0], loss=batch_loss, collate=pack,
                settings=settings, folder=Path(out), validate=None, higher_is_better=False, world=SINGLE,
                device=device, autocast=None, progress=Silent(), stop_requested=lambda: False, run_key="benchmark",
            )
    return {
        "num_tokens": int(table.lengths.sum()),
        "num_targets": int(table.num_targets.sum()),
        "num_steps": result.num_steps,
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - wall,
        "peak_bytes": peak_bytes(),
    }
