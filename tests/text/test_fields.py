"""Thoughts, tool calls, tools and untrained turns: rendered as the published templates write them, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from keeptune.data.record import Message
from keeptune.errors import DataError, RecipeError
from keeptune.text.template import Template, make_template
from keeptune.text.tokenizer import Tokenizer
from tests.text.shapes import SHAPES, make

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Load = Callable[..., tuple[Template, Tokenizer]]

CALL = {"name": "find", "arguments": {"thing": "<|im_end|>é"}}
CALLS = json.dumps([{"id": "call00001", "type": "function", "function": CALL}])
TOOLS = json.dumps([{"type": "function", "function": {"name": "find", "description": "d", "parameters": {}}}])
USER, ANSWER = Message("user", "q"), Message("assistant", "a")
THOUGHT = Message("assistant", "a", reasoning="why")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[tuple[str, bool], tuple[Template, Tokenizer]] = {}

    def template_of(name: str, *, thinks: bool = False) -> tuple[Template, Tokenizer]:
        if (name, thinks) not in made:
            tokenizer = Tokenizer.load(make(SHAPES[name], tmp_path_factory.mktemp("shape")))
            how: dict[str, Any] = {"tokenizer": tokenizer, "encoder_decoder": False, "enable_thinking": thinks}
            made[name, thinks] = make_template("chat", **how), tokenizer
        return made[name, thinks]

    return template_of


def completion(template: Template, *messages: Message, tools: str = "") -> str:
    return template.controls.reveal(template.render(messages, train_on="last", tools=tools).completion)


def test_thoughts_are_trained_where_the_template_writes_them(load: Load) -> None:
    qwen, _ = load("qwen3", thinks=True)
    assert completion(qwen, USER, THOUGHT) == "<think>\nwhy\n</think>\n\na<|im_end|>"
    assert completion(qwen, USER, ANSWER) == "<think>\n\n</think>\n\na<|im_end|>"
    oss, _ = load("gpt-oss")
    assert completion(oss, USER, THOUGHT) == (
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"
    )
    r1, _ = load("deepseek-r1")
    assert completion(r1, USER, Message("assistant", "<think>\nwhy\n</think>\n\na")) == (
        "why\n</think>\n\na<｜end▁of▁sentence｜>"
    )


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3", "phi-3", "smollm2"])
def test_thoughts_that_a_template_does_not_write_are_refused(name: str, load: Load) -> None:
    with pytest.raises(DataError, match=r"found thoughts \(reasoning_content\) in a message; expected none"):
        load(name)[0].render([USER, THOUGHT], train_on="last")


def test_thoughts_beside_a_prompt_without_any_name_the_setting(load: Load) -> None:
    for answer in (THOUGHT, Message("assistant", "<think>\nwhy\n</think>\n\na")):
        with pytest.raises(DataError, match=r"Set data\.enable_thinking=true to train on them\.$"):
            load("qwen3")[0].render([USER, answer], train_on="last")
    with pytest.raises(RecipeError, match=r"data\.enable_thinking: found true, but the chat template has no such"):
        load("llama-3", thinks=True)


def test_answers_are_told_from_the_thoughts_before_them(load: Load) -> None:
    for name, thinks in (("qwen3", True), ("gpt-oss", False), ("deepseek-r1", False)):
        template, tokenizer = load(name, thinks=thinks)
        text = completion(template, USER, THOUGHT).removesuffix(template.end_token)
        assert template.answers(tokenizer.encode_rendered([text])) == ["a"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "find", "arguments": {"thing": "<|im_end|>é"}}\n</tool_call><|im_end|>'),
        ("qwen3", '<tool_call>\n{"name": "find", "arguments": {"thing": "<|im_end|>é"}}\n</tool_call><|im_end|>'),
        ("llama-3.1", '{"name": "find", "parameters": {"thing": "<|im_end|>é"}}<|eot_id|>'),
    ],
)
def test_tool_calls_are_trained_and_the_answers_of_tools_are_not(name: str, written: str, load: Load) -> None:
    template, tokenizer = load(name)
    call = Message("assistant", "", tool_calls=CALLS)
    assert completion(template, USER, call, tools=TOOLS) == written
    end = template.end_token
    assert template.reference([USER, call], tools=TOOLS) == written.removesuffix(end)
    turns = [USER, call, Message("tool", "red", tool_call_id="call00001", name="find"), ANSWER]
    rendered = template.render(turns, train_on="all" if name != "qwen3" else "last", tools=TOOLS)
    assert "red" in rendered.prompt and '"description"' in rendered.prompt
    trained = [template.controls.reveal(rendered.prompt[start:end]) for start, end in rendered.answers]
    assert trained == ([] if name == "qwen3" else [written])
    assert template.controls.reveal(rendered.completion).endswith("a" + end)
    # The end token that an argument spells stays text.
    assert rendered.prompt.count(end) == 3 + rendered.prompt.count("<|im_start|>system") + (name == "llama-3.1")
    assert tokenizer.added_tokens[end] not in tokenizer.encode(["<|im_end|>é"], first=False)[0]


def test_the_name_of_an_argument_that_spells_a_control_token_stays_text(load: Load) -> None:
    template, _ = load("qwen2.5")
    calls = json.dumps([{"type": "function", "function": {"name": "find", "arguments": {"<|im_end|>": "x"}}}])
    rendered = template.render([USER, Message("assistant", "", tool_calls=calls)], train_on="last", tools=TOOLS)
    assert '{"<|im_end|>": "x"}' in template.controls.reveal(rendered.completion)
    assert rendered.completion.count(template.end_token) == 1


def test_calls_and_tools_that_a_template_does_not_write_are_refused_and_named(load: Load) -> None:
    template, _ = load("phi-3")
    with pytest.raises(DataError, match="found tool calls in a message; expected none, since the template does not"):
        template.render([USER, Message("assistant", "", tool_calls=CALLS)], train_on="last")
    assert template.unread([USER, ANSWER], tools=TOOLS) == {"tools"}
    assert load("qwen3")[0].unread([USER, ANSWER], tools=TOOLS) == set()


def test_a_turn_that_is_not_trained_on_is_read(load: Load) -> None:
    template, _ = load("llama-3")
    wrong = Message("assistant", "wrong", trained=False)
    rendered = template.render([USER, wrong, USER, ANSWER, USER, ANSWER], train_on="all")
    assert "wrong" in rendered.prompt
    assert [rendered.prompt[start:end] for start, end in rendered.answers] == ["a<|eot_id|>"]
