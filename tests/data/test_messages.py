"""What a message has beside its content: thoughts, tool calls, weights. Each is read, refused, or counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from keeptune.data.formats import RowProblem, columns_read, to_record
from keeptune.data.messages import unread_fields
from keeptune.data.record import Message, Record, record_from_json, record_id, record_to_json
from keeptune.data.source import Row

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": '{"thing": "é"}'}}
READ_CALL = '[{"id": "call00001", "type": "function", "function": {"name": "find", "arguments": {"thing": "é"}}}]'
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def record(*turns: dict[str, Any], **columns: Any) -> Record:
    row = Row({"messages": list(turns), **columns}, "f.jsonl:7", None)
    return to_record(row, task="t", columns=None, instruction=None)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_read_by_each_of_their_names(key: str) -> None:
    assert record(USER, {**ANSWER, key: "why"}).messages[-1] == Message("assistant", "a", reasoning="why")
    assert record(USER, {**ANSWER, key: None}).messages[-1] == Message("assistant", "a")


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": json.loads(READ_CALL)[0]["function"]}],
        },
    ],
)
def test_tool_calls_are_functions_with_objects_for_arguments(turn: dict[str, Any]) -> None:
    told = {"role": "tool", "tool_call_id": "call00001", "name": "find", "content": "red"}
    found = record(USER, turn, told, ANSWER)
    assert found.messages[1] == Message("assistant", "", tool_calls=READ_CALL)
    assert found.messages[2] == Message("tool", "red", tool_call_id="call00001", name="find")
    assert found.prompt == f"q\n{READ_CALL}\nred"
    assert record(USER, turn).completion == READ_CALL


def test_the_calls_of_other_formats_are_the_same() -> None:
    bare = '[{"type": "function", "function": {"name": "find", "arguments": {"thing": "é"}}}]'
    call = {"name": "find", "arguments": {"thing": "é"}}
    assert record(USER, {"role": "assistant", "function_call": call}).messages[-1].tool_calls == bare
    sharegpt = record({"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)})
    assert sharegpt.messages[-1] == Message("assistant", "", tool_calls=bare)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]])
def test_the_functions_of_a_row_are_its_tools(tools: Any) -> None:
    assert json.loads(record(USER, ANSWER, tools=tools).tools) == [TOOL]
    assert json.loads(record(USER, ANSWER, functions=tools).tools) == [TOOL]


def test_a_column_of_that_name_with_something_else_is_not_read() -> None:
    value = {"messages": [USER, ANSWER], "tools": "a hammer"}
    assert record(USER, ANSWER, tools="a hammer").tools == ""
    assert "tools" not in columns_read(value, None)
    assert "tools" in columns_read({**value, "tools": [TOOL]}, None)


@pytest.mark.parametrize(
    "untrained",
    [
        *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"trainable": False}),
        *({"train_on_turn": False}, {"loss": False}, {"loss": 0}, {"loss_weight": 0.0}, {"loss_mask": 0}),
    ],
)
def test_a_turn_of_no_weight_is_read_and_not_trained_on(untrained: dict[str, Any]) -> None:
    wrong = {**ANSWER, **untrained}
    assert [m.trained for m in record(USER, wrong, USER, {**ANSWER, "weight": 1}).messages] == [True, False, True, True]
    # No target depends on what comes after the last answer that is trained on.
    assert len(record(USER, ANSWER, {**USER, "weight": None}, wrong).messages) == 2
    with pytest.raises(RowProblem, match="found no assistant message with a weight above 0"):
        record(USER, wrong)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER, {**ANSWER, "weight": 0.5}], r"found weight: 0\.5 in messages\[1\]; expected 0 or 1"),
        ([{**USER, "train": True}, ANSWER], r"found train: True for the role user in messages\[0\]"),
        ([{**USER, "reasoning": "why"}, ANSWER], r"found thoughts of the role user in messages\[0\]"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], r"found tool calls in messages\[1\] without"),
        ([USER, {"role": "assistant", "tool_calls": ["f()"]}], r"found tool calls in messages\[1\] without"),
        ([{**USER, "images": ["a.png"]}, ANSWER], r"found a field 'images' in messages\[0\]"),
        ([USER, {**ANSWER, "reasoning_content": ["why"]}], r"found a list in messages\[1\]\.reasoning_content"),
    ],
)
def test_what_cannot_be_meant_is_refused(turns: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        record(*turns)


def test_other_fields_are_counted_by_their_names() -> None:
    value = {"messages": [{**USER, "mood": "glad", "id": 7, "refusal": None}, ANSWER], "mood": "glad"}
    assert unread_fields(value, columns=["messages"]) == {"messages[].mood"}
    told = {"messages": [USER, {**ANSWER, "learn": False, "image": False}], "tools": [TOOL]}
    assert unread_fields(told, columns=["messages", "tools"]) == {"messages[].learn"}


def test_every_field_comes_back_from_a_line_and_is_part_of_the_id() -> None:
    full = record(
        USER,
        {**ANSWER, "weight": 0},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning": "why"},
        {"role": "tool", "content": "red", "tool_call_id": "call00001", "name": "find"},
        {**ANSWER, "thinking": "because"},
        tools=[TOOL],
    )
    assert record_from_json(json.loads(json.dumps(record_to_json(full))), where="x") == full
    plain = record(USER, ANSWER)
    assert record_to_json(plain) == {"id": plain.id, "task": "t", "origin": "f.jsonl:7", "messages": [USER, ANSWER]}
    # The id of a record without such fields is what it was before there were any.
    assert plain.id == "14949532efe9ac29" == record_id("t", plain.messages)
    others = [record(USER, {**ANSWER, "reasoning": "why"}), record(USER, ANSWER, tools=[TOOL]), full]
    assert len({plain.id, *(other.id for other in others)}) == 4
