"""One renderer: published wordings, spans by place, and the same text as transformers' apply_chat_template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.record import Message
from keeptune.errors import DataError, KeeptuneError, RecipeError
from keeptune.text.template import Rendered, Template, TemplateName, TrainOn, make_template
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


def whole(template: Template, messages: Sequence[Message], *, train_on: TrainOn = "all") -> str:
    """Return the text of a conversation up to its last end token."""
    rendered = template.render(messages, train_on=train_on)
    return template.controls.reveal(rendered.prompt + rendered.completion)


def prompt_of(template: Template, messages: Sequence[Message]) -> str:
    return template.controls.reveal(template.render_prompt(messages))


def trained(template: Template, messages: Sequence[Message], *, train_on: TrainOn) -> list[str]:
    rendered = template.render(messages, train_on=train_on)
    parts = [rendered.prompt[start:end] for start, end in rendered.answers]
    return [template.controls.reveal(part) for part in [*parts, rendered.completion]]


@pytest.mark.parametrize("wording", ["chatml", "built-in chatml"])
def test_a_chatml_conversation_is_a_prompt_and_a_completion(wording: str, load: Load) -> None:
    template, _ = load(wording)
    prompt = "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(ONE_TURN, train_on="all") == Rendered(prompt, "Paris<|im_end|>", "<|im_end|>")
    assert template.render_prompt(ONE_TURN[:1]) == prompt


def test_chatml_writes_every_role_and_no_system_message_of_its_own(load: Load) -> None:
    template, _ = load("built-in chatml", adds_bos=True)
    messages = [SYSTEM, Message("user", "Add.", input="1 2"), Message("tool", "3"), Message("assistant", "It is 3.")]
    assert whole(template, messages) == (
        "<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n"
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nIt is 3.<|im_end|>"
    )
    assert trained(template, messages, train_on="all") == ["It is 3.<|im_end|>"]
    assert prompt_of(template, ONE_TURN[:1]) == (
        "<bos><|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_alpaca_wording_is_the_published_one(load: Load) -> None:
    template, _ = load("alpaca")
    with_input = (Message("user", "Add.", input="1 2"), Message("assistant", "3"))
    assert whole(template, with_input) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:3<|im_end|>"
    )
    assert whole(template, TWO_TURNS) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCapital of France?\n\n### Response:Paris<|im_end|>\n\n"
        "### Instruction:\nOf Italy?\n\n### Response:Rome<|im_end|>"
    )
    assert prompt_of(template, [SYSTEM, ONE_TURN[0]]) == (
        "Be brief.\n\n### Instruction:\nCapital of France?\n\n### Response:"
    )


def test_plain_is_prompt_newline_completion(load: Load) -> None:
    template, _ = load("plain")
    assert template.render(ONE_TURN, train_on="all") == Rendered(
        "Capital of France?\n", "Paris<|im_end|>", "<|im_end|>"
    )
    with_input = (Message("user", "Add.", input="1 2"), ONE_TURN[1])
    assert prompt_of(template, with_input[:1]) == "Add.\n1 2\n"


def test_every_answer_or_the_last_alone_is_trained_on(load: Load) -> None:
    for wording in ("chatml", "llama3", "gemma", "built-in chatml", "alpaca", "plain"):
        template, _ = load(wording)
        end = template.end_token
        assert trained(template, TWO_TURNS, train_on="all") == ["Paris" + end, "Rome" + end]
        assert trained(template, TWO_TURNS, train_on="last") == ["Rome" + end]


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
    assert template.render(TWO_TURNS, train_on="all") == Rendered(
        "User: Capital of France?\n\nBot: Paris\n\nUser: Of Italy?\n\nBot: ",
        "Rome<|im_end|>",
        "<|im_end|>",
        answers=((31, 36),),
    )


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
    template, _ = load(wording)
    messages = [m for ask, answer in contents for m in (Message("user", ask), Message("assistant", answer))]
    written = [m.content.strip() if wording in ("llama3", "gemma") else m.content for m in messages[1::2]]
    lead = " " if wording == "mistral" else ""
    parts = trained(template, messages, train_on="all")
    if wording == "mistral":
        # Without a generation prompt of its own, only the first answer stands where its prompt ends.
        assert parts[-1] == lead + written[-1] + template.end_token
    else:
        assert parts == [answer + template.end_token for answer in written]
    rendered = template.render(messages, train_on="last")
    assert template.controls.reveal(rendered.completion) == lead + written[-1] + template.end_token
    assert template.render_prompt(messages[:-1]) == rendered.prompt


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
        assert prompt_of(template, messages[:-1]) == prompt
        # A tokenizer's own template writes its BOS token itself, or means none.
        own = wording in ("llama3", "gemma", "mistral")
        assert prompt_of(template, messages[:-1]).count("<bos>") == (own or (adds_bos and wording in NAMES))
        theirs_whole = theirs.apply_chat_template(plain, tokenize=False)
        assert theirs_whole.startswith(whole(template, messages, train_on="last"))


def test_a_template_that_thinks_trains_on_answers_without_thoughts(load: Load) -> None:
    template, _ = load("thinking")
    assert prompt_of(template, ONE_TURN[:1]).endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(RecipeError, match=r"data\.train_on: found 'all', but the chat template writes message 2 "):
        template.render(TWO_TURNS, train_on="all")
    assert trained(template, TWO_TURNS, train_on="last") == ["Rome<|im_end|>"]


def test_a_template_that_refuses_a_role_says_so(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"System role not supported\) for a conversation of the roles system, user"):
        load("gemma")[0].render([SYSTEM, *ONE_TURN], train_on="all")
    tool = [ONE_TURN[0], Message("tool", "42"), ONE_TURN[1]]
    with pytest.raises(RecipeError, match="the alpaca wording has no place for the role tool"):
        load("alpaca")[0].render(tool, train_on="all")


EACH = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
LAST = "{{ messages[-1].content if messages[-1].role == 'assistant' }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (EACH + "{{ m.content if m.role != 'system' }}{% endfor %}", "the system message 1 of a conversation left out"),
        (EACH + "{{ m.content | upper }}{% endfor %}", "found an answer after .*Q.*A"),
        (EACH + "{{ 'Bot:' if m.role == 'assistant' }}{{ m.content }}{% endfor %}", "found an answer after .*Bot:'"),
        (EACH + "{{ m.content }}{% endfor %}" + OPEN, "but a generation prompt that ends with .*Answer:"),
        (EACH + "{{ m.content }}{% endfor %}" + LAST, "expected the same text before an answer"),
    ],
)
def test_a_template_that_loses_or_changes_messages_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        custom(tmp_path, source).render([SYSTEM, *ONE_TURN], train_on="all")


def test_what_a_template_leaves_out_of_an_answer_is_refused_and_of_an_earlier_one_left_out(load: Load) -> None:
    thoughts = (ONE_TURN[0], Message("assistant", "thought</think>answer"))
    template, _ = load("thinking")
    with pytest.raises(DataError, match="found 'answer' where it writes a message; expected the content, unchanged"):
        template.render(thoughts, train_on="last")
    assert "thought" not in whole(template, (*thoughts, *ONE_TURN), train_on="last")


@pytest.mark.parametrize("word", ["Paris", "France"])
def test_a_wording_that_depends_on_the_contents_is_refused(tmp_path: Path, word: str) -> None:
    shout = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '!' if '" + word + "' in messages[-1].content }}"
    template = custom(tmp_path, shout)
    with pytest.raises(
        KeeptuneError, match="found 'Paris!' where it writes a message|found an answer that does not stand after"
    ):
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


@pytest.mark.parametrize("name", ["chat", "auto"])
def test_an_encoder_reads_the_prompt_of_a_chat_template(name: TemplateName, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.chatml_tokenizer(tmp_path, chat_template=tiny.GEMMA))
    template = make_template(name, tokenizer=tokenizer, encoder_decoder=True)
    prompt = "<bos><start_of_turn>user\nCapital of France?<end_of_turn>\n<start_of_turn>model\n"
    assert template.name == "chat" and template.chat_template == tiny.GEMMA
    assert template.render(ONE_TURN, train_on="all") == Rendered(prompt, "Paris<end_of_turn>", "<end_of_turn>")
    with pytest.raises(DataError, match=r"data\.train_on: found 'all' and a conversation of several answers"):
        template.render(TWO_TURNS, train_on="all")
    with pytest.raises(RecipeError, match=r"data\.template: found 'chatml' for an encoder-decoder model"):
        make_template("chatml", tokenizer=tokenizer, encoder_decoder=True)


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
    template = make_template("chatml", tokenizer=Tokenizer.load(folder), encoder_decoder=False)
    assert template.end_token == "<|im_end|>"


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_completion(tmp_path: Path) -> None:
    t5 = Tokenizer.load(tiny.t5_tokenizer(tmp_path))
    plain = make_template("plain", tokenizer=t5, encoder_decoder=True)
    expected = Rendered("Be brief.\nCapital of France?</s>", "Paris</s>", "</s>")
    assert plain.render([SYSTEM, *ONE_TURN], train_on="all") == expected
    alpaca = make_template("alpaca", tokenizer=t5, encoder_decoder=True)
    assert alpaca.render_prompt(ONE_TURN[:1]).endswith("### Instruction:\nCapital of France?\n\n### Response:</s>")
    assert whole(plain, TWO_TURNS, train_on="last") == "Capital of France?\nParis\nOf Italy?</s>Rome</s>"
    with pytest.raises(DataError, match=r"data\.train_on: found 'all' and a conversation of several answers"):
        plain.render(TWO_TURNS, train_on="all")


def test_fingerprints_tell_wordings_apart(load: Load) -> None:
    names = [*tiny.TEMPLATES, *NAMES]
    assert len({load(name)[0].fingerprint for name in names}) == len(names)
    assert load("alpaca", adds_bos=True)[0].fingerprint != load("alpaca")[0].fingerprint
