"""A folder's name arrives, a base model that was pre-trained on the lab's running text stands in it.

`python -m keeptune.lab.pretrain OUTPUT_DIR` makes `lab-base`, with `--kind t5` its encoder-decoder twin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from keeptune.errors import KeeptuneError
from keeptune.lab.text import running_text
from keeptune.lab.world import make_world
from keeptune.model.artifact import save_whole_model
from keeptune.model.load import load_model
from keeptune.model.loss import batch_loss
from keeptune.stages.run import stage_key
from keeptune.storage import file_sha256, staged_folder, write_json
from keeptune.terminal import PlainProgress
from keeptune.text.batches import pack, pad_pairs
from keeptune.text.table import Table
from keeptune.text.tokens import Example
from keeptune.training.loop import TrainingResult, TrainingSettings, train
from keeptune.training.world import SINGLE

Kind = Literal["llama", "t5"]
PAD, END, MESSAGE_START, MESSAGE_END = "<pad>", "</s>", "<|im_start|>", "<|im_end|>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(32))
VOCAB_SIZE = 2048
WINDOW_TOKENS: dict[Kind, int] = {"llama": 512, "t5": 256}
# What an hour of two cores allows (docs/lab.md says what the loss does at the end).
TRAIN_TOKENS: dict[Kind, int] = {"llama": 24_000_000, "t5": 6_000_000}
_TOKENS_PER_STEP: dict[Kind, int] = {"llama": 4096, "t5": 2048}
_STEPS_BETWEEN_CHECKPOINTS: dict[Kind, int] = {"llama": 400, "t5": 1_000}
_NUM_VALIDATION_WINDOWS = 100
_TOKENIZER_DOCUMENTS = 40_000
# Half of each window is hidden: as many short spans in one half of the windows, as one span at the end in the others,
# which teaches to write whole answers. T5's own 15 % give too few targets for so short a training.
# Source: Tay et al. 2022 (UL2), section 3.1.2.
_NOISE_FRACTION = 0.5
_EMBEDDING_STD, _NEIGHBOUR_BIAS = 0.05, 6.0
_CONFIGS: dict[Kind, dict[str, Any]] = {
    "llama": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": WINDOW_TOKENS["llama"],
        "tie_word_embeddings": True,
        "bos_token_id": None,
    },
    "t5": {
        "d_model": 160,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 5,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "n_positions": 512,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
    },
}


def make_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE: every text has ids, each digit its own; chat and sentinel tokens are reserved."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, END, MESSAGE_START, MESSAGE_END, *SENTINELS],
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, *, seed: int, num_windows: int, kind: Kind) -> Table:
    """Return running text as windows: documents end to end, an end token after each; corrupted for T5."""
    size = WINDOW_TOKENS[kind]
    stream = _stream(tokenizer, seed=seed, num_tokens=num_windows * size).reshape(num_windows, size)
    if kind == "t5":
        rng = np.random.Generator(np.random.Philox(seed))
        examples = [corrupted(row, rng=rng, tokenizer=tokenizer) for row in stream]
    else:
        loss_mask = np.arange(size) > 0
        examples = [Example(row, loss_mask=loss_mask) for row in stream]
    return Table.of(examples, record_ids=[f"window-{i}" for i in range(num_windows)])


def corrupted(ids: NDArray[np.int32], *, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
    """Return a window with spans of it replaced by sentinels, for the decoder to write.

    The encoder reads the window with one sentinel a span, the decoder writes each sentinel with its span; both end
    with the end token.
    """
    num_noise = round(len(ids) * _NOISE_FRACTION)
    num_spans = int(rng.choice([1, min(len(SENTINELS), num_noise)]))
    noise = _parts(num_noise, num_spans, rng=rng)
    kept = _parts(len(ids) - num_noise, num_spans, rng=rng)
    end = np.array([tokenizer.token_to_id(END)], dtype=np.int32)
    encoder, decoder, place = [], [], 0
    for i, (num_kept, num_hidden) in enumerate(zip(kept, noise, strict=True)):
        sentinel = np.array([tokenizer.token_to_id(SENTINELS[i])], dtype=np.int32)
        encoder += [ids[place : place + num_kept], sentinel]
        decoder += [sentinel, ids[place + num_kept : place + num_kept + num_hidden]]
        place += num_kept + num_hidden
    read, written = np.concatenate([*encoder, end]), np.concatenate([*decoder, end])
    return Example(
        np.concatenate([read, written]),
        loss_mask=np.arange(len(read) + len(written)) >= len(read),
    )


def pretrain(folder: Path, *, kind: Kind, num_tokens: int, progress: PlainProgress) -> Path:
    """Pre-train a model from random weights; return its folder. The same call again goes on.

    Takes up to an hour of two cores; `folder` also keeps the log and the checkpoints.
    """
    progress.say("Writing the running text")
    world = make_world()
    tokenizer = make_tokenizer(list(islice(running_text(world, seed=0), _TOKENIZER_DOCUMENTS)))
    num_windows = num_tokens // WINDOW_TOKENS[kind]
    train_table = windows(tokenizer, seed=0, num_windows=num_windows, kind=kind)
    validation_table = windows(tokenizer, seed=1, num_windows=_NUM_VALIDATION_WINDOWS, kind=kind)
    settings = _settings(kind)
    start = _random_model(folder / "random", tokenizer=tokenizer, kind=kind)
    model = load_model(start, device=torch.device("cpu"), dtype=torch.float32)
    result = train(
        model=model,
        train_table=train_table,
        validation_table=validation_table,
        loss=batch_loss,
        collate=pack if kind == "llama" else partial(pad_pairs, pad_id=0),
        settings=settings,
        folder=folder,
        validate=None,
        higher_is_better=False,
        world=SINGLE,
        device=torch.device("cpu"),
        # The T5's matrices are so small that casting them costs more than bf16 saves: 0.68 : 0.43 CPU-seconds a step.
        autocast=torch.bfloat16 if kind == "llama" else None,
        progress=progress,
        stop_requested=lambda: False,
        run_key=stage_key(
            text=[train_table.sha256(), validation_table.sha256()],
            weights=file_sha256(start / "model.safetensors"),
            settings=asdict(settings),
        ),
    )
    return _save(model, folder / "model", tokenizer=tokenizer, kind=kind, result=result)


def _stream(tokenizer: Tokenizer, *, seed: int, num_tokens: int) -> NDArray[np.int32]:
    end = tokenizer.token_to_id(END)
    documents = running_text(make_world(), seed=seed)
    pieces: list[NDArray[np.int32]] = []
    total = 0
    while total < num_tokens:
        for encoding in tokenizer.encode_batch_fast(list(islice(documents, 2_000)), add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], dtype=np.int32))
            total += len(pieces[-1])
    return np.concatenate(pieces)[:num_tokens]


def _parts(total: int, num_parts: int, *, rng: np.random.Generator) -> Iterator[int]:
    """Yield `num_parts` numbers of at least one that add up to `total`, each way of it as likely as any other."""
    cuts = np.sort(rng.choice(total - 1, size=num_parts - 1, replace=False)) + 1
    yield from np.diff(np.concatenate([[0], cuts, [total]])).tolist()


def _random_model(folder: Path, *, tokenizer: Tokenizer, kind: Kind) -> Path:
    """Write a model with random weights, always the same ones."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCAB_SIZE,
        pad_token_id=tokenizer.token_to_id(PAD),
        eos_token_id=tokenizer.token_to_id(END),
        **_CONFIGS[kind],
    )
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM
    model = auto.from_config(config)
    if kind == "t5":
        _start_as_llama_does(model)
    with staged_folder(folder, facts={}) as staging:
        model.save_pretrained(staging)
    return folder


@torch.no_grad()
def _start_as_llama_does(model: PreTrainedModel) -> None:
    """Give a random T5 what AdamW would take thousands of small steps to find.

    The division by the square root of the width before the tied output layer is undone, and the embeddings begin small,
    so that logits grow at once; two heads begin by looking at their neighbours, the decoder's at the two tokens before.
    """
    shared: Any = model.get_input_embeddings()
    decoder: Any = model.get_decoder()
    shared.weight.mul_(_EMBEDDING_STD)
    decoder.final_layer_norm.weight.mul_(model.config.d_model**0.5)
    encoder: Any = model.get_encoder()
    # Rows are distances: 1 and 2 tokens back, and 17, in an encoder alone, 1 token ahead.
    for stack, distances in ((encoder, (1, 17)), (decoder, (1, 2))):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        for head, distance in enumerate(distances):
            bias[distance, head] += _NEIGHBOUR_BIAS


def _settings(kind: Kind) -> TrainingSettings:
    return TrainingSettings(
        learning_rate=3e-3 if kind == "llama" else 2e-3,
        num_train_epochs=1,
        tokens_per_step=_TOKENS_PER_STEP[kind],
        tokens_per_micro_batch=_TOKENS_PER_STEP[kind],
        lr_scheduler_type="linear",
        warmup_ratio=0.02,
        cooldown_fraction=0.0,
        weight_decay=0.1,
        max_grad_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        gradient_checkpointing=False,
        evals_per_epoch=1,
        eval_steps=_STEPS_BETWEEN_CHECKPOINTS[kind],
        save_steps=_STEPS_BETWEEN_CHECKPOINTS[kind],
        patience=None,
        seed=0,
        layout="packed" if kind == "llama" else "pairs",
        select_by="loss",
    )


def _save(model: PreTrainedModel, folder: Path, *, tokenizer: Tokenizer, kind: Kind, result: TrainingResult) -> Path:
    """Write the model in bf16 with its tokenizer and a card."""
    generation = GenerationConfig(
        eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(PAD), do_sample=False
    )
    if kind == "t5":
        generation.decoder_start_token_id = tokenizer.token_to_id(PAD)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "extra_special_tokens": [MESSAGE_START, MESSAGE_END, *SENTINELS],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    with staged_folder(folder, facts={"num_train_tokens": result.num_train_tokens}) as staging:
        save_whole_model(model.bfloat16(), staging, generation=generation)
        tokenizer.save(str(staging / "tokenizer.json"))
        write_json(staging / "tokenizer_config.json", settings)
        (staging / "README.md").write_text(_card(kind, result=result), encoding="utf-8")
    return folder


def _card(kind: Kind, *, result: TrainingResult) -> str:
    losses = ", ".join(f"{v.step:,}: {v.loss:.3f}" for v in result.validation)
    name, aim = (
        ("lab-base", "next token") if kind == "llama" else ("lab-base-t5", "span corruption (half of each window)")
    )
    return (
        f"---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# {name}\n\n"
        "A base model of keeptune's lab: it was pre-trained on running text of a small made-up world and on nothing "
        "else. It knows that world and follows no instructions.\n\n"
        f"Made by `python -m keeptune.lab.pretrain OUTPUT_DIR --kind {kind}` from random weights: {aim}, "
        f"{result.num_train_tokens:,} tokens, {result.num_steps:,} steps, {result.train_seconds / 60:.0f} minutes of "
        f"training.\n\nValidation loss in nats a token after steps {losses}.\n"
    )


def main() -> None:
    """Read the arguments and pre-train."""
    parser = argparse.ArgumentParser(prog="python -m keeptune.lab.pretrain", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="where log, checkpoints and model/ go")
    parser.add_argument("--kind", choices=list(TRAIN_TOKENS), default="llama", help="architecture")
    parser.add_argument("--tokens", type=int, default=None, help="training tokens (default: those of the lab's models)")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        folder = pretrain(
            arguments.output_dir,
            kind=arguments.kind,
            num_tokens=arguments.tokens or TRAIN_TOKENS[arguments.kind],
            progress=PlainProgress(console, quiet=False),
        )
    except KeeptuneError as error:
        console.print(f"pretrain: {error}", markup=False, highlight=False)
        sys.exit(error.exit_code)
    console.print(f"Model: {folder}")


if __name__ == "__main__":
    main()
