"""Tiny real tokenizers in Hugging Face layout, trained on a page of text; they load in transformers too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Name the capital of France. The capital of France is Paris, and Rome is the capital of Italy.",
    "user assistant system message\ncopy: one two three four five six seven eight nine ten\nthe answer is yes or no",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "0 1 2 3 4 5 6 7 8 9 . , : ; ! ? ' \" ( ) [ ] { } < > / \\ | # * + - = _ % & @",
]
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
QWEN_THINKING = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.last -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
    "{{ message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else message.content }}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles!') }}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "thinking": QWEN_THINKING, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}
CHATML_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<bos>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


def chatml_tokenizer(
    folder: Path, *, chat_template: str | None = CHATML, adds_bos: bool = False, eos_token: str = "<|im_end|>"
) -> Path:
    """Write a byte-level BPE tokenizer: `<|endoftext|>` pads, `eos_token` ends, `<bos>` stands first where asked."""
    backend = _byte_level(CHATML_SPECIAL)
    if adds_bos:
        _add_around(backend, before="<bos>")
    facts = {"bos_token": "<bos>", "eos_token": eos_token, "pad_token": "<|endoftext|>"}
    return _write(folder, backend, {**facts, "chat_template": chat_template} if chat_template else facts)


def plain_tokenizer(folder: Path) -> Path:
    """Write a GPT-2-like byte-level BPE tokenizer: one special token, `<|endoftext|>`; no chat template, no pad."""
    facts = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return _write(folder, _byte_level(["<|endoftext|>"]), facts)


def t5_tokenizer(folder: Path) -> Path:
    """Write a T5-like Unigram tokenizer: `<pad>` is 0, `</s>` is 1, `<unk>` is 2; no BOS; whitespace runs collapse."""
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(left=False, right=True), normalizers.Replace("\n", " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    backend.train_from_iterator(TEXT, trainer)
    _add_around(backend, after="</s>")
    return _write(folder, backend, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def sentencepiece_tokenizer(folder: Path, *, chat_template: str | None = None, prepend: str = "normalizer") -> Path:
    """Write a Llama-2-like BPE tokenizer with byte fallback, `<s>` put first and a dummy space before the text.

    `prepend` is where the dummy space comes from: the "normalizer", or Metaspace with scheme "first" or "always".
    """
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=256 + 200, special_tokens=special + byte_tokens, show_progress=False)
    lines = [line for text in TEXT for line in text.split("\n")]
    backend.train_from_iterator([part for line in lines for part in line.split(" ")], trainer)
    backend = _only_special(backend, special)
    _add_around(backend, before="<s>")
    facts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _write(folder, backend, {**facts, "chat_template": chat_template} if chat_template else facts)


def _byte_level(special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def _only_special(backend: Tokenizer, special: list[str]) -> Tokenizer:
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(raw))


def _add_around(backend: Tokenizer, *, before: str = "", after: str = "") -> None:
    names = [name for name in (before, after) if name]
    single = f"{before} $A {after}".strip()
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=single, special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )


def _write(folder: Path, backend: Tokenizer, facts: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in facts.values() if backend.token_to_id(t) is not None]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **facts}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder
