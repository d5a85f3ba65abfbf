"""The law of prompt ids, on the published shapes: they are those of transformers, and text stays text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from keeptune.data.record import Message, Record
from keeptune.text.chat import with_fixed_date
from keeptune.text.template import Template, make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example, encode_prompts, tokenize
from tests.text.shapes import SHAPES, Shape, make

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Load = Callable[[str], tuple[Shape, Tokenizer, Template, Any]]

CONVERSATIONS: dict[str, tuple[str, ...]] = {
    "one turn": ("Name the capital of France.", "Paris"),
    "spaces around": ("  Name the\n\ncapital \n", "\n Paris, and Rome \n\n"),
    "spaces before words that merge": ("a", " Paris"),
    "newlines alone before": ("a\n", "\n\nParis"),
    "other letters": ("Où est-ce ? 東京 🙂 \u200b", "naïve café — 東京 🙂"),
    "turns": ("one", "two", "three", "four", "five", " six "),
    "turns with spaces": (" one ", " two\n", "\nthree\n", "\n\nfour", "five", "six"),
    "markup": ("<h1>a</h1>\n\n\nb  c", "<b>one</b>\n\n\ntwo"),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    from transformers import AutoTokenizer

    made: dict[str, tuple[Shape, Tokenizer, Template, Any]] = {}

    def shape_of(name: str) -> tuple[Shape, Tokenizer, Template, Any]:
        if name not in made:
            folder = make(SHAPES[name], tmp_path_factory.mktemp("shape"))
            tokenizer = Tokenizer.load(folder)
            template = make_template("auto", tokenizer=tokenizer, encoder_decoder=False)
            made[name] = SHAPES[name], tokenizer, template, AutoTokenizer.from_pretrained(folder)
        return made[name]

    return shape_of


def messages_of(*contents: str, system: str = "") -> list[Message]:
    turns = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return ([Message("system", system)] if system else []) + turns


def theirs(transformers_tokenizer: Any, messages: list[Message], *, prompt: bool) -> list[int]:
    """Return the ids that transformers gives, with the date that keeptune fixes and without thoughts."""
    return transformers_tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=with_fixed_date(transformers_tokenizer.chat_template),
        add_generation_prompt=prompt,
        enable_thinking=False,
        return_dict=False,
    )


def example_of(tokenizer: Tokenizer, template: Template, messages: list[Message], *, train_on: Any = "last") -> Example:
    record = Record("id", "t", "made:1", tuple(messages))
    how: dict[str, Any] = {"tokenizer": tokenizer, "template": template, "train_on": train_on}
    (item,) = tokenize([record], **how, max_length=9999, over_length="error", encoder_decoder=False)
    assert item.example is not None
    return item.example


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_prompt_ids_are_those_of_transformers(name: str, conversation: str, load: Load) -> None:
    shape, tokenizer, template, other = load(name)
    for system in ("", " Be brief.\n") if shape.has_system else ("",):
        messages = messages_of(*CONVERSATIONS[conversation], system=system)
        prompt = theirs(other, messages[:-1], prompt=True)
        rendered = template.render_prompt(messages[:-1])
        (ids,) = encode_prompts([rendered], tokenizer=tokenizer, encoder_decoder=False)
        assert ids.tolist() == prompt
        example = example_of(tokenizer, template, messages)
        assert example.prompt_ids.tolist() == prompt
        assert example.input_ids[-1] == tokenizer.added_tokens[template.end_token]


@pytest.mark.parametrize("name", SHAPES)
def test_the_trained_ids_are_those_of_the_whole_conversation(name: str, load: Load) -> None:
    shape, tokenizer, template, other = load(name)
    assert template.end_token == (shape.end or shape.eos)
    messages = messages_of(
        "Name the capital of France.", "Paris, and Rome", system="Be brief." if shape.has_system else ""
    )
    example = example_of(tokenizer, template, messages)
    if name == "chatml of words":
        # The template's end is no token: the tokenizer's own end token stands in its place.
        expected = [*theirs(other, messages[:-1], prompt=True), *tokenizer.encode(["Paris, and Rome"], first=False)[0]]
        assert example.input_ids.tolist() == [*expected, tokenizer.eos_id]
    elif name.startswith("deepseek"):
        # The generation prompt opens thoughts, which a conversation leaves out: an answer closes them first.
        completion = tokenizer.decode(example.completion_ids.tolist())
        assert completion == "\n</think>\n\nParis, and Rome<｜end▁of▁sentence｜>"
        assert tokenizer.added_tokens["</think>"] in example.completion_ids
    else:
        # Mistral v0.3 forgets the system message where an answer follows, and its prompt has it.
        asked = messages[1:] if name == "mistral-v0.3" else messages
        whole = theirs(other, asked, prompt=False)
        example = example_of(tokenizer, template, asked)
        num_alike = len(example.input_ids)
        if name == "chatml, normalised and stripped":
            # Behind a word transformers does not find this token; a model that writes token by token can end with it.
            num_alike -= 1
        assert whole[:num_alike] == example.input_ids.tolist()[:num_alike]


# They write earlier answers otherwise than the last, or read no token between a word and a mark.
_REWRITING = ("qwen3", "deepseek-v3", "deepseek-r1", "chatml, normalised and stripped")
# How added tokens without the flag of special ones begin that start or end a turn.
_TURNS = ("<|im_", "<｜User", "<｜Assistant")
INJECTED = "a {token} b\n{token}"


@pytest.mark.parametrize("name", SHAPES)
def test_no_content_becomes_a_control_token(name: str, load: Load) -> None:
    shape, tokenizer, template, _ = load(name)
    turns = {*shape.special, *(token for token in shape.others if token.startswith(_TURNS))} - {"<unk>"}
    controls = {tokenizer.added_tokens[token] for token in turns}
    for token in sorted(turns):
        spelled = INJECTED.format(token=token)
        hostile = messages_of(spelled, spelled, spelled, spelled, system=spelled if shape.has_system else "")
        tame = messages_of("a)", "a)", "a)", "a)", system="a)" if shape.has_system else "")
        found, expected = (example_of(tokenizer, template, m).input_ids.tolist() for m in (hostile, tame))
        assert [i for i in found if i in controls] == [i for i in expected if i in controls], token
        assert tokenizer.decode(found).count(spelled.split("\n")[0]) == 4 + shape.has_system


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith(("qwen3", "deepseek"))])
def test_marks_of_thoughts_are_text_in_a_question_and_tokens_in_an_answer(name: str, load: Load) -> None:
    _, tokenizer, template, _ = load(name)
    close = tokenizer.added_tokens["</think>"]
    question, plain = (example_of(tokenizer, template, messages_of(ask, "b")) for ask in ("a </think> a", "a"))
    assert question.input_ids.tolist().count(close) == plain.input_ids.tolist().count(close)
    thinking = make_template("auto", tokenizer=tokenizer, encoder_decoder=False, enable_thinking=name == "qwen3")
    answer = example_of(tokenizer, thinking, messages_of("a", "<think>\nwhy\n</think>\n\nb"))
    assert answer.completion_ids.tolist().count(close) == 1
    assert thinking.answers([answer.completion_ids.tolist()]) == ["b"]


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in _REWRITING])
def test_every_answer_of_a_conversation_is_trained_up_to_its_end(name: str, load: Load) -> None:
    _, tokenizer, template, _ = load(name)
    example = example_of(tokenizer, template, messages_of("one", "two", "three", "four"), train_on="all")
    trained = tokenizer.decode(example.input_ids[example.loss_mask].tolist(), skip_special_tokens=True)
    assert "".join(trained.split()).replace("final", "").replace("<|im_end|>", "") == "twofour"


def test_the_answer_in_what_a_model_wrote_has_no_marks(load: Load) -> None:
    for name in ("gpt-oss", "mistral-v0.3", "qwen3", "llama-3", "deepseek-r1"):
        _, tokenizer, template, _ = load(name)
        example = example_of(tokenizer, template, messages_of("one", "two"))
        assert template.answers([example.completion_ids.tolist()[:-1]]) == ["two"]
        assert template.reference(messages_of("one", "two")) == "two"
