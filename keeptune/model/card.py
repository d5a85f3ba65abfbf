"""The model card: what was trained, on what, with which scores arrives; `README.md` with its front matter leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from keeptune.model.declared import BITSANDBYTES, Quantization
from keeptune.storage import write_atomic

_MERGED = (
    "The adapter that was merged into this model is certified; this model is not. Certify it with `keeptune certify "
    "RECIPE --artifact FOLDER`."
)


@dataclass(frozen=True, slots=True)
class CardScore:
    """A metric on the test split of one task; `base_value` is the base model's own, `few_shot` its best with examples.

    `few_shot` is in words, with how many examples. "all" is every trained task together, "others" every one that was
    not `trained` on. [`low`, `high`] is the 95 % interval of the value.
    """

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    num_records: int
    base_value: float | None
    trained: bool = True
    few_shot: str = ""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a card says; `recipe` is the whole recipe as YAML, `limits` are sentences that a user should know.

    `certificate` holds what is certified of this very folder and what that leaves open; of a merged one nothing is.
    `prompt` holds the messages of a prompt that the model was trained on, as the chat template takes them.
    """

    name: str
    base_name: str
    peft_type: str | None
    encoder_decoder: bool
    template: str
    prompt: tuple[Mapping[str, str], ...]
    max_new_tokens: int
    trained_parameters: int
    total_parameters: int
    scores: tuple[CardScore, ...]
    recipe: str
    limits: tuple[str, ...]
    versions: Mapping[str, str]
    quantization: Quantization | None = None
    """In how many bits the base model's weights were read beside the adapter, where they were quantised for it."""
    forgotten: tuple[str, ...] = ()
    """What the model does worse than the base on what it was not trained on, a sentence a suite."""
    certificate: tuple[str, ...] = ()


def card_to_json(card: ModelCard) -> dict[str, Any]:
    """Return what `card_from_json` makes the same card of."""
    return asdict(card)


def card_from_json(value: Mapping[str, Any]) -> ModelCard:
    """Return the card that `card_to_json` wrote."""
    lists = {name: tuple(value[name]) for name in ("prompt", "limits", "forgotten", "certificate") if name in value}
    return ModelCard(**{**value, **lists, "scores": tuple(CardScore(**score) for score in value["scores"])})


def write_model_card(folder: Path, *, card: ModelCard, merged: bool = False) -> None:
    """Write `README.md` into a saved model's folder; `merged`: the folder holds an adapter folded into its base.

    Raises:
        StorageError: the disk refuses.
    """
    adapter = card.peft_type is not None and not merged
    certificate = (_MERGED,) if merged and card.certificate else card.certificate
    front = yaml.safe_dump(_front_matter(card, adapter=adapter), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n\n# {_plain(card.name)}\n",
        _summary(card, adapter=adapter),
        "## Use\n\n" + _fenced(_usage(card, adapter=adapter), language="python"),
        "## Scores\n\n" + _score_table(card),
        _section("What it forgot", card.forgotten),
        _section("Limits", (*certificate, *card.limits)),
        "## Recipe\n\n" + _fenced(card.recipe.rstrip("\n"), language="yaml"),
        "## Versions\n\n" + ", ".join(f"{_plain(name)} {version}" for name, version in card.versions.items()) + "\n",
    ]
    write_atomic(folder / "README.md", "\n".join(part for part in parts if part))


def _section(title: str, sentences: Sequence[str]) -> str:
    """Return a section that lists sentences, empty without any."""
    return f"## {title}\n\n" + "\n".join(f"- {_plain(each)}" for each in sentences) + "\n" if sentences else ""


def _front_matter(card: ModelCard, *, adapter: bool) -> dict[str, Any]:
    kind = "text2text-generation" if card.encoder_decoder else "text-generation"
    front: dict[str, Any] = {
        "base_model": card.base_name.partition("@")[0],
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": kind,
        "tags": ["keeptune", "instruction-tuning", (card.peft_type or "full-fine-tuning").lower()],
    }
    results = [
        {
            "task": {"type": kind, "name": "Text generation"},
            "dataset": {"type": task, "name": task, "split": "test"},
            "metrics": [
                {"type": score.metric, "name": score.metric, "value": round(score.value, 6)}
                for score in card.scores
                if score.task == task
            ],
        }
        for task in dict.fromkeys(score.task for score in card.scores)
    ]
    if results:
        front["model-index"] = [{"name": card.name, "results": results}]
    return front


def _summary(card: ModelCard, *, adapter: bool) -> str:
    share = 100.0 * card.trained_parameters / card.total_parameters
    how = f"PEFT method {card.peft_type}" if card.peft_type else "full fine-tuning"
    what = "This folder holds the adapter alone." if adapter else "This folder holds the whole model."
    return (
        f"`{_plain(card.base_name)}`, trained on instruction data with keeptune by {how}: {card.trained_parameters:,} "
        f"of {card.total_parameters:,} parameters trained ({share:.2f} %). {what} "
        f"Prompts take the `{card.template}` form, which the saved chat template writes.\n"
    )


def _usage(card: ModelCard, *, adapter: bool) -> str:
    kind = "Seq2SeqLM" if card.encoder_decoder else "CausalLM"
    library, loader = ("peft", f"AutoPeftModelFor{kind}") if adapter else ("transformers", f"AutoModelFor{kind}")
    answer = "output[0]" if card.encoder_decoder else 'output[0, inputs["input_ids"].shape[1] :]'
    imports = [f"from {library} import {loader}", "from transformers import AutoTokenizer, GenerationConfig"]
    limit = f"max_new_tokens={card.max_new_tokens}"
    bits, quantised, settings = [], "", f"generation_config=GenerationConfig.from_pretrained(folder, {limit})"
    if not adapter:
        imports, settings = [f"from transformers import {loader}, AutoTokenizer"], f"{limit}, do_sample=False"
    elif card.quantization is not None:
        imports[1] = "from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig"
        stored = ", ".join(f"{name}={value!r}" for name, value in BITSANDBYTES[card.quantization].items())
        bits = ["# The base model's weights as they were in training.", f"bits = BitsAndBytesConfig({stored})"]
        quantised = ", quantization_config=bits"
    return "\n".join(
        [
            *imports,
            "",
            'folder = "."  # this folder',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            *bits,
            f"model = {loader}.from_pretrained(folder{quantised})",
            "# A prompt of the kind that the model was trained on.",
            f"messages = {[dict(message) for message in card.prompt]!r}",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
            f"output = model.generate(**inputs, {settings})",
            f"print(tokenizer.decode({answer}, skip_special_tokens=True))",
        ]
    )


def _score_table(card: ModelCard) -> str:
    if not card.scores:
        return "None was measured.\n"
    trained, others = ([score for score in card.scores if score.trained == kind] for kind in (True, False))
    meaning = "On the locked test split; in brackets the 95 % interval."
    tables = [_score_rows(trained), "On tasks that it was not trained on:", _score_rows(others)]
    return "\n\n".join([*(tables if others else tables[:1]), meaning, ""])


def _score_rows(scores: Sequence[CardScore]) -> str:
    few_shot = any(score.few_shot for score in scores)
    columns = ["this model", "base model", *(["base model, few-shot"] if few_shot else []), "records"]
    lines = [f"| task | metric | {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * len(columns)}"]
    for score in scores:
        base = "–" if score.base_value is None else f"{score.base_value:.4f}"
        cells = [f"{score.value:.4f}{_doubt(score)}", base, *([score.few_shot or "–"] if few_shot else [])]
        names = f"{_plain(score.task)} | {_plain(score.metric)}"
        lines.append(f"| {names} | {' | '.join(cells)} | {score.num_records} |")
    return "\n".join(lines)


def _doubt(score: CardScore) -> str:
    return "" if score.low is None or score.high is None else f" ({score.low:.4f} to {score.high:.4f})"


def _plain(text: str) -> str:
    """Return text that stays text in Markdown and in the HTML made of it."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, *, language: str) -> str:
    """Return a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"
