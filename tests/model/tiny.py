"""Tiny random models for the tests of this room, with weights large enough that a leak would show."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from keeptune.text.batches import NOT_TRAINED, Batch

VOCAB_SIZE = 61
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "num_attention_heads": 4,
}
_OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "llama-tied": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen2-sliding": Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "gemma": GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": MistralConfig(**_GROUPED, sliding_window=4),
    "gpt2": GPT2Config(**_GPT2),
    "gpt-neox": GPTNeoXConfig(**_SMALL),
    "opt": OPTConfig(**_OPT),
    "granite": GraniteConfig(**_GROUPED, logits_scaling=3.0),
    "cohere": CohereConfig(**_GROUPED, logit_scale=0.3),
}
# Attention sinks: every softmax has one more term, which packs do not reproduce.
UNPACKABLE = GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
T5 = T5Config(
    vocab_size=VOCAB_SIZE,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    initializer_factor=3.0,
)
T5.decoder_start_token_id = 0


def make_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Return a model in training mode with a configuration of its own, which models write to."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (
            T5ForConditionalGeneration(config)
            if isinstance(config, T5Config)
            else AutoModelForCausalLM.from_config(config)
        )
    return model.train()


def make_examples(lengths: Sequence[int], *, seed: int = 0, trained: float = 0.7) -> list[tuple[NDArray, NDArray]]:
    """Return (input_ids, labels) of random examples; the first token is never trained on, the last always is."""
    generator = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        ids = generator.integers(3, VOCAB_SIZE, size=length)
        loss_mask = generator.random(length) < trained
        loss_mask[-1:], loss_mask[:1] = True, False
        examples.append((ids, np.where(loss_mask, ids, NOT_TRAINED)))
    return examples


def packed(examples: Sequence[tuple[NDArray, NDArray]]) -> Batch:
    lengths = np.array([len(ids) for ids, _ in examples])
    input_ids, labels = (np.concatenate([example[i] for example in examples]) for i in (0, 1))
    return Batch(input_ids, labels, lengths=lengths, packed=True)


def padded(examples: Sequence[tuple[NDArray, NDArray]]) -> Batch:
    lengths = np.array([len(ids) for ids, _ in examples])
    input_ids = rows([ids for ids, _ in examples], filler=0)
    labels = rows([labels for _, labels in examples], filler=NOT_TRAINED)
    return Batch(input_ids, labels, lengths=lengths, packed=False)


def pairs(encoder_lengths: Sequence[int], decoder_lengths: Sequence[int]) -> Batch:
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, VOCAB_SIZE, size=length) for length in encoder_lengths]
    completions = [generator.integers(3, VOCAB_SIZE, size=length) for length in decoder_lengths]
    return Batch(
        rows(prompts, filler=0),
        rows(completions, filler=NOT_TRAINED),
        lengths=np.array(encoder_lengths),
        packed=False,
        label_lengths=np.array(decoder_lengths),
    )


def rows(values: Sequence[NDArray], *, filler: int) -> NDArray:
    out = np.full((len(values), max(len(value) for value in values)), filler, dtype=np.int64)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out


def loss_one_by_one(model: torch.nn.Module, examples: Sequence[tuple[NDArray, NDArray]]) -> torch.Tensor:
    """The reference: transformers' own loss of each example alone, as a sum."""
    total = torch.zeros(())
    for ids, labels in examples:
        num_targets = int((labels != NOT_TRAINED).sum())
        if num_targets:
            batch = {"input_ids": torch.from_numpy(ids)[None], "labels": torch.from_numpy(labels)[None]}
            total = total + model(**batch, use_cache=False).loss * num_targets
    return total


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights by name, sharing memory with the model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
