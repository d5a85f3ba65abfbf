"""What a model reads before a question: exemplars in the very wording of training, as many as its positions hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from keeptune.data.record import Message, Record
from keeptune.text.shots import Room, Shown, _Renderer, with_exemplars
from keeptune.text.template import Template, TemplateName, make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example, tokenize
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Setting = tuple[Tokenizer, Template, bool]
Load = Callable[[str], Setting]
# It writes the last exchange alone, as no real template should.
LAST_ALONE = (
    "{% for m in (messages[-2:] if messages[-1].role == 'assistant' else messages[-1:]) %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[str, Setting] = {}

    def setting(wording: str) -> Setting:
        if wording not in made:
            made[wording] = _make(wording, tmp_path_factory.mktemp(wording))
        return made[wording]

    return setting


def _make(wording: str, folder: Path) -> Setting:
    names: dict[str, TemplateName] = {"plain": "plain", "alpaca": "alpaca", "chatml": "chatml"}
    if wording.startswith("t5-"):
        tokenizer = Tokenizer.load(tiny.t5_tokenizer(folder))
        return tokenizer, make_template(names[wording[3:]], tokenizer=tokenizer, encoder_decoder=True), True
    if wording == "llama2-alpaca":
        tokenizer = Tokenizer.load(tiny.sentencepiece_tokenizer(folder))
        return tokenizer, make_template("alpaca", tokenizer=tokenizer, encoder_decoder=False), False
    source = {**tiny.TEMPLATES, "last-alone": LAST_ALONE}.get(wording.removesuffix("-chat"))
    adds_bos = wording.endswith("-bos")
    tokenizer = Tokenizer.load(
        tiny.chatml_tokenizer(
            folder,
            chat_template=source if wording.endswith("-chat") else None,
            adds_bos=adds_bos,
            eos_token="<|im_end|>",
        )
    )
    name = names.get(wording.removesuffix("-bos"), "chat")
    return tokenizer, make_template(name, tokenizer=tokenizer, encoder_decoder=False), False


def record(*contents: str, system: str = "", input: str = "") -> Record:
    turns = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    turns[0] = Message("user", contents[0], input)
    messages = ([Message("system", system)] if system else []) + turns
    return Record("-".join(contents), "t", "made:1", tuple(messages))


ONE, TWO, THREE = record("one?", "1"), record("two?", "2"), record("three?", "3")


def shown(
    setting: Setting,
    questions: Sequence[Record],
    exemplars: Sequence[Record],
    *,
    max_positions: int | None = None,
    max_new_tokens: int = 1,
    max_length: int = 10_000,
) -> list[Shown]:
    tokenizer, template, encoder_decoder = setting
    items = tokenize(
        questions,
        template=template,
        train_on="last",
        max_length=max_length,
        over_length="cut",
        encoder_decoder=encoder_decoder,
    )
    examples = [item.example for item in items if item.example is not None]
    room = Room(max_new_tokens, max_positions, encoder_decoder)
    chosen = [list(exemplars)] * len(questions)
    return list(with_exemplars(questions, examples, chosen, tokenizer=tokenizer, template=template, room=room))


def prompt_of(setting: Setting, question: Record, *exemplars: Record) -> str:
    (item,) = shown(setting, [question], exemplars)
    assert (item.num_shown, item.refusal) == (len(exemplars), "")
    return setting[0].decode(item.example.prompt_ids.tolist(), first=True)


def trained_ids(setting: Setting, one: Record) -> list[int]:
    (item,) = shown(setting, [one], [])
    return item.example.input_ids.tolist()


def test_chatml_shows_exemplars_as_earlier_turns_and_the_questions_own_system_message_first(load: Load) -> None:
    question = record("four?", "4", system="Be brief.")
    assert prompt_of(load("chatml"), question, record("one?", "1", system="Be long."), TWO) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nfour?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "system" not in prompt_of(load("chatml"), ONE, record("one?", "1", system="Be long."))


def test_a_chat_template_writes_them_as_it_writes_a_conversation(load: Load) -> None:
    assert prompt_of(load("llama3-chat"), TWO, ONE) == (
        "<bos><|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt_of(load("mistral-chat"), TWO, ONE) == "<bos>[INST] one? [/INST] 1<|im_end|>[INST] two? [/INST]"


def test_a_template_that_rewrites_earlier_answers_still_prompts(load: Load) -> None:
    assert prompt_of(load("thinking-chat"), TWO, ONE) == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("wording", ["alpaca", "alpaca-bos"])
def test_alpaca_shows_each_exemplar_whole_as_in_training_and_bos_once(wording: str, load: Load) -> None:
    setting = load(wording)
    bos = "<bos>" if wording.endswith("-bos") else ""
    with_input = record("add.", "3", input="1 2")
    assert prompt_of(setting, TWO, with_input, ONE) == (
        f"{bos}Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nadd.\n\n### Input:\n1 2\n\n"
        f"### Response:3<|im_end|>\n\n{ALPACA}\n\n### Instruction:\none?\n\n### Response:1<|im_end|>\n\n"
        f"{ALPACA}\n\n### Instruction:\ntwo?\n\n### Response:"
    )


def test_plain_shows_prompt_and_answer_on_lines_of_their_own(load: Load) -> None:
    assert prompt_of(load("plain"), THREE, ONE, TWO) == "one?\n1<|im_end|>\n\ntwo?\n2<|im_end|>\n\nthree?\n"
    assert prompt_of(load("plain-bos"), TWO, ONE) == "<bos>one?\n1<|im_end|>\n\ntwo?\n"


def test_an_encoder_reads_prompts_and_answers_on_lines_of_their_own_with_one_end_token(load: Load) -> None:
    setting = load("t5-plain")
    tokenizer = setting[0]
    (item,) = shown(setting, [THREE], [ONE, TWO])
    text = tokenizer.encode(["one?\n1\n\ntwo?\n2\n\nthree?"], first=True)[0]
    assert item.example.prompt_ids.tolist() == [*text, tokenizer.eos_id]
    assert item.example.completion_ids.tolist() == [*tokenizer.encode(["3"], first=True)[0], tokenizer.eos_id]
    alpaca = load("t5-alpaca")
    text = (
        f"{ALPACA}\n\n### Instruction:\none?\n\n### Response:\n1\n\n{ALPACA}\n\n### Instruction:\ntwo?\n\n### Response:"
    )
    (item,) = shown(alpaca, [TWO], [ONE])
    assert item.example.prompt_ids.tolist() == [*alpaca[0].encode([text], first=True)[0], alpaca[0].eos_id]


@pytest.mark.parametrize("wording", ["chatml", "llama3-chat", "alpaca", "alpaca-bos", "plain", "llama2-alpaca"])
def test_the_first_exemplars_tokens_are_the_very_tokens_of_training(wording: str, load: Load) -> None:
    setting = load(wording)
    (item,) = shown(setting, [TWO], [ONE])
    trained = trained_ids(setting, ONE)
    assert item.example.input_ids[: len(trained)].tolist() == trained
    bos = setting[0].bos_id
    assert item.example.input_ids.tolist().count(bos) <= 1


@pytest.mark.parametrize("wording", ["chatml", "thinking-chat", "alpaca", "plain", "t5-plain", "t5-alpaca"])
def test_without_exemplars_the_prompt_is_the_records_own(wording: str, load: Load) -> None:
    _, template, pairs = setting = load(wording)
    (item,) = shown(setting, [ONE], [])
    arguments = {"template": template, "encoder_decoder": pairs}
    (whole,) = tokenize([ONE], **arguments, train_on="last", max_length=99, over_length="error")
    assert item.num_shown == 0 and whole.example is not None
    assert item.example.input_ids.tolist() == whole.example.input_ids.tolist()


def test_a_conversation_is_shown_with_all_of_its_turns_and_asked_with_all_but_the_last_answer(load: Load) -> None:
    question = record("a?", "b", "c?", "d")
    assert prompt_of(load("chatml"), question, record("e?", "f", "g?", "h")) == (
        "<|im_start|>user\ne?<|im_end|>\n<|im_start|>assistant\nf<|im_end|>\n"
        "<|im_start|>user\ng?<|im_end|>\n<|im_start|>assistant\nh<|im_end|>\n"
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_does_not_fit_is_left_out_whole_and_from_the_front(load: Load) -> None:
    setting = load("plain")
    exemplars = [ONE, TWO, record("a much longer question than the others?", "4")]
    lengths = [len(shown(setting, [THREE], exemplars[-n:] if n else [])[0].example.prompt_ids) for n in range(4)]
    for n in range(4):
        for new_tokens, positions in ((5, lengths[n] + 5), (5, lengths[n] + 4)):
            (item,) = shown(setting, [THREE], exemplars, max_positions=positions, max_new_tokens=new_tokens)
            fitting = n if positions == lengths[n] + 5 else max(0, n - 1)
            assert item.num_shown == fitting
            assert len(item.example.prompt_ids) == lengths[fitting]
            assert item.example.completion_ids.tolist() == trained_ids(setting, THREE)[lengths[0] :]


def test_how_many_fit_is_found_in_few_looks(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = load("plain")
    exemplars = [record(f"question {i}?", str(i)) for i in range(200)]
    length = len(shown(setting, [THREE], exemplars[-9:])[0].example.prompt_ids)
    looks = []
    prompts = _Renderer.prompts
    monkeypatch.setattr(
        _Renderer, "prompts", lambda self, asked, **rest: looks.append(1) or prompts(self, asked, **rest)
    )
    (item,) = shown(setting, [THREE], exemplars, max_positions=length + 5, max_new_tokens=5)
    # The record's own prompt, all 200, and at most eight halvings.
    assert item.num_shown == 9 and len(looks) <= 10


def test_the_reference_has_room_too_where_it_is_longer_than_an_answer_may_be(load: Load) -> None:
    setting = load("plain")
    question = record("three?", "one two three four five six seven eight nine ten")
    (whole,) = shown(setting, [question], [ONE])
    total = len(whole.example.input_ids)
    for positions, fitting in ((total, 1), (total - 1, 0)):
        assert shown(setting, [question], [ONE], max_positions=positions)[0].num_shown == fitting


def test_of_an_encoder_the_prompt_alone_must_fit(load: Load) -> None:
    setting = load("t5-plain")
    (whole,) = shown(setting, [TWO], [ONE])
    length = len(whole.example.prompt_ids)
    for positions, fitting in ((length, 1), (length - 1, 0)):
        (item,) = shown(setting, [TWO], [ONE], max_positions=positions, max_new_tokens=length)
        assert item.num_shown == fitting


@pytest.mark.parametrize("wording", ["chatml", "alpaca", "plain", "t5-plain"])
def test_what_the_length_policy_cut_out_of_a_prompt_stays_cut_out_behind_exemplars(wording: str, load: Load) -> None:
    setting = load(wording)
    words = " ".join("abcdefghijklmnopqrstuvwxyz" * 4)
    question = record(words, "z")
    own = len(shown(setting, [question], [])[0].example.prompt_ids)
    limit = own - 30
    (alone,) = shown(setting, [question], [], max_length=limit)
    (behind,) = shown(setting, [question], [ONE, TWO], max_length=limit)
    (whole,) = shown(setting, [question], [ONE, TWO])
    assert behind.num_shown == 2
    cut = own - len(alone.example.prompt_ids)
    assert cut >= 30 and len(whole.example.prompt_ids) - len(behind.example.prompt_ids) == cut
    # The same head and tail of the question as without exemplars.
    tail = len(alone.example.prompt_ids) // 2
    assert behind.example.prompt_ids[-tail:].tolist() == alone.example.prompt_ids[-tail:].tolist()
    start = len(whole.example.prompt_ids) - own
    head = alone.example.prompt_ids[tail - 10 : tail - 2].tolist()
    assert behind.example.prompt_ids[start + tail - 10 : start + tail - 2].tolist() == head
    assert behind.example.completion_ids.tolist() == alone.example.completion_ids.tolist()


def test_a_template_that_leaves_turns_out_refuses_and_the_record_keeps_its_own_prompt(load: Load) -> None:
    setting = load("last-alone-chat")
    first, second = shown(setting, [TWO, THREE], [ONE])
    assert (first.num_shown, second.num_shown) == (0, 0)
    assert "found the user message 1 of a conversation left out" in first.refusal
    assert first.example.input_ids.tolist() == trained_ids(setting, TWO)


def test_many_records_keep_their_order_and_masks(load: Load) -> None:
    setting = load("plain")
    questions = [record(f"number {i}?", str(i)) for i in range(300)]
    items = shown(setting, questions, [ONE])
    for question, item in zip(questions, items, strict=True):
        assert setting[0].decode(item.example.prompt_ids.tolist()).endswith(f"\n\n{question.messages[0].content}\n")
        assert item.example.completion_start == len(item.example.prompt_ids)
        assert setting[0].decode(item.example.completion_ids[:-1].tolist()) == question.completion
        assert isinstance(item.example, Example) and item.example.input_ids.dtype == np.int32
