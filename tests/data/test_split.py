"""Law "Splits": the group's hash decides, groups never straddle, train is held against what was held out."""

from __future__ import annotations

import itertools
import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from keeptune.data.clean import digest, key_numbers, near_duplicates, prompt_key
from keeptune.data.leaks import LEAK_KINDS, LeakKind, find_leaks
from keeptune.data.ngrams import Hashes, normalised
from keeptune.data.record import SPLIT_NAMES, Message, Record, SplitName, record_id
from keeptune.data.split import NO_SPLIT, assign_splits, join_inputs, key_text, split_name

SPLITS: list[SplitName] = ["train", "test"]
WORDS = ["red", "blue", "green", "one", "two", "three", "north", "south", "sun", "moon", "river", "stone"]


def record(prompt: str, completion: str = "yes", *, task: str = "task") -> Record:
    messages = (Message("user", prompt), Message("assistant", completion))
    return Record(record_id(task, messages), task, "file.jsonl:1", messages)


def story(i: int, num_words: int = 30) -> str:
    """A text that shares no word with another number's."""
    return " ".join(f"s{i}w{k}" for k in range(num_words))


@dataclass(frozen=True)
class Result:
    splits: list[SplitName]
    groups: list[str]
    num_groups: int
    num_joined: int
    num_moved: int
    largest_group: int


@dataclass(frozen=True)
class Leak:
    train_id: str
    held_out_id: str
    split: SplitName
    kind: LeakKind
    overlap_fraction: float


def keys_of(records: Sequence[Record]) -> Hashes:
    return key_numbers(b"".join(digest(normalised(r.prompt)) for r in records))


def numbers(splits: Sequence[SplitName | None]) -> NDArray[np.int8]:
    return np.array([NO_SPLIT if split is None else SPLIT_NAMES.index(split) for split in splits], np.int8)


def assigned(
    records: Sequence[Record],
    *,
    fixed: Sequence[SplitName | None] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.3,
    test_fraction: float = 0.3,
) -> Result:
    keys = keys_of(records)
    result = assign_splits(
        keys,
        tasks=np.array(["ab".find(r.task) + 1 for r in records], np.int32),
        near=near_duplicates([r.prompt for r in records], tasks=[r.task for r in records]).groups,
        fixed=numbers(fixed or [None] * len(records)),
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    return Result(
        [SPLIT_NAMES[i] for i in result.splits],
        [key_text(keys[i]) for i in result.groups],
        result.num_groups,
        result.num_joined,
        result.num_moved,
        result.largest_group,
    )


def leaks(records: Sequence[Record], splits: Sequence[SplitName]) -> list[Leak]:
    near = near_duplicates([r.prompt for r in records], tasks=[r.task for r in records])
    found = find_leaks(records, keys=keys_of(records), groups=near.groups, splits=numbers(splits))
    rows = zip(found.train, found.held_out, found.kinds, found.overlap_fractions, strict=True)
    return [Leak(records[i].id, records[j].id, splits[j], LEAK_KINDS[kind], share) for i, j, kind, share in rows]


def prompt_in(split: SplitName, *, start: int = 0, **options: float) -> str:
    """The first story from number `start` on whose own prompt is drawn for `split`."""
    fractions = {"validation_fraction": 0.3, "test_fraction": 0.3, **options}
    return next(s for s in map(story, itertools.count(start)) if own_split(s, **fractions) == split)


def own_split(prompt: str, *, validation_fraction: float = 0.3, test_fraction: float = 0.3) -> SplitName:
    return split_name(
        prompt_key(record(prompt)), seed=0, validation_fraction=validation_fraction, test_fraction=test_fraction
    )


def test_fractions_hold_in_expectation() -> None:
    counts = Counter(split_name(f"g{i}", seed=1, validation_fraction=0.1, test_fraction=0.2) for i in range(20_000))
    assert counts["validation"] == pytest.approx(2000, abs=150)
    assert counts["test"] == pytest.approx(4000, abs=200)


def test_a_split_is_a_pure_function_of_group_and_seed() -> None:
    names = [split_name(f"g{i}", seed=0, validation_fraction=0.2, test_fraction=0.2) for i in range(6)]
    assert names == ["train", "test", "train", "train", "validation", "train"]
    others = [split_name(f"g{i}", seed=1, validation_fraction=0.2, test_fraction=0.2) for i in range(200)]
    assert others != [split_name(f"g{i}", seed=0, validation_fraction=0.2, test_fraction=0.2) for i in range(200)]


def test_no_fraction_means_all_train() -> None:
    names = {split_name(f"g{i}", seed=0, validation_fraction=0.0, test_fraction=0.0) for i in range(100)}
    assert names == {"train"}


def test_equal_prompts_share_a_split_whatever_completion_and_task() -> None:
    records = [
        record(f"{text}{end}", completion, task=task)
        for text in map(story, range(40))
        for end, completion, task in [("", "a", "x"), (" ", "b", "x"), ("", "a", "y")]
    ]
    result = assigned(records)
    assert all(len(set(result.splits[i : i + 3])) == 1 for i in range(0, 120, 3))
    assert result.num_groups == 40
    assert set(result.splits) == {"train", "validation", "test"}


def test_near_duplicates_share_the_split_of_the_smaller_key() -> None:
    moved = 0
    for i in range(30):
        first, second = story(i), f"{story(i)} end"
        result = assigned([record(first), record(second)])
        assert len(set(result.splits)) == 1
        key = min(prompt_key(record(first)), prompt_key(record(second)))
        assert result.groups == [key, key]
        assert result.splits[0] == split_name(key, seed=0, validation_fraction=0.3, test_fraction=0.3)
        assert (result.num_groups, result.num_joined, result.largest_group) == (1, 1, 2)
        assert result.num_moved == (own_split(first) != own_split(second))
        moved += result.num_moved
    assert moved > 5


@st.composite
def some_records(draw: st.DrawFn, names: str = "ab") -> list[Record]:
    """Records with equal, near and unrelated prompts in two tasks."""
    found = []
    for i in draw(st.lists(st.integers(0, 8), min_size=1, max_size=25)):
        text = f"{names} {story(i)}"
        ending = draw(st.sampled_from(["", " ", " end", " stop"]))
        found.append(record(text + ending, draw(st.sampled_from(["yes", "no"])), task=draw(st.sampled_from(names))))
    return found


@settings(max_examples=40, deadline=None)
@given(some_records())
def test_groups_never_straddle_splits(records: list[Record]) -> None:
    result = assigned(records)
    near = near_duplicates([r.prompt for r in records])
    for groups in (result.groups, near.groups.tolist(), [prompt_key(r) for r in records]):
        of_group: dict[object, set[SplitName]] = {}
        for group, split in zip(groups, result.splits, strict=True):
            of_group.setdefault(group, set()).add(split)
        assert all(len(splits) == 1 for splits in of_group.values())


@settings(max_examples=40, deadline=None)
@given(some_records(), st.randoms(use_true_random=False))
def test_permuting_rows_moves_no_record(records: list[Record], shuffler: random.Random) -> None:
    before = dict(zip((r.id for r in records), assigned(records).splits, strict=True))
    shuffler.shuffle(records)
    after = dict(zip((r.id for r in records), assigned(records).splits, strict=True))
    assert after == before


@settings(max_examples=40, deadline=None)
@given(some_records(), st.lists(st.integers(100, 160), max_size=30), st.randoms(use_true_random=False))
def test_adding_unrelated_rows_moves_no_record(
    records: list[Record], others: list[int], shuffler: random.Random
) -> None:
    before = dict(zip((r.id for r in records), assigned(records).splits, strict=True))
    more = [*records, *(record(story(i), task="ab"[i % 2]) for i in others)]
    shuffler.shuffle(more)
    after = dict(zip((r.id for r in more), assigned(more).splits, strict=True))
    assert {id_: after[id_] for id_ in before} == before


def test_own_files_are_taken_as_they_are_and_only_the_missing_split_is_carved() -> None:
    records = [record(story(i)) for i in range(200)]
    fixed: list[SplitName | None] = ["test" if i < 20 else None for i in range(200)]
    result = assigned(records, fixed=fixed)
    assert result.splits[:20] == ["test"] * 20
    assert set(result.splits[20:]) == {"train", "validation"}
    assert Counter(result.splits[20:])["validation"] == pytest.approx(54, abs=20)


def test_a_copy_of_an_own_test_record_goes_to_train_where_it_is_seen() -> None:
    text = prompt_in("validation")
    records = [record(text), record(f"{text} end"), record(text, task="other")]
    result = assigned(records, fixed=["test", None, None])
    assert result.splits == ["test", "train", "train"]
    assert [leak.kind for leak in leaks(records, result.splits)] == ["near", "exact"]


def test_a_group_drawn_for_a_split_closed_to_one_of_its_tasks_goes_to_train() -> None:
    text = prompt_in("test")
    records = [record(story(900), task="own"), record(text, task="own"), record(text, task="free")]
    assert assigned(records, fixed=["test", None, None]).splits == ["test", "train", "train"]
    assert assigned(records[1:]).splits == ["test", "test"]


def joined(sizes: Sequence[int], links: Sequence[tuple[int, int]], *, order: Sequence[int] | None = None) -> list[str]:
    """Which groups of near-duplicates, a, b, ... of so many records, share a new group; links are between records."""
    near = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes).astype(np.int32)
    order = list(order or range(len(near)))
    place = {old: new for new, old in enumerate(order)}
    firsts: dict[int, int] = {}
    for i, group in enumerate(near.tolist()):
        firsts[group] = min(firsts.get(group, place[i]), place[i])
    keys = np.stack([np.zeros(len(near)), np.arange(len(near))], axis=1).astype(np.uint64)
    ends = np.array([[place[i], place[j]] for i, j in links], np.int32).reshape(-1, 2)
    found = join_inputs(
        np.array([firsts[int(near[i])] for i in order], np.int32), [(ends[:, 0], ends[:, 1])], keys=keys[order]
    )
    names = dict(zip(sorted(firsts), string.ascii_lowercase, strict=False))
    members: dict[int, set[str]] = {}
    for old, new in place.items():
        members.setdefault(int(found[new]), set()).add(names[near.tolist()[old]])
    return sorted("".join(sorted(group)) for group in members.values())


def test_groups_that_share_an_input_with_one_record_are_joined() -> None:
    assert joined([1, 1, 1, 1], [(0, 1), (0, 2), (1, 2)]) == ["abc", "d"]
    assert joined([3, 1, 1], [(0, 3), (2, 4)]) == ["abc"]


def test_a_chain_of_links_joins_no_ends() -> None:
    """Each is linked to the next alone. b has two links and the smallest key of those: it takes a and c, then d e."""
    assert joined([1] * 6, [(i, i + 1) for i in range(5)]) == ["abc", "de", "f"]


def test_a_question_that_is_asked_of_two_stories_does_not_join_them() -> None:
    # One of four records of either story asks it: neither story shares its input with the other.
    assert joined([4, 4], [(0, 4)]) == ["a", "b"]
    assert joined([4, 4], [(0, 4), (1, 4)]) == ["ab"]
    # A record of the question alone goes to the larger story.
    assert joined([4, 5, 1], [(0, 9), (4, 9)]) == ["a", "bc"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_what_shares_an_input_depends_on_content_alone(sizes: list[int], shuffler: random.Random) -> None:
    num = sum(sizes)
    links = [(shuffler.randrange(num), shuffler.randrange(num)) for _ in range(num)]
    order = shuffler.sample(range(num), num)
    assert joined(sizes, links) == joined(sizes, links, order=order)
    # Unrelated records, which come before all, change nothing.
    alone = joined([*sizes, 1, 2], links, order=[num + 2, *range(num), num, num + 1])
    assert [group for group in alone if not set(group) & set(string.ascii_lowercase[len(sizes) :])] == joined(
        sizes, links
    )


def test_an_exact_leak_is_a_train_record_with_a_held_out_prompt() -> None:
    train, held_out = record("What is it?", "a"), record("what is  it?", "b")
    assert leaks([train, held_out], ["train", "validation"]) == [
        Leak(train.id, held_out.id, "validation", "exact", 1.0)
    ]


def test_a_near_leak_says_how_similar_the_prompts_are() -> None:
    train, held_out = record(story(1)), record(f"{story(1)} end")
    # 28 runs of 3 words and one more.
    (leak,) = leaks([train, held_out], ["train", "test"])
    assert (leak.kind, leak.split, leak.overlap_fraction) == ("near", "test", pytest.approx(28 / 29))


def test_more_than_half_of_the_words_in_shared_runs_is_a_leak() -> None:
    held_out = record(f"{story(1, 20)} {story(2, 19)}")
    train = record(f"{story(3, 60)} {story(1, 20)}")
    (leak,) = leaks([train, held_out], ["train", "test"])
    assert (leak.kind, leak.overlap_fraction) == ("ngram_cover", pytest.approx(20 / 39))
    # Exactly half is none, but a run of 13 words is reported.
    half = record(f"{story(1, 20)} {story(2, 20)}")
    (leak,) = leaks([train, half], ["train", "test"])
    assert (leak.kind, leak.overlap_fraction) == ("ngram_13", pytest.approx(20 / 40))


def test_runs_of_four_words_cover_nothing() -> None:
    pieces = [story(i, 4) for i in range(9)]
    held_out, train = record(" ".join(pieces)), record(f" {story(50, 3)} ".join(reversed(pieces)))
    assert leaks([train, held_out], ["train", "test"]) == []


def test_a_run_of_five_words_alone_is_no_leak_and_six_are() -> None:
    def found(num_words: int) -> list[LeakKind]:
        held_out = record(f"{story(1, num_words)} {story(2, 4)}")
        return [leak.kind for leak in leaks([record(f"{story(1, num_words)} {story(3, 9)}"), held_out], SPLITS)]

    assert (found(5), found(6)) == ([], ["ngram_cover"])


@pytest.mark.parametrize("num_words", range(8, 41))
def test_one_changed_word_hides_no_leak(num_words: int) -> None:
    """A word in twenty, at least one: changed are those around the middle, where they break the longest runs."""
    words = story(1, num_words).split()
    for i in range(0, max(1, num_words // 20)):
        words[num_words // 2 + 7 * i] = f"changed{i}"
    # Of eight to ten words a change in the middle leaves no run of more than five: these stay unseen.
    expected = [] if num_words in (8, 9, 10) else ["ngram_cover"]
    found = leaks([record(f"{' '.join(words)} {story(9, 30)}"), record(story(1, num_words))], SPLITS)
    assert [leak.kind for leak in found] == expected


def test_two_train_records_that_cover_half_together_are_no_leak() -> None:
    held_out = record(f"{story(1, 10)} {story(2, 10)} {story(3, 10)}")
    train = [record(f"{story(1, 10)} {story(8, 40)}"), record(f"{story(2, 10)} {story(9, 40)}")]
    assert leaks([*train, held_out], ["train", "train", "test"]) == []


def test_completions_are_compared_only_from_twenty_words_on() -> None:
    def pair(num_words: int) -> list[Record]:
        return [record(story(i), f"{story(9, num_words)}") for i in (1, 2)]

    assert leaks(pair(19), ["train", "test"]) == []
    assert [leak.kind for leak in leaks(pair(20), ["train", "test"])] == ["ngram_cover"]


def test_prompts_are_sought_in_completions_and_completions_in_prompts() -> None:
    answer_in_prompt = [record(f"Shorten: {story(9, 20)}", "ok"), record(story(1), story(9, 20))]
    prompt_in_answer = [record("Write a task", f"Here it is: {story(1, 8)} {story(2, 12)}"), record(story(1, 8))]
    for pair in (answer_in_prompt, prompt_in_answer):
        (leak,) = leaks(pair, SPLITS)
        assert (leak.kind, leak.overlap_fraction) == ("ngram_cover", 1.0)
    # What a held-out text has in common with itself is none.
    assert leaks([record(story(3)), record(story(9, 30), story(9, 30))], SPLITS) == []


def test_the_wording_of_a_template_floods_nothing() -> None:
    template = " ".join(f"template{k}" for k in range(40))
    records = [record(f"{template} {story(i, 12)}") for i in range(30)]
    splits: list[SplitName] = ["test" if i % 3 == 0 else "train" for i in range(30)]
    assert leaks(records, splits) == []
    # The input of a held-out record is still found under another wording.
    records.append(record(f"{story(500, 40)} {story(0, 12)}"))
    (leak,) = leaks(records, [*splits, "train"])
    assert (leak.train_id, leak.held_out_id, leak.kind, leak.overlap_fraction) == (
        records[-1].id, records[0].id, "ngram_cover", 1.0,
    )  # fmt: skip


def test_without_held_out_or_train_records_nothing_leaks() -> None:
    records = [record("same prompt"), record("same prompt", "no")]
    assert leaks(records, ["train", "train"]) == []
    assert leaks(records, ["test", "validation"]) == []
    assert leaks([], []) == []


def runs_of(text: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def plain_cover(item: list[str], train: list[str], n: int, *, others: list[tuple[int, list[str]]]) -> float:
    """The share of the item's words in runs of `n` words that the train text has, in plain Python.

    A word counts as the most common of its runs, (3 / k)² where k > 3 groups of the texts `others` have it.
    """
    runs = runs_of(item, n)
    groups = [{group for group, text in others if run in runs_of(text, n)} for run in runs]
    weights = [1.0] * len(item)
    for i, found in enumerate(groups):
        for k in range(n):
            weights[i + k] = min(weights[i + k], (3 / max(len(found), 3)) ** 2)
    covered = {i + k for i, run in enumerate(runs) if run in runs_of(train, n) for k in range(n)}
    return sum(weights[i] for i in covered) / sum(weights) if len(covered) >= 6 else 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=7), min_size=2, max_size=9), st.integers(1, 4))
def test_covers_are_those_of_comparing_all_pairs(texts: list[list[int]], num_held_out: int) -> None:
    prompts = [" ".join(story(i, 9) for i in pieces) for pieces in texts]
    records = [record(f"{prompt} u{k}") for k, prompt in enumerate(prompts)]
    splits: list[SplitName] = ["test" if i < num_held_out else "train" for i in range(len(records))]
    found = {leak.train_id: leak for leak in leaks(records, splits) if leak.kind not in {"exact", "near"}}
    near = near_duplicates([r.prompt for r in records]).groups
    held_out_groups = {near[i] for i, split in enumerate(splits) if split == "test"}
    items = [records[i].prompt.split() for i, split in enumerate(splits) if split == "test"]
    left = [i for i, split in enumerate(splits) if split == "train" and near[i] not in held_out_groups]
    for kind, n, above in (("ngram_cover", 5, 0.5), ("ngram_13", 13, 0.0)):
        train = {i: records[i].prompt.split() for i in left}
        held_out = [i for i, split in enumerate(splits) if split == "test"]
        compared = range(len(records)) if n == 5 else [*held_out, *left]
        others = [(int(near[i]), records[i].prompt.split()) for i in compared]
        for i, text in train.items():
            best = max(plain_cover(item, text, n, others=others) for item in items)
            leak = found.get(records[i].id)
            if best > above + 1e-4:
                assert leak is not None
                assert (leak.kind, leak.overlap_fraction) == (kind, pytest.approx(best, abs=1e-3))
            elif best <= above and n == 13:
                assert leak is None
        left = [i for i in left if found.get(records[i].id) is None or found[records[i].id].kind != kind]
