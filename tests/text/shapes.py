"""The published shapes: chat templates with the flags of their added tokens, over tiny vocabularies trained here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests import tiny

FOLDER = Path(__file__).parent / "shapes"
# Source: the tokenizer.json of Llama 3; those of Qwen, Phi-4, gpt-oss, DeepSeek V3 and Tekken split alike.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Shape:
    """A template's file, its special tokens and its other added tokens, each with the flags that are set.

    `vocabulary` is how text between added tokens is read: "bytes", or by SentencePiece with a dummy space before the
    text ("first"), before every stretch of it ("every") or nowhere ("none").
    """

    template: str
    vocabulary: Literal["bytes", "first", "every", "none"]
    special: dict[str, tuple[str, ...]]
    eos: str
    bos: str | None = None
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)
    end: str = ""
    has_system: bool = True
    thinks: bool = False


def _flags(*tokens: str, flags: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(tokens, flags)


_CHATML = _flags("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CALLS = _flags("<tool_call>", "</tool_call>")
_THINK = _flags("<think>", "</think>")
_LLAMA = _flags("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = _flags("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>")
# Gemma has runs of newlines and HTML tags as ordinary added tokens.
_GEMMA_OTHERS = _flags("\n", "\n\n", "\n\n\n", "▁▁", "<h1>", "</h1>")
_INST = _flags("<s>", "</s>", "<unk>", "[INST]", "[/INST]")
_DEEPSEEK = _flags("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_DEEPSEEK_OTHERS = _flags("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>")

SHAPES = {
    # Source: microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json: all but <|endoftext|> eat the spaces behind them.
    "phi-3": Shape(
        "phi-3",
        "every",
        _flags("<s>", "<unk>", "<|endoftext|>")
        | _flags("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", flags=("rstrip",)),
        eos="<|endoftext|>",
        bos="<s>",
        others=_flags("</s>", flags=("rstrip",)),
        end="<|end|>",
    ),
    # Source: microsoft/phi-4, tokenizer_config.json: the tokens of turns eat the spaces on both sides.
    "phi-4": Shape(
        "phi-4",
        "bytes",
        _flags("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", flags=("lstrip", "rstrip")),
        eos="<|im_end|>",
        bos="<|endoftext|>",
    ),
    "llama-3": Shape("llama-3", "bytes", _LLAMA, eos="<|eot_id|>", bos="<|begin_of_text|>"),
    "llama-3.1": Shape("llama-3.1", "bytes", _LLAMA, eos="<|eot_id|>", bos="<|begin_of_text|>"),
    "qwen2.5": Shape("qwen2.5", "bytes", _CHATML, eos="<|im_end|>", others=_CALLS),
    "qwen3": Shape("qwen3", "bytes", _CHATML, eos="<|im_end|>", others=_CALLS | _THINK, thinks=True),
    "gemma-2": Shape(
        "gemma-2",
        "none",
        _GEMMA,
        eos="<eos>",
        bos="<bos>",
        others=_GEMMA_OTHERS,
        end="<end_of_turn>",
        has_system=False,
    ),
    "gemma-3": Shape("gemma-3", "none", _GEMMA, eos="<eos>", bos="<bos>", others=_GEMMA_OTHERS, end="<end_of_turn>"),
    "mistral-v0.3": Shape("mistral-v0.3", "first", _INST, eos="</s>", bos="<s>"),
    "mistral-tekken": Shape(
        "mistral-tekken", "bytes", _INST | _flags("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), eos="</s>", bos="<s>"
    ),
    "smollm2": Shape("smollm2", "bytes", _CHATML, eos="<|im_end|>", bos="<|im_start|>"),
    "smollm3": Shape("smollm3", "bytes", _CHATML, eos="<|im_end|>", others=_THINK, thinks=True),
    "chatml": Shape("chatml", "bytes", _CHATML, eos="<|im_end|>"),
    "chatml of words": Shape("chatml", "bytes", _flags("<|endoftext|>"), eos="<|endoftext|>"),
    "chatml, special: false": Shape(
        "chatml",
        "bytes",
        _flags("<|endoftext|>"),
        eos="<|endoftext|>",
        others=_flags("<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
    ),
    "chatml, normalised and stripped": Shape(
        "chatml",
        "first",
        _flags("<s>", "</s>", "<unk>"),
        eos="</s>",
        bos="<s>",
        others=_flags("<|im_start|>", "<|im_end|>", flags=("normalized", "lstrip", "single_word")),
        end="<|im_end|>",
    ),
    "deepseek-v3": Shape(
        "deepseek-v3",
        "bytes",
        _DEEPSEEK,
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        others=_DEEPSEEK_OTHERS,
    ),
    "deepseek-r1": Shape(
        "deepseek-r1",
        "bytes",
        _DEEPSEEK,
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        others=_DEEPSEEK_OTHERS,
    ),
    "gpt-oss": Shape(
        "gpt-oss",
        "bytes",
        _flags("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")
        | _flags("<|return|>", "<|call|>", "<|constrain|>"),
        eos="<|return|>",
        bos="<|startoftext|>",
    ),
}


def make(shape: Shape, folder: Path) -> Path:
    """Write the shape's tokenizer, in Hugging Face layout."""
    backend = _backend(shape)
    for special, tokens in ((True, shape.special), (False, shape.others)):
        for token, flags in tokens.items():
            added = AddedToken(token, special=special, **{"normalized": False, **dict.fromkeys(flags, True)})
            backend.add_tokens([added])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": shape.eos, "add_bos_token": False}
    config |= {"bos_token": shape.bos} if shape.bos else {}
    config |= {"unk_token": "<unk>"} if "<unk>" in shape.special else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = tiny.CHATML if shape.template == "chatml" else (FOLDER / f"{shape.template}.jinja").read_text()
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return folder


def _backend(shape: Shape) -> Tokenizer:
    text = [*tiny.TEXT, "user\n\nassistant\n\n \n  one\n\n\ntwo  three", "▁ ▁▁ system\n user\n"] * 2
    if shape.vocabulary == "bytes":
        backend = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(text, trainer)
        return backend
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    if shape.vocabulary == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif shape.vocabulary == "every":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
    else:
        backend.normalizer = replaced
    first = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if shape.vocabulary == "none" else [decoders.Strip(content=" ", left=1, right=0)]
    backend.decoder = decoders.Sequence([*first, *strip])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_], show_progress=False)
    backend.train_from_iterator([part for line in text for part in line.split(" ")], trainer)
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(raw))
