"""A whole run in miniature: tiny random models with their tokenizers, and records whose answers can be learned."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from keeptune.config import Recipe, load_recipe
from keeptune.progress import Silent
from keeptune.stages import Context
from keeptune.text.tokenizer import Tokenizer
from tests.tiny import chatml_tokenizer, t5_tokenizer

Keeptune = Callable[..., subprocess.CompletedProcess[str]]
"""Gives a command line, and returns its exit code and what it printed."""
WORDS = ["red", "blue", "green", "black", "white", "brown"]


def llama(folder: Path, *, dropout: float = 0.0) -> Path:
    """Write a random Llama of 2 layers with a byte-level tokenizer and a chat template."""
    chatml_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(tokenizer.vocab_size, 300),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_dropout=dropout,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def t5(folder: Path, *, width: int = 32) -> Path:
    """Write a random T5 of 2 layers with a Unigram tokenizer."""
    t5_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    config.decoder_start_token_id = tokenizer.pad_id
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def records(path: Path, *, number: int = 80, seed: int = 0) -> Path:
    """Write distinct prompts of colours whose completion is their first word."""
    generator = random.Random(seed)
    lines = []
    for i in range(number):
        words = [generator.choice(WORDS) for _ in range(generator.randint(3, 9))]
        lines.append({"prompt": f"{i}: {' '.join(words)}", "completion": words[0]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe_file(folder: Path, *, model: Path, data: Path, **sections: Any) -> Path:
    """Write a recipe with short training; `sections` replace its sections.

    Of the base model it asks for zero-shot answers alone, unless `evaluation` says otherwise.
    """
    value: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(folder / "run"),
        "data": {
            "tasks": [{"path": str(data), "name": "first-word"}],
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
        },
        "methods": {"full": {"learning_rate": 1e-3}, "lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2}},
        "training": {"num_train_epochs": 2, "tokens_per_step": 256, "tokens_per_micro_batch": 128},
        "evaluation": {"metrics": ["exact_match", "rougeL"], "max_new_tokens": 8},
        "retention": {"self_texts": 0},
        "device": "cpu",
        **sections,
    }
    value["evaluation"].setdefault("baselines", ["zero-shot"])
    path = folder / "recipe.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def recipe(path: Path, **overrides: Any) -> Recipe:
    """Return the recipe in `path`."""
    return load_recipe(path, overrides=[f"{key}={json.dumps(value)}" for key, value in overrides.items()])


class Notes(Silent):
    """A progress that keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def context(
    *, notes: Notes | None = None, stop_requested: Callable[[], bool] = lambda: False, ledger: Path | None = None
) -> Context:
    """Return what the command line would lend."""
    return Context(
        progress=notes or Notes(),
        stop_requested=stop_requested,
        command="keeptune run",
        now=lambda: "2026-01-01T00:00:00",
        ledger=ledger,
    )
