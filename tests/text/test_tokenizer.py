"""Text to ids and back; special tokens in text stay text; what a tokenizer folder must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.errors import DataError, RecipeError
from keeptune.text.tokenizer import Tokenizer
from tests import tiny

TEXTS = st.lists(st.sampled_from(["a", " ", "\n", "Paris", "é", "</s>", "<s>", "<|im_end|>", "<unk>", "1", "🙂"])).map(
    "".join
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def chatml(folders: Path) -> Tokenizer:
    return Tokenizer.load(tiny.chatml_tokenizer(folders / "chatml"))


@pytest.fixture(scope="module")
def llama(folders: Path) -> Tokenizer:
    return Tokenizer.load(tiny.sentencepiece_tokenizer(folders / "llama"))


@pytest.fixture(scope="module")
def t5(folders: Path) -> Tokenizer:
    return Tokenizer.load(tiny.t5_tokenizer(folders / "t5"))


def test_the_end_bos_and_pad_tokens_are_those_of_the_settings(chatml: Tokenizer, t5: Tokenizer) -> None:
    assert (chatml.eos_token, chatml.eos_id, chatml.pad_id) == ("<|im_end|>", 2, 0)
    assert (chatml.bos_token, chatml.bos_id, chatml.adds_bos) == ("<bos>", 3, False)
    assert chatml.vocab_size == 400 and chatml.chat_template == tiny.CHATML
    assert (t5.eos_token, t5.eos_id, t5.pad_id, t5.bos_token, t5.adds_bos) == ("</s>", 1, 0, None, False)


def test_without_a_pad_token_the_end_token_pads(folders: Path) -> None:
    plain = Tokenizer.load(tiny.plain_tokenizer(folders / "plain"))
    assert plain.pad_id == plain.eos_id == 0
    assert plain.chat_template is None


def test_a_post_processor_or_an_explicit_setting_says_who_adds_bos(folders: Path, llama: Tokenizer) -> None:
    assert llama.adds_bos and llama.bos_id == 1
    folder = tiny.chatml_tokenizer(folders / "bos", adds_bos=True)
    assert Tokenizer.load(folder).adds_bos
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert not Tokenizer.load(folder).adds_bos


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_special_token_strings_stay_text_and_every_text_comes_back(
    text: str, chatml: Tokenizer, llama: Tokenizer
) -> None:
    for tokenizer in (chatml, llama):
        for first in (True, False):
            (ids,) = tokenizer.encode([text], first=first)
            assert not set(ids) & set(tokenizer.special_tokens.values())
            assert tokenizer.decode(ids, first=first) == text


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_unigram_model_that_knows_its_end_token_does_not_read_it_from_text(text: str, t5: Tokenizer) -> None:
    for first in (True, False):
        (ids,) = t5.encode([text], first=first)
        assert not {t5.eos_id, t5.pad_id} & set(ids)
        if not {"🙂", "é"} & set(text):
            assert "".join(t5.decode(ids, first=first).split()) == "".join(text.split())


def test_the_unigram_backend_alone_would_read_the_end_token_from_text(t5: Tokenizer) -> None:
    assert t5.eos_id in t5.encode_rendered(["a </s> b"])[0]
    (ids,) = t5.encode(["a </s> b"], first=True)
    assert t5.decode(ids, first=True) == "a </s> b"
    (ids,) = t5.encode(["a <unk> b"], first=True)
    assert t5.special_tokens["<unk>"] not in ids


def test_the_parts_of_a_text_decode_to_the_parts_joined(llama: Tokenizer) -> None:
    (head,), (tail,) = llama.encode(["The capital"], first=True), llama.encode([" of France"], first=False)
    assert llama.decode([*head, *tail], first=True) == "The capital of France"
    assert llama.decode(tail) == " of France"
    (glued,) = llama.encode(["Paris"], first=False)
    assert llama.decode(glued) == "Paris" and not llama.decode(glued).startswith(" ")


def test_special_tokens_are_skipped_only_on_request(chatml: Tokenizer) -> None:
    ids = [1, *chatml.encode(["yes"], first=False)[0], 2]
    assert chatml.decode(ids) == "<|im_start|>yes<|im_end|>"
    assert chatml.decode_batch([ids, ids], skip_special_tokens=True) == ["yes", "yes"]


@pytest.mark.parametrize(("prepend", "expected"), [("normalizer", True), ("always", True), ("first", False)])
def test_a_dummy_space_after_special_tokens_depends_on_its_scheme(tmp_path: Path, prepend: str, expected: bool) -> None:
    tokenizer = Tokenizer.load(tiny.sentencepiece_tokenizer(tmp_path, prepend=prepend))
    assert tokenizer.spaces_after_special is expected


def test_an_added_prefix_space_is_left_out_of_what_continues(tmp_path: Path) -> None:
    folder = tiny.plain_tokenizer(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.spaces_after_special
    assert tokenizer.decode(tokenizer.encode(["Rome"], first=True)[0]) == " Rome"
    assert tokenizer.decode(tokenizer.encode(["Rome"], first=False)[0]) == "Rome"


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    folder = tiny.plain_tokenizer(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    rows = Tokenizer.load(folder).encode(["a b a b a b", "a"], first=True)
    assert [len(row) for row in rows] == [9, 1]


def test_the_fingerprint_follows_each_file(tmp_path: Path) -> None:
    folder = tiny.chatml_tokenizer(tmp_path)
    first = Tokenizer.load(folder).fingerprint
    assert Tokenizer.load(folder).fingerprint == first
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    changed = Tokenizer.load(folder)
    assert changed.fingerprint != first and changed.chat_template == "{{ messages[0]['content'] }}"


END = {"eos_token": "<|endoftext|>"}
NAMED = [{"name": "tool", "template": "U"}, {"name": "default", "template": "T"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", {"chat_template": "T"}),
        ("tokenizer_config.json", {**END, "chat_template": NAMED}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "T"}),
    ],
)
def test_a_chat_template_is_found_where_hugging_face_puts_it(tmp_path: Path, name: str, content: object) -> None:
    folder = tiny.plain_tokenizer(tmp_path)
    (folder / name).write_text(json.dumps(content))
    assert Tokenizer.load(folder).chat_template == "T"


def test_the_end_token_may_stand_in_the_special_tokens_map(tmp_path: Path) -> None:
    folder = tiny.plain_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert Tokenizer.load(folder).eos_id == 0


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found no tokenizer\.json; expected a fast tokenizer\. Convert it once"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    folder = tiny.plain_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="found no eos_token; expected an end token"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(RecipeError, match="found eos_token '<end>', which its vocabulary lacks"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "found broken JSON"),
        (b"[" * 100_000, "found broken JSON"),
        (b"[]", "found a JSON list; expected one JSON object"),
        (b'{"model": null}', "found no 'model'; expected a file of the tokenizers library"),
        (b'{"model": {"type": "Nope"}}', "found a tokenizer that the tokenizers library .* cannot read"),
        (b"\xff{}", "found bytes that are not UTF-8 at offset 0"),
    ],
)
def test_a_broken_tokenizer_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    folder = tiny.plain_tokenizer(tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Tokenizer.load(folder)


def test_a_special_token_of_one_character_that_the_model_reads_is_refused(tmp_path: Path) -> None:
    folder = tiny.t5_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "sep_token": "|"}))
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(DataError, match=r"found the special token '\|', which this tokenizer cannot read as text"):
        tokenizer.encode(["a|b"], first=True)


def test_text_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, keeptune.text.batches, keeptune.text.table, keeptune.text.template; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def edited(folder: Path, key: str, value: object) -> Path:
    tiny.chatml_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**content, key: value}), encoding="utf-8")
    return folder


def test_a_normaliser_that_makes_texts_endless_is_refused_before_it_runs(tmp_path: Path) -> None:
    twice = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    for times, is_refused in ((9, False), (16, True), (60, True)):
        folder = edited(tmp_path / str(times), "normalizer", {"type": "Sequence", "normalizers": [twice] * times})
        if is_refused:
            with pytest.raises(RecipeError, match=r"tokenizer.json: found a normalizer that can make a text .* longer"):
                Tokenizer.load(folder)
        else:
            Tokenizer.load(folder)


def test_a_tokenizer_on_which_the_library_panics_is_refused(tmp_path: Path) -> None:
    template = {"single": [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}], "pair": [], "special_tokens": {}}
    folder = edited(tmp_path / "t", "post_processor", {"type": "TemplateProcessing", **template})
    with pytest.raises(RecipeError, match=r"tokenizer.json: found a tokenizer that the tokenizers library"):
        Tokenizer.load(folder)
