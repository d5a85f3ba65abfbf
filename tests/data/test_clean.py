"""Laws of keys and near-duplicates: content decides, pairs are verified, no order matters."""

from __future__ import annotations

import itertools
import json
import random
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.clean import exact_key, jaccard, near_duplicates, prompt_key
from keeptune.data.disk import DiskArray
from keeptune.data.minhash import GramSets, refined
from keeptune.data.ngrams import normalised, words
from keeptune.data.record import Message, Record, record_id

SHARED = Path(__file__).resolve().parents[3] / "shared"
LONG = (
    "the old lighthouse keeper climbed the narrow stairs every evening to light the great lamp for ships that came "
    "home late"
)
WORDS = ["red", "blue", "green", "one", "two", "three", "north", "south", "sun", "moon", "river", "stone"]


def record(prompt: str, completion: str = "yes") -> Record:
    messages = (Message("user", prompt), Message("assistant", completion))
    return Record(record_id("task", messages), "task", "file.jsonl:1", messages)


def plain_grams(text: str) -> set[object]:
    """The n-grams as the documentation describes them, in plain Python."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    found = re.findall(r"\w+", text)
    if len(found) >= 20:
        return set(zip(found, found[1:], found[2:], strict=False))
    return {text.ljust(5)[i : i + 5] for i in range(max(len(text) - 4, 1))}


def plain_jaccard(first: str, second: str) -> float:
    a, b = plain_grams(first), plain_grams(second)
    return len(a & b) / len(a | b)


def partition(groups: list[int], names: list[int] | None = None) -> set[frozenset[int]]:
    members: dict[int, set[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, set()).add(names[i] if names else i)
    return {frozenset(m) for m in members.values()}


def plain_partition(texts: list[str], threshold: float = 0.8) -> set[frozenset[int]]:
    groups = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        if plain_jaccard(texts[i], texts[j]) >= threshold:
            groups = [groups[i] if g == groups[j] else g for g in groups]
    return partition(groups)


@st.composite
def related_texts(draw: st.DrawFn) -> list[str]:
    """Texts with close and less close variants of one another."""
    texts = []
    for _ in range(draw(st.integers(1, 4))):
        base = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=60))
        texts.append(" ".join(base))
        for _ in range(draw(st.integers(0, 4))):
            variant = list(base)
            for _ in range(draw(st.integers(0, 3))):
                variant[draw(st.integers(0, len(variant) - 1))] = draw(st.sampled_from(WORDS))
            texts.append(" ".join(variant))
    return texts


def test_case_width_and_white_space_do_not_matter() -> None:
    assert normalised(" Ｆoo\n\tBAR  straße ") == "foo bar strasse"


def test_equal_normalised_prompts_have_one_key() -> None:
    assert prompt_key(record("What is  it?", "a")) == prompt_key(record("what is it?\n", "b"))
    assert prompt_key(record("What is it?")) != prompt_key(record("What is it"))
    assert re.fullmatch("[0-9a-f]{32}", prompt_key(record("x")))


def test_an_exact_key_covers_prompt_and_completion_apart() -> None:
    assert exact_key(record("A", "b")) == exact_key(record("a ", "B"))
    assert exact_key(record("a", "b")) != exact_key(record("a", "c"))
    assert exact_key(record("a b", "c")) != exact_key(record("a", "b c"))


def test_a_lone_surrogate_has_a_key() -> None:
    assert prompt_key(record("\ud800")) != prompt_key(record("\ud801"))
    assert near_duplicates(["\ud800 abc", "\ud800 abc"]).pairs.tolist() == [[0, 1]]


def test_scripts_without_spaces_are_read_by_character() -> None:
    assert words("東京 tower") == ["東", "京", "tower"]
    text = "東京は日本の首都であり世界で最も人口の多い都市の一つとして知られている大きな街です"
    assert near_duplicates([text, text.replace("街", "町")]).groups.tolist() == [0, 0]


def test_jaccard_counts_three_word_runs() -> None:
    # 21 words make 19 runs; another last word changes one of them: 18 common, 20 in all.
    assert jaccard(LONG, LONG.replace("late", "early")) == pytest.approx(18 / 20)
    # Fewer than 20 words: runs of 5 characters; abcdef has 2, abcdeg has 2, one in common.
    assert jaccard("abcdef", "abcdeg") == pytest.approx(1 / 3)


def test_pairs_at_the_threshold_are_near_and_pairs_below_are_not() -> None:
    exactly, below = "0123456789abc", "0123456789abd"
    # 9 runs each, 8 in common, 10 in all.
    assert plain_jaccard(exactly, below) == 0.8
    assert near_duplicates([exactly, below]).pairs.tolist() == [[0, 1]]
    assert near_duplicates([exactly, below]).similarities.tolist() == [0.8]
    assert near_duplicates([exactly, below], threshold=0.81).pairs.tolist() == []


def test_no_texts_one_text_and_empty_texts() -> None:
    assert near_duplicates([]).groups.tolist() == []
    assert near_duplicates(["x"]).groups.tolist() == [0]
    assert near_duplicates(["", "x", " "]).groups.tolist() == [0, 1, 0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(related_texts())
def test_groups_are_those_of_comparing_all_pairs(texts: list[str]) -> None:
    assert partition(near_duplicates(texts).groups.tolist()) == plain_partition(texts)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(related_texts())
def test_every_pair_is_verified_and_the_pairs_make_the_groups(texts: list[str]) -> None:
    near = near_duplicates(texts)
    for (i, j), similarity in zip(near.pairs, near.similarities, strict=True):
        assert i < j
        assert similarity == pytest.approx(plain_jaccard(texts[i], texts[j]))
        assert similarity >= 0.8
    assert len(near.pairs) == len(texts) - len(set(near.groups.tolist()))


@settings(max_examples=30, deadline=None)
@given(related_texts(), related_texts(), st.randoms(use_true_random=False))
def test_order_and_other_texts_break_no_link(texts: list[str], others: list[str], shuffler: random.Random) -> None:
    before = near_duplicates(texts).groups.tolist()
    names = list(range(len(texts) + len(others)))
    shuffler.shuffle(names)
    everything = [*texts, *others]
    after = near_duplicates([everything[i] for i in names]).groups.tolist()
    place = {name: k for k, name in enumerate(names)}
    for i, j in itertools.combinations(range(len(texts)), 2):
        if before[i] == before[j]:
            assert after[place[i]] == after[place[j]]


def test_a_large_cluster_is_linked_without_comparing_all_pairs() -> None:
    base = [f"word{i}" for i in range(60)]
    texts = [" ".join([*base[: k % 60], *base[k % 60 + 1 :], f"end{k}"]) for k in range(3000)]
    near = near_duplicates(texts)
    assert len(set(near.groups.tolist())) == 1
    assert len(near.pairs) == 2999


TEMPLATE = (
    "given a list of categories company school artist athlete politician transport building nature village animal "
    "plant album film and book say which one of them the following title belongs to title"
)
TITLES = [f"{a} {b}" for a in WORDS for b in WORDS[:3]]


def test_the_wording_of_a_template_joins_nothing() -> None:
    texts = [f"{TEMPLATE} {title}" for title in TITLES]
    assert len(set(near_duplicates(texts).groups.tolist())) < len(texts) / 2
    assert near_duplicates(texts, tasks=["titles"] * len(texts)).pairs.tolist() == []


def test_one_input_under_two_templates_is_joined() -> None:
    inputs = [" ".join(f"input{i}word{k}" for k in range(40)) for i in range(20)]
    texts = [f"{TEMPLATE} {text}" for text in inputs] + [f"now read this {text} and sum it up" for text in inputs]
    tasks = ["first"] * len(inputs) + ["second"] * len(inputs)
    groups = near_duplicates(texts, tasks=tasks).groups.tolist()
    assert all(groups[i] == groups[i + len(inputs)] for i in range(len(inputs)))


def test_equal_texts_of_a_template_are_joined_in_and_across_tasks() -> None:
    texts = [f"{TEMPLATE} {title}" for title in TITLES] * 2
    groups = near_duplicates(texts, tasks=["a"] * len(TITLES) + ["b"] * len(TITLES)).groups.tolist()
    assert partition(groups) == {frozenset({i, i + len(TITLES)}) for i in range(len(TITLES))}


@pytest.mark.real
def test_the_near_duplicates_of_dialogsum_are_found() -> None:
    path = SHARED / "data/dialogsum.dev.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    texts = [json.loads(line)["dialogue"] for line in path.read_text(encoding="utf-8").splitlines()]
    grams = [plain_grams(text) for text in texts]
    by_hand = {
        (i, j): len(grams[i] & grams[j]) / len(grams[i] | grams[j])
        for i, j in itertools.combinations(range(len(texts)), 2)
        if len(grams[i] & grams[j]) >= 0.8 * len(grams[i] | grams[j])
    }
    # 498 of the 500 dialogues are different; two more pairs differ in a few words.
    assert sorted(by_hand) == [(43, 116), (113, 434), (164, 191), (262, 407)]
    assert len({normalised(text) for text in texts}) == 498
    for tasks in (None, ["dialogsum"] * len(texts)):
        near = near_duplicates(texts, tasks=tasks)
        assert [tuple(pair) for pair in near.pairs.tolist()] == sorted(by_hand)
        assert near.similarities == pytest.approx([by_hand[tuple(pair)] for pair in near.pairs.tolist()])


def test_a_large_bucket_of_template_texts_loses_no_link_and_is_not_compared_pair_by_pair() -> None:
    # 38 runs of the template in 44: unrelated inputs reach 0.76, so that nearly all texts share a bucket.
    template = " ".join(f"template{k}" for k in range(40))
    texts = [f"{template} " + " ".join(f"t{i}w{k}" for k in range(6)) for i in range(400)]
    # One word of the input differs: 40 or 41 runs in common, 0.83 or more.
    texts += [f"{template} " + " ".join(f"t{i}w{k}" for k in range(4)) + f" x{i} y{i}" for i in range(0, 400, 4)]
    near = near_duplicates(texts)
    assert partition(near.groups.tolist()) == {
        *(frozenset({i, 400 + i // 4}) for i in range(0, 400, 4)),
        *(frozenset({i}) for i in range(400) if i % 4),
    }


def stored(folder: Path, gram_sets: Sequence[Collection[int]]) -> GramSets:
    grams = DiskArray(folder / "grams.u64", np.uint64)
    for gram_set in gram_sets:
        grams.append(np.array(sorted(gram_set), np.uint64))
    lengths = np.array([len(gram_set) for gram_set in gram_sets])
    return GramSets(
        grams, np.cumsum(lengths) - lengths, lengths.astype(np.int32), np.arange(len(lengths), dtype=np.int32)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 12)), min_size=2, max_size=12),
    st.integers(18, 45),
)
def test_refined_buckets_hold_every_pair_that_reaches_the_threshold(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[int, int, int]], num_template_grams: int
) -> None:
    # Twenty texts of each of three templates, with none to three pieces of own wording, some shared with others.
    gram_sets = [
        {1000 * template + k for k in range(num_template_grams)}
        | {10_000 + 100 * wording + k for k in range(num_own)}
        | {100_000 + 100 * copy + k for k in range(copy % 5)}
        for copy, (template, num_own, wording) in enumerate(kinds * 20)
    ]
    sets = stored(tmp_path_factory.mktemp("grams"), gram_sets)
    buckets = refined(sets, sets.texts, threshold=0.8)
    together = set()
    for number in set(buckets.numbers.tolist()):
        together |= set(itertools.combinations(sorted(buckets.members[buckets.numbers == number].tolist()), 2))
    for i, j in itertools.combinations(range(len(gram_sets)), 2):
        if len(gram_sets[i] & gram_sets[j]) >= 0.8 * len(gram_sets[i] | gram_sets[j]):
            assert (i, j) in together


def test_refined_buckets_leave_out_what_only_the_template_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 common n-grams of 50: unrelated ones reach 40 / 60. The last two share 5 more: 45 / 55.
    gram_sets = [{*(k << 58 for k in range(40)), *(i << 40 | k << 50 for k in range(1, 11))} for i in range(1, 41)]
    gram_sets[-1] = {*sorted(gram_sets[-1])[5:], *(39 << 40 | k << 50 for k in range(1, 6))}
    sets = stored(tmp_path, gram_sets)
    buckets = refined(sets, sets.texts, threshold=0.8)
    assert set(buckets.members.tolist()) == {38, 39}
    # At 0.6 the template alone may suffice: every pair stands in the bucket of such texts.
    rich = refined(sets, sets.texts, threshold=0.6).members.tolist()
    assert set(rich) == set(range(40))
    # However large a bucket is, what memory holds of it is bounded: in parts it comes out the same.
    monkeypatch.setattr("keeptune.data.minhash.GRAMS_PER_BATCH", 100)
    in_parts = refined(sets, sets.texts, threshold=0.8)
    assert in_parts.members.tolist() == buckets.members.tolist()
    assert refined(sets, sets.texts, threshold=0.6).members.tolist() == rich
    assert len(set(in_parts.numbers.tolist())) == len(set(buckets.numbers.tolist()))
