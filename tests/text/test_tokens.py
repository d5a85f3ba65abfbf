"""The law "Mask": what is trained on is the completion and its end token; one length policy; the cache key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.record import Message, Record
from keeptune.errors import DataError
from keeptune.text.template import Template, make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example, Tokenized, preview, token_cache_key, tokenize
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# A set of one tokenizer, its template and whether the model has an encoder.
Setting = tuple[Tokenizer, Template, bool]
Load = Callable[[str], Setting]
WORDINGS = [
    "chatml",
    "thinking",
    "llama3",
    "gemma",
    "mistral",
    "built-in chatml",
    "built-in chatml-bos",
    "alpaca",
    "plain",
    "alpaca-bos",
    "llama2",
    "llama2-chat",
]
TRIMMING = {"llama3", "gemma"}
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[str, Setting] = {}

    def setting(wording: str) -> Setting:
        if wording not in made:
            made[wording] = _make(wording, folder=tmp_path_factory.mktemp(wording))
        return made[wording]

    return setting


def _make(wording: str, *, folder: Path) -> Setting:
    if wording.startswith("t5"):
        tokenizer = Tokenizer.load(tiny.t5_tokenizer(folder))
        name = "alpaca" if wording.endswith("alpaca") else "plain"
        return tokenizer, make_template(name, tokenizer=tokenizer, encoder_decoder=True), True
    if wording.startswith("llama2"):
        source = LLAMA2_CHAT if wording == "llama2-chat" else None
        tokenizer = Tokenizer.load(tiny.sentencepiece_tokenizer(folder, chat_template=source))
        return tokenizer, make_template("auto", tokenizer=tokenizer, encoder_decoder=False), False
    adds_bos = wording.endswith("-bos")
    if wording.startswith("built-in"):
        tiny.chatml_tokenizer(folder, chat_template=None, adds_bos=adds_bos, eos_token="<|endoftext|>")
        tokenizer = Tokenizer.load(folder)
        return tokenizer, make_template("chatml", tokenizer=tokenizer, encoder_decoder=False), False
    source = tiny.TEMPLATES.get(wording)
    tokenizer = Tokenizer.load(tiny.chatml_tokenizer(folder, chat_template=source, adds_bos=adds_bos))
    name = "plain" if wording == "plain" else "auto"
    return tokenizer, make_template(name, tokenizer=tokenizer, encoder_decoder=False), False


def record(*contents: str, origin: str = "data.jsonl:1") -> Record:
    messages = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return Record("id" + origin, "task", origin, tuple(messages))


def run(records: list[Record], setting: Setting, **options: Any) -> list[Tokenized]:
    tokenizer, template, encoder_decoder = setting
    defaults = {"train_on": "last", "max_length": 4096, "over_length": "error"}
    arguments = {**defaults, **options}
    return list(tokenize(records, tokenizer=tokenizer, template=template, encoder_decoder=encoder_decoder, **arguments))


def only(records: list[Record], setting: Setting, **options: Any) -> Example:
    (item,) = run(records, setting, **options)
    assert item.example is not None
    return item.example


def test_a_plain_record_has_these_ids_and_this_mask(load: Load) -> None:
    tokenizer = load("plain")[0]
    example = only([record("a", "b")], load("plain"))
    assert tokenizer.decode_batch([[i] for i in example.input_ids.tolist()]) == ["a", "\n", "b", "<|im_end|>"]
    assert example.loss_mask.tolist() == [False, False, True, True]
    assert example.input_ids.dtype == np.int32 and example.loss_mask.dtype == np.bool_
    assert example.prompt_ids.tolist() == example.input_ids.tolist()[:2]
    assert example.completion_ids.tolist() == example.input_ids.tolist()[2:]


def test_a_chatml_record_has_these_ids_and_this_mask(load: Load) -> None:
    tokenizer = load("built-in chatml")[0]
    example = only([record("a<|im_end|>", "b")], load("built-in chatml"))
    tokens = tokenizer.decode_batch([[i] for i in example.input_ids.tolist()])
    content = ["a", "<", "|", "i", "m", "_", "en", "d", "|", ">"]
    assert tokens[:15] == ["<|im_start|>", "user", "\n", *content, "<|im_end|>", "\n"]
    assert tokens[15] == "<|im_start|>" and "".join(tokens[16:-3]) == "assistant"
    assert tokens[-3:] == ["\n", "b", "<|im_end|>"]
    assert [i for i in example.input_ids.tolist() if i in tokenizer.special_tokens.values()] == [1, 2, 1, 2]
    assert example.loss_mask.tolist() == [False] * (len(tokens) - 2) + [True, True]
    assert example.completion_ids[-1] == 2 != tokenizer.eos_id


HOSTILE = ["</s>", "<s>", "<bos>", "<|im_end|>", "<|eot_id|>", "[/INST]", "<end_of_turn>", "### Response:", "{{ 7 }}"]
PIECES = st.sampled_from(
    [*HOSTILE, "a", " ", "\n", "\n\n", "  ", "Paris", "é", "🙂", "1", "\ue0000\ue001", "\x00", "ﬁ"]
)
TEXT = st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(str.strip)


@settings(max_examples=120, deadline=None)
@given(prompt=TEXT, completion=TEXT, wording=st.sampled_from(WORDINGS))
def test_the_trained_tokens_decode_to_the_completion_and_its_end_token(
    prompt: str, completion: str, wording: str, load: Load
) -> None:
    tokenizer, template, _ = load(wording)
    example = only([record(prompt, completion)], load(wording))
    written = completion.strip() if wording in TRIMMING else completion
    written = written.lstrip("\n") if wording == "thinking" else written
    # Mistral's template writes a space before an answer, and so does a model after its generation prompt.
    written = " " + written if wording == "mistral" else written
    trained = example.input_ids[example.loss_mask].tolist()
    assert tokenizer.decode(trained) == written + template.end_token
    assert trained[-1] == tokenizer.special_tokens[template.end_token]
    control = {i for token, i in tokenizer.special_tokens.items() if token != "<unk>"}
    assert not control & set(trained[:-1])
    assert example.completion_ids.tolist() == trained
    if tokenizer.bos_id is not None:
        assert (example.input_ids == tokenizer.bos_id).sum() <= 1


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=3),
    wording=st.sampled_from(["chatml", "llama3", "gemma", "built-in chatml", "alpaca", "plain", "llama2"]),
)
def test_each_answer_of_a_conversation_is_trained_with_its_end_token(
    contents: list[tuple[str, str]], wording: str, load: Load
) -> None:
    tokenizer, template, _ = load(wording)
    conversation = record(*[text for turn in contents for text in turn])
    example = only([conversation], load(wording), train_on="all")
    answers = [answer.strip() if wording in TRIMMING else answer for _, answer in contents]
    trained = example.input_ids[example.loss_mask].tolist()
    assert tokenizer.decode(trained) == "".join(answer + template.end_token for answer in answers)
    last = only([conversation], load(wording), train_on="last")
    assert last.input_ids.tolist() == example.input_ids.tolist()
    assert tokenizer.decode(last.completion_ids.tolist()) == answers[-1] + template.end_token


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT, wording=st.sampled_from(["t5", "t5-alpaca"]))
def test_a_decoder_is_trained_on_the_completion_as_its_tokenizer_reads_it(
    prompt: str, completion: str, wording: str, load: Load
) -> None:
    tokenizer, _, _ = load(wording)
    example = only([record(prompt, completion)], load(wording))
    (alone,) = tokenizer.encode([completion], first=True)
    assert example.completion_ids.tolist() == [*alone, tokenizer.eos_id]
    assert example.loss_mask.tolist() == [False] * len(example.prompt_ids) + [True] * (len(alone) + 1)
    assert example.prompt_ids[-1] == tokenizer.eos_id
    assert not {tokenizer.eos_id, tokenizer.pad_id} & {*example.prompt_ids[:-1].tolist(), *alone}


def test_an_end_token_that_is_also_the_pad_token_is_trained_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.plain_tokenizer(tmp_path))
    template = make_template("plain", tokenizer=tokenizer, encoder_decoder=False)
    example = only([record("a", "b")], (tokenizer, template, False))
    assert tokenizer.pad_id == tokenizer.eos_id == example.input_ids[-1]
    assert example.loss_mask[-1]


@pytest.mark.parametrize("wording", [*WORDINGS, "llama2-first", "llama2-always"])
def test_a_prompt_has_the_ids_that_transformers_gives_its_text(wording: str, load: Load, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if wording in ("llama2-first", "llama2-always"):
        scheme = wording.removeprefix("llama2-")
        folder = tiny.sentencepiece_tokenizer(tmp_path, chat_template=LLAMA2_CHAT, prepend=scheme)
        tokenizer = Tokenizer.load(folder)
        template = make_template("auto", tokenizer=tokenizer, encoder_decoder=False)
    else:
        tokenizer, template, _ = load(wording)
        source = template.chat_template
        if wording.startswith("llama2"):
            folder = tiny.sentencepiece_tokenizer(tmp_path, chat_template=source)
        else:
            folder = tiny.chatml_tokenizer(
                tmp_path, chat_template=source, adds_bos=tokenizer.adds_bos, eos_token=tokenizer.eos_token
            )
    theirs = AutoTokenizer.from_pretrained(folder)
    for prompt in ("Name the capital of France.", " two  spaces\n\nand lines ", "é 🙂 123"):
        ours = only([record(prompt, "yes")], (tokenizer, template, False)).prompt_ids
        ids = theirs.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert ours.tolist() == ids["input_ids"]


LONG = record(" ".join("abcdefghijklmnopqrst"), "A B C")


def test_a_long_prompt_loses_its_middle_and_nothing_else(load: Load) -> None:
    tokenizer = load("plain")[0]
    (item,) = run([LONG], load("plain"), max_length=12, over_length="cut")
    assert item.example is not None and item.truncated and not item.completion_cut
    assert tokenizer.decode(item.example.completion_ids.tolist()) == "A B C<|im_end|>"
    assert len(item.example.input_ids) == 12
    full = only([LONG], load("plain")).prompt_ids.tolist()
    kept = item.example.prompt_ids.tolist()
    head = len(kept) // 2
    assert kept == full[:head] + full[head - len(kept) :]
    assert item.prompt_tokens == len(full) and item.completion_tokens == len(item.example.completion_ids)


def test_an_answer_that_a_cut_takes_a_part_of_is_not_trained_on(load: Load) -> None:
    tokenizer = load("plain")[0]
    words = " ".join("abcdefghij")
    conversation = record("q", "one", words, words, "r", "last")
    whole = only([conversation], load("plain"), train_on="all")
    for max_length in range(10, len(whole.input_ids)):
        (item,) = run([conversation], load("plain"), train_on="all", max_length=max_length, over_length="cut")
        assert item.example is not None and item.truncated
        trained = tokenizer.decode(item.example.input_ids[item.example.loss_mask].tolist())
        answers = trained.removesuffix("<|im_end|>").split("<|im_end|>")
        assert answers[-1] == "last"
        assert set(answers) <= {"one", words, "last"}
        assert item.completion_cut == (len(answers) < 3)


def test_a_completion_that_fits_nowhere_loses_its_end_and_leaves_a_quarter_to_the_prompt(load: Load) -> None:
    tokenizer = load("plain")[0]
    (item,) = run(
        [record("a b c d e", " ".join("abcdefghijklmnopqrst"))], load("plain"), max_length=8, over_length="cut"
    )
    assert item.example is not None and item.truncated and item.completion_cut
    assert len(item.example.input_ids) == 8 and len(item.example.prompt_ids) == 2
    assert item.example.loss_mask.tolist() == [False, False] + [True] * 6
    assert tokenizer.eos_id not in item.example.completion_ids


def test_with_an_encoder_each_side_has_the_limit(load: Load) -> None:
    long = " ".join("abcdefghijklmnopqrst")
    (item,) = run([record(long, long)], load("t5"), max_length=10, over_length="cut")
    assert item.example is not None and item.truncated and item.completion_cut
    assert len(item.example.prompt_ids) == len(item.example.completion_ids) == 10
    assert item.example.prompt_ids[-1] == load("t5")[0].eos_id


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.integers(1, 40),
    completion=st.integers(1, 40),
    max_length=st.integers(8, 60),
    wording=st.sampled_from(["plain", "chatml", "t5"]),
)
def test_a_cut_keeps_the_limit_and_reports_what_it_cut(
    prompt: int, completion: int, max_length: int, wording: str, load: Load
) -> None:
    encoder_decoder = load(wording)[2]
    long = record(" ".join("x" * prompt), " ".join("y" * completion))
    whole = only([long], load(wording), max_length=10_000)
    (item,) = run([long], load(wording), max_length=max_length, over_length="cut")
    assert item.example is not None
    sides = (len(item.example.prompt_ids), len(item.example.completion_ids))
    assert (max(sides) if encoder_decoder else sum(sides)) <= max_length
    assert min(sides) >= 1
    assert (item.prompt_tokens, item.completion_tokens) == (len(whole.prompt_ids), len(whole.completion_ids))
    assert item.truncated == (sides != (item.prompt_tokens, item.completion_tokens))
    assert item.completion_cut == (sides[1] < item.completion_tokens)
    assert item.completion_cut == (item.example.completion_ids[-1] != whole.completion_ids[-1])
    assert item.example.completion_ids.tolist() == whole.completion_ids.tolist()[: sides[1]]


def test_too_long_records_are_listed_or_dropped(load: Load) -> None:
    records = [LONG, record("a", "b", origin="data.jsonl:2"), *[LONG] * 11]
    with pytest.raises(DataError) as caught:
        run(records, load("plain"), max_length=12)
    assert str(caught.value).startswith(
        "data.jsonl:1: found 33 tokens (29 of prompt, 4 of completion); expected at most 12. "
        "Raise data.max_length, or set data.over_length=cut or drop."
    )
    assert str(caught.value).endswith(" The same 11 times more, the last at data.jsonl:1.")
    items = run(records, load("plain"), max_length=12, over_length="drop")
    assert [item.example is None for item in items] == [True, False, *[True] * 11]
    assert not any(item.truncated for item in items)


def test_a_limit_of_the_model_is_not_to_be_raised(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        run(
            [LONG, record("a b c d e f g h", "b", origin="data.jsonl:2")], load("plain"), max_length=8, max_positions=20
        )
    first, second = str(caught.value).splitlines()
    assert first.endswith("expected at most 8, the model having room for 20. Set data.over_length=cut or drop.")
    assert second.endswith("expected at most 8. Raise data.max_length, or set data.over_length=cut or drop.")
    with pytest.raises(DataError, match=r"expected at least one\. Set data\.over_length=cut\.$"):
        run([LONG], load("plain"), max_length=12, max_positions=12, over_length="drop")


def test_records_without_a_token_to_train_on_are_refused(load: Load) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1 and 1 more: found no token to train on within 12 tokens"):
        run([LONG, LONG], load("plain"), max_length=12, over_length="drop")
    assert run([], load("plain")) == []


def test_refused_conversations_are_counted_with_the_first_and_the_last_of_them(load: Load) -> None:
    messages = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    refused = [Record(origin, "task", origin, messages) for origin in ("rows.csv:7", "rows.csv:9")]
    with pytest.raises(DataError) as caught:
        run([refused[0], record("q", "a"), refused[1]], load("gemma"))
    assert str(caught.value).startswith("rows.csv:7: chat template: found TemplateError (System role")
    assert str(caught.value).endswith(" The same at rows.csv:9.")


def test_many_records_come_out_in_order(load: Load) -> None:
    records = [record(f"q {i}", f"a {i}", origin=f"f:{i}") for i in range(300)]
    items = run(records, load("chatml"))
    assert [item.record.origin for item in items] == [f"f:{i}" for i in range(300)]
    one_by_one = [only([each], load("chatml")) for each in records]
    assert all(
        item.example is not None and item.example.input_ids.tolist() == alone.input_ids.tolist()
        for item, alone in zip(items, one_by_one, strict=True)
    )


def test_a_preview_shows_each_token_and_whether_it_is_trained(load: Load) -> None:
    tokenizer, template, _ = load("plain")
    tokens = preview(record("a", "b"), tokenizer=tokenizer, template=template, train_on="all", encoder_decoder=False)
    assert [(token.text, token.trained) for token in tokens] == [
        ("a", False),
        ("\n", False),
        ("b", True),
        ("<|im_end|>", True),
    ]
    assert tokens[-1].id == tokenizer.eos_id
    # A character of several tokens stands whole, once.
    tokens = preview(record("а", "红🙂"), tokenizer=tokenizer, template=template, train_on="all", encoder_decoder=False)
    assert "".join(token.text for token in tokens) == "а\n红🙂<|im_end|>"
    assert len(tokens) > 5


def test_the_cache_key_follows_whatever_changes_the_tokens(load: Load) -> None:
    tokenizer, template, _ = load("chatml")
    facts: dict[str, Any] = {
        "data_sha256": "0" * 64,
        "tokenizer": tokenizer,
        "template": template,
        "train_on": "all",
        "max_length": 512,
        "over_length": "cut",
        "encoder_decoder": False,
    }
    others: list[dict[str, Any]] = [
        {"data_sha256": "1" * 64},
        {"tokenizer": load("llama2")[0]},
        {"template": load("alpaca")[1]},
        {"train_on": "last"},
        {"max_length": 513},
        {"over_length": "drop"},
        {"encoder_decoder": True},
    ]
    keys = {token_cache_key(**facts), *(token_cache_key(**{**facts, **other}) for other in others)}
    assert len(keys) == 1 + len(others)
    assert token_cache_key(**facts) in keys and all(len(key) == 16 for key in keys)
