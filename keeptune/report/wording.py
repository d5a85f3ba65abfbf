"""How numbers and foreign text are worded on the page: values arrive, short strings and safe HTML leave."""

from __future__ import annotations

import math
import re
import unicodedata

from markupsafe import Markup, escape

from keeptune.data.record import OTHER_TASKS, SELF_TEXTS

MISSING = "–"
NOT_FINITE = "not finite"
# A number and its unit stay on one line.
NO_BREAK = "\u00a0"
# exp of more is no finite float.
_LARGEST_EXPONENT = 700.0
_LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "rouge1_unicode": "ROUGE-1 (Unicode)",
    "rouge2_unicode": "ROUGE-2 (Unicode)",
    "rougeL_unicode": "ROUGE-L (Unicode)",
    "rougeLsum_unicode": "ROUGE-Lsum (Unicode)",
    "bleu": "BLEU",
    "bleu_char": "BLEU of characters",
    "bleu_zh": "BLEU (Chinese)",
    "bleu_ja_mecab": "BLEU (Japanese, MeCab)",
    "bleu_ko_mecab": "BLEU (Korean, MeCab)",
    "bleu_flores200": "spBLEU (FLORES-200)",
    "chrf": "chrF",
    "exact_match": "Exact match",
    "exact_match_squad": "Exact match (SQuAD)",
    "raw_exact_match": "Exact match, raw text",
    "token_f1": "Token F1",
    "char_f1": "Character F1",
    "acc": "Accuracy",
    "acc_norm": "Accuracy, likelihood by length",
    "loss": "Loss",
    "perplexity": "Perplexity",
}
_KEYS = {
    "exact_duplicates": "Copies of the same record",
    "near_duplicates.num_pairs": "Pairs of near-duplicate prompts",
    "groups.num_groups": "Groups of records that share an input",
    "groups.num_joined": "Prompts that joined another one’s group",
    "groups.num_moved": "Records that this moved to another split",
    "groups.largest_group": "Records in the largest group",
    "groups.largest": "Largest groups",
    "tokens.completion_cut": "Completions cut",
    "tokens.supervised_tokens": "Target tokens, all splits",
    "tokens.truncated_fraction": "Share of the records that were truncated",
    "not_trained": "Train and validation rows of tasks that are not trained on",
    "max_records": "Beyond max_records",
    "leak": "Train records that overlap with validation or test",
}
# A joiner between two characters that are not ASCII belongs to an emoji or a script that needs it; it stays.
_JOINER = re.compile(r"(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
_MARK_NAMES = {
    "\u202a": "LRE",
    "\u202b": "RLE",
    "\u202c": "PDF",
    "\u202d": "LRO",
    "\u202e": "RLO",
    "\u2066": "LRI",
    "\u2067": "RLI",
    "\u2068": "FSI",
    "\u2069": "PDI",
    "\u200e": "LRM",
    "\u200f": "RLM",
    "\u061c": "ALM",
    "\u200b": "ZWSP",
    "\u200c": "ZWNJ",
    "\u200d": "ZWJ",
    "\u2028": "LINE SEP",
    "\u2029": "PARA SEP",
    "\ufeff": "BOM",
    "\u00ad": "SHY",
    "\x00": "NUL",
    "\x1b": "ESC",
    "\r": "CR",
}


def metric_label(name: str) -> str:
    """Return the metric's name as papers write it; an unknown one unchanged."""
    return _LABELS.get(name, name)


def suite_label(suite: str) -> str:
    """Return a suite's name in words where keeptune gave it."""
    return {OTHER_TASKS: "all other tasks", SELF_TEXTS: "text that the base wrote"}.get(suite, suite)


def unit_label(metric: str) -> str:
    """Return what a loss of a metric is counted in."""
    return "nats per token" if metric == "loss" else metric_label(metric)


def likelihood(nats: float) -> str:
    """Return what a rise of the loss by so many nats per token means: "a token becomes 6.6 times less likely"."""
    factor = math.exp(min(abs(nats), _LARGEST_EXPONENT))
    if factor < 1.05:
        return "a token is about as likely as before"
    # Beyond this, digits tell nothing.
    times = f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}" if factor < 1e6 else "more than a million"
    return f"a token becomes {times} times {'less' if nats > 0 else 'more'} likely"


def key_label(key: str) -> str:
    """Return the name of a JSON field as prose; one that is not known by name, "num_near_pairs", as "Near pairs"."""
    if key in _KEYS:
        return _KEYS[key]
    words = re.sub(r"(?:^|(?<=\.))num_", "", key).replace(".", ": ").replace("_", " ")
    return words[:1].upper() + words[1:]


def count(value: float | None) -> str:
    """Return a whole number with thousands separated, as in 12,460."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if math.isfinite(value) else NOT_FINITE


def thousands(text: str) -> str:
    """Return a text that is a whole number with its thousands separated, any other unchanged."""
    return f"{int(text):,}" if re.fullmatch(r"\d{4,18}", text) else text


def about(value: float | None) -> str:
    """Return an estimate with the two digits that it is good for, as in 26,000."""
    return count(value if value is None or not math.isfinite(value) else float(f"{value:.2g}"))


def decimals_for(*values: float | None) -> int:
    """Return how many decimals keep three digits of the largest of the values."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return 3 if largest < 10 else 2 if largest < 100 else 1


def decimal(value: float | None, places: int = 3, *, signed: bool = False) -> str:
    """Return a number with a fixed count of decimals and a true minus sign; very large ones with an exponent."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    sign = "+" if signed else ""
    text = f"{value:{sign}.2e}" if abs(value) >= 1e6 else f"{value:{sign},.{places}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(low: float | None, high: float | None, places: int = 3, *, signed: bool = False) -> str:
    """Return both ends of an interval, as in "0.412 to 0.447"."""
    if low is None or high is None:
        return MISSING
    return f"{decimal(low, places, signed=signed)} to {decimal(high, places, signed=signed)}"


def seconds(value: float | None) -> str:
    """Return a duration in its two largest units, as in "3 min 12 s"."""
    if value is None or not math.isfinite(value):
        return decimal(value)
    if value < 10:
        return f"{value:.1f}{NO_BREAK}s"
    whole = round(value)
    units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    first = next((i for i, (size, _) in enumerate(units) if whole >= size), 3)
    parts = []
    for size, unit in units[first : first + 2]:
        parts.append(f"{whole // size}{NO_BREAK}{unit}")
        whole %= size
    return NO_BREAK.join(part for i, part in enumerate(parts) if i == 0 or not part.startswith(f"0{NO_BREAK}"))


def num_bytes(value: float | None) -> str:
    """Return a size in decimal units, as in "1.21 GB"."""
    return _scaled(value, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")], plain=f"{NO_BREAK}B")


def parameters(value: float | None) -> str:
    """Return a count of parameters in short, as in "3.15 M"."""
    return _scaled(value, [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")], plain="")


def _scaled(value: float | None, units: list[tuple[float, str]], *, plain: str) -> str:
    if value is None or not math.isfinite(value):
        return decimal(value)
    for size, unit in units:
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{NO_BREAK}{unit}"
    return f"{value:,.0f}{plain}"


def rate(value: float | None) -> str:
    """Return a learning rate as recipes write it, as in 0.001 and 2e-05."""
    return MISSING if value is None else f"{value:g}"


def percent(part: float | None, total: float | None = 1.0) -> str:
    """Return a share in percent with two digits that count, as in "0.63 %"."""
    if part is None or not total or not math.isfinite(part) or not math.isfinite(total):
        return MISSING
    value = 100 * part / total
    places = 0 if value == 0 or value >= 99.95 else 1 if value >= 9.95 else 2
    return f"{value:.{places}f}{NO_BREAK}%"


def clipped(text: str, *, head: int, tail: int) -> str:
    """Return a text with its middle left out where it is longer than `head + tail` characters, and say how much."""
    left_out = len(text) - head - tail
    if left_out <= 40:
        return text
    return f"{text[:head]}\n[… {left_out:,} characters left out …]\n{text[len(text) - tail :]}"


def visible(text: str) -> Markup:
    """Return foreign text as HTML: escaped, with every control, bidirectional and zero-width mark made visible."""
    joiners = {match.start() for match in _JOINER.finditer(text)}
    parts: list[str] = []
    plain_from = 0
    for i, character in enumerate(text):
        if character.isprintable() or character in "\n\t" or i in joiners or not _is_hidden(character):
            continue
        parts += [str(escape(text[plain_from:i])), _mark(character)]
        plain_from = i + 1
    return Markup("".join([*parts, str(escape(text[plain_from:]))]))


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN_CATEGORIES


def _mark(character: str) -> str:
    name = _MARK_NAMES.get(character, f"U+{ord(character):04X}")
    return f'<span class="mark">{name}</span>'
