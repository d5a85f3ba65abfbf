"""Rows of every known format become the same records; a row that is none says why, under a stable name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.formats import RowProblem, to_record
from keeptune.data.record import Message, Record, record_from_json, record_to_json
from keeptune.data.source import Row, read_rows

SHARED = Path(__file__).resolve().parents[3] / "shared"
DIALOGUE = {"fname": "dev_0", "dialogue": "#A: Hi.", "summary": "A greets."}
COLUMNS = {"prompt": "dialogue", "completion": "summary"}
ASK, TELL = Message("user", "Ask?"), Message("assistant", "Tell.")
quick = settings(max_examples=150, deadline=None)


def record(value: dict[str, Any], **settings: Any) -> Record:
    options = {"task": "t", "columns": None, "instruction": None, **settings}
    return to_record(Row(value, "f.jsonl:7", None), **options)


def messages(value: dict[str, Any], **settings: Any) -> list[Message]:
    return list(record(value, **settings).messages)


def refusal(value: dict[str, Any], **settings: Any) -> tuple[str, str]:
    with pytest.raises(RowProblem) as caught:
        record(value, **settings)
    return caught.value.reason, str(caught.value)


# Tables: each format


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "Ask?", "output": "Tell."},
        {"instruction": "Ask?", "input": "", "output": "Tell.", "history": [], "system": ""},
        {"instruction": "Ask?", "input": None, "output": "Tell.", "history": None, "system": None},
        {"instruction": "", "input": "Ask?", "output": "Tell."},
        {"messages": [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Tell."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "As"}, {"type": "text", "text": "k?"}]},
                {"role": "assistant", "content": "Tell.", "tool_calls": None},
            ]
        },
        {"conversations": [{"from": "human", "value": "Ask?"}, {"from": "gpt", "value": "Tell."}]},
        {"conversations": [{"from": "User", "value": "Ask?"}, {"from": "Assistant", "value": "Tell."}]},
        {"conversations": [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Tell."}]},
        {"prompt": "Ask?", "completion": "Tell."},
        {"prompt": [{"role": "user", "content": "Ask?"}], "completion": [{"role": "assistant", "content": "Tell."}]},
        {"prompt": [{"role": "user", "content": "Ask?"}], "completion": "Tell."},
        {"inputs": "Ask?", "targets": "Tell.", "task": "other", "id": 3},
        {"messages": None, "prompt": "Ask?", "completion": "Tell."},
        {
            "prompt": "Ask?",
            "prompt_id": "x",
            "messages": [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Tell."}],
        },
    ],
)
def test_every_format_gives_the_same_conversation(value: dict[str, Any]) -> None:
    found = record(value)
    assert found.messages == (ASK, TELL)
    assert found == record({"prompt": "Ask?", "completion": "Tell."})
    assert (found.task, found.origin) == ("t", "f.jsonl:7")


def test_alpaca_keeps_the_input_apart_and_puts_system_and_history_first() -> None:
    value = {
        "system": "Be kind.",
        "history": [["Q1", "A1"], ["Q2", "A2"]],
        "instruction": "Sum up.",
        "input": "A long text.",
        "output": "Short.",
    }
    assert messages(value) == [
        Message("system", "Be kind."),
        Message("user", "Q1"),
        Message("assistant", "A1"),
        Message("user", "Q2"),
        Message("assistant", "A2"),
        Message("user", "Sum up.", input="A long text."),
        Message("assistant", "Short."),
    ]


def test_sharegpt_roles_are_known_by_their_aliases() -> None:
    names = ["system", "human", "gpt", "observation", "model", "ipython", "bot"]
    turns = [{"from": name, "value": "x"} for name in names]
    assert [message.role for message in messages({"conversations": turns})] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]


def test_a_column_system_stands_first() -> None:
    turns = [{"from": "human", "value": "Ask?"}, {"from": "gpt", "value": "Tell."}]
    assert messages({"conversations": turns, "system": "Be kind."}) == [Message("system", "Be kind."), ASK, TELL]


def test_named_columns_with_and_without_an_instruction() -> None:
    assert messages(DIALOGUE, columns=COLUMNS) == [Message("user", "#A: Hi."), Message("assistant", "A greets.")]
    assert messages(DIALOGUE, columns=COLUMNS, instruction="Sum up:")[0] == Message("user", "Sum up:\n\n#A: Hi.")


def test_named_columns_win_over_a_known_format() -> None:
    value = {"prompt": "p", "completion": "c", "dialogue": "d", "summary": "s"}
    assert messages(value, columns=COLUMNS) == [Message("user", "d"), Message("assistant", "s")]


def test_text_is_kept_as_it_stands() -> None:
    text = " \u202eé</s>\u200d{{7*7}}\r\n"
    assert messages({"prompt": text, "completion": text}) == [Message("user", text), Message("assistant", text)]


def test_the_id_depends_on_task_and_messages_alone() -> None:
    first = record({"prompt": "Ask?", "completion": "Tell."})
    again = to_record(
        Row({"inputs": "Ask?", "targets": "Tell."}, "g[0]", "test"), task="t", columns=None, instruction=None
    )
    assert (first.id, again.origin) == (again.id, "g[0]")
    assert record({"prompt": "Ask?", "completion": "Tell."}, task="u").id != first.id


# Refusals


def test_unknown_columns_name_the_one_line_that_mends_it() -> None:
    assert refusal(DIALOGUE) == (
        "unknown_format",
        "f.jsonl:7: found the columns fname, dialogue, summary; expected messages, conversations, instruction + "
        "output, prompt + completion, inputs + targets. Name yours in the recipe's task, for instance "
        "`columns: {prompt: dialogue, completion: summary}`.",
    )
    assert "`columns: {prompt: first, completion: last}`." in refusal({"first": "a", "n": 1, "last": "b"})[1]
    assert "found the columns (none); expected" in refusal({})[1]
    assert "k11 and 8 more; expected" in refusal({f"k{i}": "" for i in range(20)})[1]


def test_a_missing_named_column_proposes_the_nearest() -> None:
    reason, message = refusal(DIALOGUE, columns={"prompt": "dialog", "completion": "summary"})
    assert (reason, message) == (
        "unknown_format",
        "f.jsonl:7: found no column 'dialog' among fname, dialogue, summary; expected the columns that the recipe "
        "names. Did you mean 'dialogue'?",
    )
    assert "Fix `columns` of this task." in refusal(DIALOGUE, columns={"prompt": "zzz", "completion": "summary"})[1]


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("value", "reason", "found"),
    [
        ({"prompt": "a", "completion": " \n\u3000"}, "empty_completion", "found an empty completion; expected text."),
        ({"prompt": "a", "completion": None}, "empty_completion", "found an empty completion; expected text."),
        ({"instruction": "a", "output": ""}, "empty_completion", "found an empty completion; expected text."),
        (turns(("user", "a"), ("assistant", "")), "empty_completion", "found an empty completion; expected text."),
        (
            turns(("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c")),
            "empty_completion",
            "found an em",
        ),
        ({"prompt": "\t", "completion": "b"}, "empty_prompt", "found an empty prompt; expected text."),
        ({"prompt": None, "completion": "b"}, "empty_prompt", "found an empty prompt; expected text."),
        ({"instruction": "", "input": " ", "output": "b"}, "empty_prompt", "found an empty prompt; expected text."),
        ({"messages": []}, "bad_roles", "found no messages; expected 'assistant' last, the only role trained on."),
        (turns(("user", "a")), "bad_roles", "found 'user' as the role of the last message; expected 'assistant' last"),
        (turns(("assistant", "a")), "bad_roles", "found no user message; expected one before the completion."),
        (turns(("user", "a"), ("system", "s"), ("assistant", "b")), "bad_roles", "found a system message after the fi"),
        (
            turns(("user", "a"), ("robot", "b")),
            "bad_roles",
            "found the role 'robot' in messages[1]; expected system, us",
        ),
        (
            turns((None, "a")),
            "bad_roles",
            "found the role None in messages[0]; expected system, user, assistant or too",
        ),
        (
            {**turns(("system", "s"), ("user", "a"), ("assistant", "b")), "system": "x"},
            "bad_roles",
            "found a system mes",
        ),
        ({"prompt": 3, "completion": "b"}, "not_text", "found a number in prompt; expected text."),
        ({"prompt": "a", "completion": True}, "not_text", "found true in completion; expected text or a whole number."),
        ({"prompt": "a", "completion": 0.5}, "not_text", "found 0.5 in completion; expected text or a whole number."),
        ({"prompt": "a", "completion": {}}, "not_text", "found an object in completion; expected text."),
        ({"prompt": "a", "completion": b"b"}, "not_text", "found a value of type bytes in completion; expected text."),
        ({"instruction": "a", "output": ["b"]}, "not_text", "found a list of 1 texts in output; expected one text, or"),
        ({"instruction": "a", "output": "b", "system": 1}, "not_text", "found a number in system; expected text."),
        ({"instruction": "a", "output": "b", "history": "h"}, "not_text", "found text in history; expected a list."),
        (
            {"instruction": "a", "output": "b", "history": ["h"]},
            "not_text",
            "found no pair of texts in history; expect",
        ),
        ({"instruction": "a", "output": "b", "history": [["h", 1]]}, "not_text", "found a number in history; expected"),
        ({"messages": "a"}, "not_text", "found text in messages; expected a list of messages."),
        ({"messages": None}, "not_text", "found null in messages; expected a list of messages."),
        ({"messages": ["a"]}, "not_text", "found text in messages[0]; expected a message."),
        (turns(("user", 3), ("assistant", "b")), "not_text", "found a number in messages[0]; expected text."),
        (
            turns(("user", [{"type": "image"}]), ("assistant", "b")),
            "not_text",
            "found a part of type 'image' in messag",
        ),
        (turns(("user", ["a"]), ("assistant", "b")), "not_text", "found text in messages[0]; expected parts of type"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [1]}]},
            "not_text",
            "found tool calls in messages[0] withou",
        ),
    ],
)
def test_a_row_that_is_no_record_says_why(value: dict[str, Any], reason: str, found: str) -> None:
    name, message = refusal(value)
    assert (name, message[: len(found) + 11]) == (reason, f"f.jsonl:7: {found}")
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("value", "reason", "found"),
    [
        ({"dialogue": " ", "summary": "s"}, "empty_prompt", "found an empty prompt in dialogue; expected text."),
        ({"dialogue": "d", "summary": None}, "empty_completion", "found an empty completion; expected text."),
        ({"dialogue": "d", "summary": 0.5}, "not_text", "found 0.5 in summary; expected text or a whole number."),
    ],
)
def test_named_columns_hold_text(value: dict[str, Any], reason: str, found: str) -> None:
    name, message = refusal(value, columns=COLUMNS, instruction="Sum up:")
    assert (name, found in message) == (reason, True)


# Properties

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | nested, "content": nested}
)
names = ["messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "completion"]
any_rows = st.dictionaries(
    st.sampled_from([*names, "inputs", "targets", "x"]), nested | st.lists(turn, max_size=3), max_size=5
)


@quick
@given(any_rows, st.sampled_from([None, {"prompt": "prompt", "completion": "x"}]))
def test_the_decision_is_total(value: dict[str, Any], columns: dict[str, str] | None) -> None:
    try:
        found = record(value, columns=columns)
    except RowProblem as problem:
        assert str(problem).startswith("f.jsonl:7: found ")
    else:
        assert found.completion.strip()
        assert found.prompt.strip()


words = st.text(max_size=8).filter(str.strip)


@quick
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.none() | words)
def test_an_accepted_row_reads_back_the_same(pairs: list[tuple[str, str]], system: str | None) -> None:
    said = [("system", system)] if system else []
    for ask, tell in pairs:
        said += [("user", ask), ("assistant", tell)]
    value = {"messages": [{"role": role, "content": content} for role, content in said]}
    found = record(value)
    assert [(message.role, message.content) for message in found.messages] == said
    assert record_from_json(record_to_json(found), where="x") == found
    assert record(record_to_json(found)).messages == found.messages


# The real data


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the checkout (../shared)")
@pytest.mark.parametrize(
    ("name", "columns", "num_records"),
    [("alpaca_en_demo.json", None, 999), ("dialogsum.dev.jsonl", COLUMNS, 500), ("p3_sample", None, 44_289)],
)
def test_every_real_row_is_a_record(name: str, columns: dict[str, str] | None, num_records: int) -> None:
    rows = read_rows(str(SHARED / "data" / name), revision=None, validation=None, test=None)
    assert sum(1 for row in rows if to_record(row, task="t", columns=columns, instruction=None)) == num_records


def test_the_prompt_chooses_among_several_wordings_and_equal_prompts_choose_the_same() -> None:
    wordings = ["Say it shortly.", "Summarise.", "In a nutshell:"]
    columns = {"prompt": "dialogue", "completion": "summary"}
    chosen: dict[str, set[str]] = {}
    for i in range(300):
        given = record({"dialogue": f"text {i % 100}", "summary": str(i)}, columns=columns, instruction=wordings)
        wording, _, prompt = given.prompt.partition("\n\n")
        chosen.setdefault(prompt, set()).add(wording)
    assert all(len(found) == 1 for found in chosen.values()) and len(chosen) == 100
    counts = [sum(found == {wording} for found in chosen.values()) for wording in wordings]
    # Of 100 draws among three, 33 each; 15 is 3.9 standard deviations off.
    assert min(counts) > 15 and sum(counts) == 100


# Columns, labels, and rows of other kinds


def test_a_prompt_of_several_columns_has_each_behind_its_name() -> None:
    columns = {"prompt": ["subject", "body", "number"], "completion": "kind"}
    value = {"subject": "Printer", "body": "It smokes.\nHelp!", "number": 7, "kind": "Hardware"}
    assert messages(value, columns=columns) == [
        Message("user", "subject: Printer\n\nbody: It smokes.\nHelp!\n\nnumber: 7"),
        Message("assistant", "Hardware"),
    ]
    assert messages({**value, "subject": None}, columns=columns)[0].content.startswith("body: It smokes.")
    assert refusal({**value, "subject": " ", "body": "", "number": None}, columns=columns) == (
        "empty_prompt",
        "f.jsonl:7: found an empty prompt in subject and body and number; expected text. Fix the row.",
    )
    assert "found a list in body; expected text." in refusal({**value, "body": ["x"]}, columns=columns)[1]


@pytest.mark.parametrize(
    ("value", "labels", "completion"),
    [
        (0, None, "0"),
        (-3, None, "-3"),
        (1, {"0": "bad", "1": "good"}, "good"),
        (True, {"0": "bad", "1": "good"}, "good"),
        (1.0, {"0": "bad", "1": "good"}, "good"),
        (" 1 ", {"0": "bad", "1": "good"}, "good"),
        ("BUG", {"BUG": "bug", "bug": "bug"}, "bug"),
    ],
)
def test_whole_numbers_are_written_in_digits_or_as_the_recipe_names_them(
    value: Any, labels: dict[str, str] | None, completion: str
) -> None:
    columns = {"prompt": "text", "completion": "label"}
    assert messages({"text": "a", "label": value}, columns=columns, labels=labels)[-1].content == completion
    assert messages({"prompt": "a", "completion": value}, labels=labels)[-1].content == completion
    assert messages({"instruction": "a", "output": value}, labels=labels)[-1].content == completion


def test_a_label_that_has_no_name_is_refused() -> None:
    reason, message = refusal({"prompt": "a", "completion": 5}, labels={"0": "bad", "1": "good"})
    assert reason == "no_label"
    assert "found the label 5 in completion; expected one that `labels` of the task name: 0, 1." in message
    assert refusal({"prompt": "a", "completion": None}, labels={"0": "bad"})[0] == "empty_completion"
    assert "`labels: [negative, positive]`" in refusal({"prompt": "a", "completion": True})[1]


@pytest.mark.parametrize(
    "column", ["image", "images", "audio", "videos", "image_path", "pixel_values", "image_url", "photo"]
)
def test_pictures_and_sound_that_the_model_would_not_see_are_refused(column: str) -> None:
    value = {"prompt": "What is it?", "completion": "A cat."}
    reason, message = refusal({**value, column: ["a.png"]})
    assert (reason, message) == (
        "not_text",
        f"f.jsonl:7: found a column {column!r} that is not empty; expected text alone, since the model would be asked "
        f"about what it never sees. If the text makes sense without it, set `ignore: [{column}]` in the task.",
    )
    assert record({**value, column: ["a.png"]}, ignore=[column]) == record(value)
    for nothing in (None, [], "", {"bytes": None, "path": None}, [None], False, float("nan")):
        assert record({**value, column: nothing}) == record(value)
    # A column that the recipe names is text.
    assert messages({column: "a", "y": "b"}, columns={"prompt": column, "completion": "y"})[0].content == "a"


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "set `columns: {prompt: prompt, completion: chosen}`"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "set `columns: {prompt: question, completion: chosen}`"),
        ({"rejected": "b", "chosen": "c"}, "Write each chosen conversation as a list of messages"),
        ({"chosen": turns(("user", "a"))["messages"], "rejected": []}, "set `columns: {messages: chosen}`"),
        (
            {"prompt": "a", "chosen": turns(("user", "a"), ("assistant", "b"))["messages"], "rejected": []},
            "set `columns: {messages: chosen}`",
        ),
        (
            {"prompt": "a", "chosen": turns(("assistant", "b"))["messages"], "rejected": []},
            "set `columns: {prompt: prompt, completion: chosen}`",
        ),
    ],
)
def test_preference_pairs_are_told_as_such_and_the_rejected_answer_is_never_proposed(
    value: dict[str, Any], remedy: str
) -> None:
    reason, message = refusal(value)
    assert reason == "unknown_format"
    assert "preference pairs, as DPO takes them; expected one answer to train on." in message
    assert remedy in message
    assert "completion: rejected" not in message


def test_chosen_answers_are_trained_on_where_the_recipe_says_so() -> None:
    columns = {"prompt": "prompt", "completion": "chosen"}
    whole = turns(("user", "Ask?"), ("assistant", "Tell."))["messages"]
    for chosen in ("Tell.", whole[1:], whole):
        assert messages({"prompt": "Ask?", "chosen": chosen, "rejected": "No."}, columns=columns) == [ASK, TELL]
    assert messages({"chosen": whole, "rejected": []}, columns={"messages": "chosen"}) == [ASK, TELL]
    assert "begin with another prompt" in refusal({"prompt": "Other?", "chosen": whole}, columns=columns)[1]


def test_an_answer_that_is_marked_as_unwanted_is_not_trained_on() -> None:
    value = {"prompt": "Ask?", "completion": "Tell."}
    reason, message = refusal({**value, "label": False})
    assert (reason, "the mark of an answer that is not wanted (KTO)" in message) == ("unwanted", True)
    assert record({**value, "label": True}) == record(value)


def test_a_conversation_that_starts_with_the_assistant_is_told() -> None:
    reason, message = refusal(turns(("assistant", "Hi."), ("user", "a"), ("assistant", "b")))
    assert (reason, message) == (
        "bad_roles",
        "f.jsonl:7: found 'assistant' as the role of the first message; expected the user's first, or a system message "
        "and then the user's. Remove what stands before the first message of the user.",
    )


def test_messages_may_stand_as_json_in_one_cell() -> None:
    text = '[{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Tell."}]'
    assert messages({"messages": text}) == [ASK, TELL]
    assert messages({"talk": text}, columns={"messages": "talk"}) == [ASK, TELL]
    assert "found text in messages; expected a list of messages." in refusal({"messages": "[broken"})[1]


@pytest.mark.parametrize(
    ("value", "proposed"),
    [
        ({"subject": "a", "body": "b", "category": "c"}, "{prompt: [subject, body], completion: category}"),
        ({"id": "7", "text": "a", "class": 3}, "{prompt: text, completion: class}"),
        ({"dialog": [{"role": "user", "content": "a"}]}, "{messages: dialog}"),
        ({"query": "a", "answers": "[]", "tools": "[]"}, "{prompt: query, completion: answers}"),
        ({"ask": "a", "chosen_answer": "b", "rejected_answer": "c"}, "{prompt: ask, completion: chosen_answer}"),
    ],
)
def test_the_columns_that_a_message_proposes_are_there(value: dict[str, Any], proposed: str) -> None:
    assert f"`columns: {proposed}`" in refusal(value)[1]


def test_one_column_of_text_gets_no_columns_proposed() -> None:
    for value in (
        {"text": "### Human: a ### Assistant: b"},
        {"title": "a", "paragraphs": [{"context": "b"}]},
        {"a": 1},
    ):
        assert "`columns:" not in refusal(value)[1]
