"""Saved tiny base models with their text side, what is saved of a model tuned on one, and its logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from keeptune.model.artifact import save_artifact
from keeptune.text.template import Template, make_template
from keeptune.text.tokenizer import Tokenizer
from tests.tiny import chatml_tokenizer, plain_tokenizer, t5_tokenizer


@dataclass(frozen=True)
class Base:
    """A saved tiny base model with its text side."""

    folder: Path
    tokenizer: Tokenizer
    template: Template
    encoder_decoder: bool

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        kind = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        return kind.from_pretrained(self.folder, dtype=dtype).eval()


def configured(kind: Any, settings: dict[str, Any]) -> Any:
    return kind(**settings)


def make_base(folder: Path, kind: str, **settings: Any) -> Base:
    encoder_decoder = kind == "t5"
    {"llama": chatml_tokenizer, "gpt2": plain_tokenizer, "t5": t5_tokenizer}[kind](folder)
    tokenizer = Tokenizer.load(folder)
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "vocab_size": tokenizer.vocab_size}
    if kind == "llama":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": tokenizer.bos_id}
        model: PreTrainedModel = LlamaForCausalLM(configured(LlamaConfig, {**ids, **sizes, **heads, **settings}))
    elif kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": tokenizer.eos_id}
        model = GPT2LMHeadModel(configured(GPT2Config, {**ids, **sizes}))
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        model = T5ForConditionalGeneration(
            configured(T5Config, {**ids, **sizes, "decoder_start_token_id": tokenizer.pad_id, **settings})
        )
    model.save_pretrained(folder)
    return Base(
        folder, tokenizer, make_template("auto", tokenizer=tokenizer, encoder_decoder=encoder_decoder), encoder_decoder
    )


def save(model: nn.Module, folder: Path, base: Base, *, base_name: str | None = None) -> Path:
    save_artifact(
        model,
        folder,
        base_name=base_name or str(base.folder),
        tokenizer_folder=base.folder,
        tokenizer=base.tokenizer,
        template=base.template,
        max_new_tokens=17,
        facts={"method": "mine"},
    )
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    ids = torch.tensor([[5, 9, 40, 7, 31, 12], [8, 8, 3, 60, 2, 19]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
        return model(**inputs).logits[:, -4:]
    return model(**inputs).logits[:, -6:]
