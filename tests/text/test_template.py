"""One renderer: published wordings, spans by place, and the same text as transformers' apply_chat_template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.record import Message
from keeptune.errors import DataError, RecipeError
from keeptune.text.template import Segment, Template, TemplateName, make_template
from keeptune.text.tokenizer import Tokenizer
from tests import tiny

# transformers itself warns about nothing here, but its import touches deprecated parts of other libraries.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ONE_TURN = (Message("user", "Capital of France?"), Message("assistant", "Paris"))
TWO_TURNS = (*ONE_TURN, Message("user", "Of Italy?"), Message("assistant", "Rome"))
SYSTEM = Message("system", "Be brief.")
Load = Callable[..., tuple[Template, Tokenizer]]
# The wordings that no tokenizer brings.
NAMES: dict[str, TemplateName] = {"built-in chatml": "chatml", "alpaca": "alpaca", "plain": "plain"}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[tuple[str, bool], tuple[Template, Tokenizer]] = {}

    def template_of(wording: str, *, adds_bos: bool = False) -> tuple[Template, Tokenizer]:
        key = (wording, adds_bos)
        if key not in made:
            source = tiny.TEMPLATES.get(wording)
            folder = tmp_path_factory.mktemp(wording)
            if wording == "built-in chatml":
                tiny.chatml_tokenizer(folder, chat_template=None, adds_bos=adds_bos, eos_token="<|endoftext|>")
            else:
                tiny.chatml_tokenizer(folder, chat_template=source, adds_bos=adds_bos)
            tokenizer = Tokenizer.load(folder)
            name = "chat" if source else NAMES[wording]
            made[key] = (make_template(name, tokenizer=tokenizer, encoder_decoder=False), tokenizer)
        return made[key]

    return template_of


def custom(tmp_path: Path, source: str) -> Template:
    return make_template(
        "chat",
        tokenizer=Tokenizer.load(tiny.chatml_tokenizer(tmp_path, chat_template=source)),
        encoder_decoder=False,
    )


def joined(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def trained(segments: list[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.trained]


@pytest.mark.parametrize("wording", ["chatml", "built-in chatml"])
def test_a_chatml_conversation_is_these_segments(wording: str, load: Load) -> None:
    template, _ = load(wording)
    assert template.render(ONE_TURN, train_on="all") == [
        Segment("<|im_start|>", special=True),
        Segment("user\nCapital of France?"),
        Segment("<|im_end|>", special=True),
        Segment("\n"),
        Segment("<|im_start|>", special=True),
        Segment("assistant\n"),
        Segment("Paris", trained=True, completion=True),
        Segment("<|im_end|>", trained=True, special=True),
        Segment("\n"),
    ]
    assert template.render_prompt(ONE_TURN[:1]) == template.render(ONE_TURN, train_on="all")[:6]


def test_chatml_writes_every_role_and_no_system_message_of_its_own(load: Load) -> None:
    template, _ = load("built-in chatml", adds_bos=True)
    messages = [SYSTEM, Message("user", "Add.", input="1 2"), Message("tool", "3"), Message("assistant", "It is 3.")]
    assert joined(template.render(messages, train_on="all")) == (
        "<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n"
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nIt is 3.<|im_end|>\n"
    )
    assert trained(template.render(messages, train_on="all")) == ["It is 3.", "<|im_end|>"]
    assert joined(template.render_prompt(ONE_TURN[:1])) == (
        "<bos><|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_alpaca_wording_is_the_published_one(load: Load) -> None:
    template, _ = load("alpaca")
    with_input = (Message("user", "Add.", input="1 2"), Message("assistant", "3"))
    assert joined(template.render(with_input, train_on="all")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:3<|im_end|>"
    )
    assert joined(template.render(TWO_TURNS, train_on="all")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCapital of France?\n\n### Response:Paris<|im_end|>\n\n"
        "### Instruction:\nOf Italy?\n\n### Response:Rome<|im_end|>"
    )
    assert joined(template.render_prompt([SYSTEM, ONE_TURN[0]])) == (
        "Be brief.\n\n### Instruction:\nCapital of France?\n\n### Response:"
    )


def test_plain_is_prompt_newline_completion(load: Load) -> None:
    template, _ = load("plain")
    assert template.render(ONE_TURN, train_on="all") == [
        Segment("Capital of France?\n"),
        Segment("Paris", trained=True, completion=True),
        Segment("<|im_end|>", trained=True, special=True),
    ]
    with_input = (Message("user", "Add.", input="1 2"), ONE_TURN[1])
    assert joined(template.render_prompt(with_input[:1])) == "Add.\n1 2\n"


def test_every_answer_or_the_last_alone_is_trained_on(load: Load) -> None:
    for wording in ("chatml", "llama3", "gemma", "built-in chatml", "alpaca", "plain"):
        template, _ = load(wording)
        end = template.end_token
        assert trained(template.render(TWO_TURNS, train_on="all")) == ["Paris", end, "Rome", end]
        assert trained(template.render(TWO_TURNS, train_on="last")) == ["Rome", end]


@pytest.mark.parametrize(
    ("wording", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("thinking", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("mistral", "<|im_end|>"),
        ("built-in chatml", "<|im_end|>"),
        ("alpaca", "<|im_end|>"),
    ],
)
def test_the_end_token_is_the_one_that_the_template_writes_after_an_answer(wording: str, end: str, load: Load) -> None:
    assert load(wording)[0].end_token == end


def test_without_an_end_token_in_the_template_the_end_token_of_the_tokenizer_follows(tmp_path: Path) -> None:
    template = custom(
        tmp_path,
        "{% for m in messages %}{{ ('User: ' if m.role == 'user' else 'Bot: ') + m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}",
    )
    segments = template.render(TWO_TURNS, train_on="last")
    assert segments[-3:] == [
        Segment("Rome", trained=True, completion=True),
        Segment("<|im_end|>", trained=True, special=True),
        Segment("\n\n"),
    ]


CHARACTERS = st.sampled_from(["a", " ", "\n", "{{ 7 }}", "<|im_end|>", "\ue0000\ue001", "é", "[INST]", "x", "</think>"])
TEXT = st.lists(CHARACTERS, min_size=1, max_size=6).map("".join)


@settings(max_examples=80, deadline=None)
@given(
    contents=st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3),
    wording=st.sampled_from(["chatml", "llama3", "gemma", "mistral", *NAMES]),
)
def test_spans_are_places_whatever_the_contents_spell(
    contents: list[tuple[str, str]], wording: str, load: Load
) -> None:
    template, tokenizer = load(wording)
    messages = [m for ask, answer in contents for m in (Message("user", ask), Message("assistant", answer))]
    segments = template.render(messages, train_on="last")
    written = messages[-1].content.strip() if wording in ("llama3", "gemma") else messages[-1].content
    assert trained(segments) == [written, template.end_token]
    prompt = template.render_prompt(messages[:-1])
    assert segments[: len(prompt)] == prompt
    assert [s.text for s in segments if s.completion and not s.trained] == [
        m.content.strip() if wording in ("llama3", "gemma") else m.content for m in messages[1:-1:2]
    ]
    assert all(segment.text in tokenizer.special_tokens for segment in segments if segment.special)


@pytest.mark.parametrize("wording", [*tiny.TEMPLATES, *NAMES])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_saved_chat_template_renders_the_same_in_transformers(
    wording: str, adds_bos: bool, load: Load, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    template, tokenizer = load(wording, adds_bos=adds_bos)
    tiny.chatml_tokenizer(
        tmp_path, chat_template=template.chat_template, adds_bos=adds_bos, eos_token=tokenizer.eos_token
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (ONE_TURN, TWO_TURNS, [SYSTEM, *ONE_TURN], [Message("user", " q\n", input="in"), ONE_TURN[1]]):
        if messages[0].role == "system" and wording in ("gemma", "mistral"):
            continue
        plain = [{"role": m.role, "content": m.text} for m in messages]
        if wording == "alpaca":
            plain = [{"role": m.role, "content": m.content, "input": m.input} for m in messages]
        prompt = theirs.apply_chat_template(plain[:-1], tokenize=False, add_generation_prompt=True)
        assert joined(template.render_prompt(messages[:-1])) == prompt
        assert joined(template.render_prompt(messages[:-1])).count("<bos>") == (
            1 if adds_bos or wording in ("llama3", "gemma", "mistral") else 0
        )
        if wording != "mistral":
            whole = theirs.apply_chat_template(plain, tokenize=False)
            assert joined(template.render(messages, train_on="last")) == whole


def test_a_template_that_thinks_trains_on_answers_without_thoughts(load: Load) -> None:
    template, _ = load("thinking")
    assert joined(template.render_prompt(ONE_TURN[:1])).endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(RecipeError, match=r"data\.train_on: found 'all', but the chat template writes message 2 "):
        template.render(TWO_TURNS, train_on="all")
    assert trained(template.render(TWO_TURNS, train_on="last")) == ["Rome", "<|im_end|>"]


def test_a_template_that_refuses_a_role_says_so(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"System role not supported\) for a conversation of the roles system, user"):
        load("gemma")[0].render([SYSTEM, *ONE_TURN], train_on="all")
    tool = [ONE_TURN[0], Message("tool", "42"), ONE_TURN[1]]
    with pytest.raises(RecipeError, match="the alpaca wording has no place for the role tool"):
        load("alpaca")[0].render(tool, train_on="all")


EACH = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
LAST = "{{ messages[-1].content if messages[-1].role == 'assistant' }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (EACH + "{{ m.content if m.role != 'system' }}{% endfor %}", "the system message 1 of a conversation left out"),
        (EACH + "{{ m.content | upper }}{% endfor %}", "found 'QUESTION' where it writes a message"),
        (EACH + "{{ 'Bot:' if m.role == 'assistant' }}{{ m.content }}{% endfor %}", "found an answer after .*Bot:'"),
        (EACH + "{{ m.content }}{% endfor %}" + OPEN, "but a generation prompt that ends with .*<think>"),
        (EACH + "{{ m.content }}{% endfor %}" + LAST, "expected the same text before an answer"),
    ],
)
def test_a_template_that_loses_or_changes_messages_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        custom(tmp_path, source).render([SYSTEM, *ONE_TURN], train_on="all")


def test_a_content_that_one_record_alone_has_changed_is_refused(load: Load) -> None:
    messages = (ONE_TURN[0], Message("assistant", "thought</think>answer"), *ONE_TURN)
    with pytest.raises(RecipeError, match="where it writes a message; expected the content, unchanged"):
        load("thinking")[0].render(messages, train_on="last")


@pytest.mark.parametrize("word", ["Paris", "France"])
def test_a_wording_that_depends_on_the_contents_is_refused(tmp_path: Path, word: str) -> None:
    shout = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '!' if '" + word + "' in messages[-1].content }}"
    template = custom(tmp_path, shout)
    with pytest.raises(RecipeError, match="found '!' where it writes a message"):
        template.render(ONE_TURN, train_on="last")


def test_auto_is_the_chat_template_else_alpaca_else_plain(tmp_path: Path) -> None:
    chat = Tokenizer.load(tiny.chatml_tokenizer(tmp_path / "chat"))
    bare = Tokenizer.load(tiny.plain_tokenizer(tmp_path / "bare"))
    t5 = Tokenizer.load(tiny.t5_tokenizer(tmp_path / "t5"))
    assert make_template("auto", tokenizer=chat, encoder_decoder=False).name == "chat"
    assert make_template("auto", tokenizer=bare, encoder_decoder=False).name == "alpaca"
    assert make_template("auto", tokenizer=t5, encoder_decoder=True).name == "plain"
    with pytest.raises(RecipeError, match=r"data\.template: found 'chat', but the tokenizer has no chat template"):
        make_template("chat", tokenizer=bare, encoder_decoder=False)


@pytest.mark.parametrize("name", ["chat", "chatml"])
def test_an_encoder_decoder_has_no_chat_template(name: TemplateName, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.chatml_tokenizer(tmp_path))
    with pytest.raises(RecipeError, match=rf"data\.template: found '{name}' for an encoder-decoder model"):
        make_template(name, tokenizer=tokenizer, encoder_decoder=True)


def test_chatml_asks_for_its_two_special_tokens(tmp_path: Path) -> None:
    bare = Tokenizer.load(tiny.plain_tokenizer(tmp_path / "bare"))
    with pytest.raises(RecipeError) as caught:
        make_template("chatml", tokenizer=bare, encoder_decoder=False)
    assert str(caught.value) == (
        "data.template: found 'chatml', but the tokenizer has no special token <|im_start|> or <|im_end|>; expected "
        "both <|im_start|> and <|im_end|>. Set data.template=auto, or choose another model."
    )
    folder = tiny.chatml_tokenizer(tmp_path / "one", chat_template=None, eos_token="<|endoftext|>")
    written = json.loads((folder / "tokenizer.json").read_text())
    for token in written["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(RecipeError, match=r"has no special token <\|im_end\|>; expected both"):
        make_template("chatml", tokenizer=Tokenizer.load(folder), encoder_decoder=False)


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_completion(tmp_path: Path) -> None:
    t5 = Tokenizer.load(tiny.t5_tokenizer(tmp_path))
    plain = make_template("plain", tokenizer=t5, encoder_decoder=True)
    assert plain.render([SYSTEM, *ONE_TURN], train_on="all") == [
        Segment("Be brief.\nCapital of France?"),
        Segment("</s>", special=True),
        Segment("Paris", trained=True, completion=True),
        Segment("</s>", trained=True, special=True),
    ]
    alpaca = make_template("alpaca", tokenizer=t5, encoder_decoder=True)
    assert alpaca.render_prompt(ONE_TURN[:1])[0].text.endswith("### Instruction:\nCapital of France?\n\n### Response:")
    assert joined(plain.render(TWO_TURNS, train_on="last")) == "Capital of France?\nParis\nOf Italy?</s>Rome</s>"
    with pytest.raises(DataError, match=r"data\.train_on: found 'all' and a conversation of several answers"):
        plain.render(TWO_TURNS, train_on="all")


def test_fingerprints_tell_wordings_apart(load: Load) -> None:
    names = [*tiny.TEMPLATES, *NAMES]
    assert len({load(name)[0].fingerprint for name in names}) == len(names)
    assert load("alpaca", adds_bos=True)[0].fingerprint != load("alpaca")[0].fingerprint
