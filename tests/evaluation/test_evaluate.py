from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from keeptune.data.record import Message, Record, record_id
from keeptune.errors import DataError, Interrupted, NonFiniteError, OutOfMemoryError, StorageError
from keeptune.evaluation.evaluate import Bench, Split, evaluate_model, read_answers, validation_value
from keeptune.evaluation.generate import Decoding
from keeptune.evaluation.scores import paired_differences, score_answers
from keeptune.model.divergence import pair_divergences
from keeptune.model.loss import target_losses
from keeptune.progress import Silent
from keeptune.storage import read_json, verify_folder
from keeptune.text.batches import pack, pad, pad_pairs
from keeptune.text.template import make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example, tokenize

SHARED = Path(__file__).resolve().parents[3] / "shared"
PAD, EOS = 256, 257
METRICS = ("rougeL", "exact_match", "bleu")


@dataclass(frozen=True)
class Table:
    """Examples in memory."""

    record_ids: list[str]
    rows: list[Example]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(row.input_ids) for row in self.rows])

    @property
    def num_targets(self) -> NDArray[np.int64]:
        return np.array([int(row.loss_mask.sum()) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Example:
        return self.rows[index]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte, a padding and an end token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<pad>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    return Tokenizer.load(folder)


def record(prompt: str, completion: str, *, task: str = "t") -> Record:
    messages = (Message("user", prompt), Message("assistant", completion))
    return Record(record_id(task, messages), task, "made:1", messages)


RECORDS = [
    record("What is red?", "a colour"),
    record("Say yes or no, please, whichever you like better today.", "yes", task="u"),
    record("what  is RED?", "the colour of blood"),
    record("Count.", "1 2 3\n4 5 6 "),
    record("Name a cat!", "Tom", task="u"),
    record("Spell ü in two letters, as they do in Zürich.", "ue", task="u"),
]


def split_of(records: Sequence[Record], tokenizer: Tokenizer, *, pairs: bool = False, max_length: int = 200) -> Split:
    template = make_template("plain", tokenizer=tokenizer, encoder_decoder=pairs)
    rows = [
        (item.record.id, item.example)
        for item in tokenize(
            records,
            tokenizer=tokenizer,
            template=template,
            train_on="all",
            max_length=max_length,
            over_length="drop",
            encoder_decoder=pairs,
        )
        if item.example is not None
    ]
    table = Table([id_ for id_, _ in rows], [example for _, example in rows])
    return Split("test", records, table, num_left_out=len(records) - len(rows))


def bench_of(tokenizer: Tokenizer, *, layout: str = "packed", tokens_per_batch: int = 300) -> Bench:
    collate = {
        "packed": pack,
        "padded": functools.partial(pad, pad_id=PAD),
        "pairs": functools.partial(pad_pairs, pad_id=PAD),
    }
    decoding = Decoding(
        max_new_tokens=10,
        stop_ids=(EOS, 30, 31, 32, 33, 34, 35, 36, 37),
        pad_id=PAD,
        tokens_per_batch=tokens_per_batch,
        encoder_decoder=layout == "pairs",
    )
    return Bench(
        template=make_template("plain", tokenizer=tokenizer, encoder_decoder=layout == "pairs"),
        decoding=decoding,
        collate=collate[layout],
        target_losses=target_losses,
        pair_divergences=pair_divergences,
        autocast=None,
        progress=Silent(),
        stop_requested=lambda: False,
    )


def llama() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, initializer_range=0.5, **sizes, **heads))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5))


def t5() -> PreTrainedModel:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(vocab_size=258, initializer_factor=4.0, **sizes, **special))


def seeded(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().float().eval()


def evaluate(model: nn.Module, split: Split, bench: Bench, folder: Path, *, metrics: Sequence[str] = METRICS) -> Any:
    return evaluate_model(
        model,
        split=split,
        bench=bench,
        metrics=metrics,
        name="base",
        shots=0,
        folder=folder,
        facts={"key": "k"},
    )


def test_samples_and_scores_say_what_was_asked_answered_and_how(tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = split_of(RECORDS, tokenizer)
    scores = evaluate(seeded(llama), split, bench_of(tokenizer), tmp_path / "zero-shot")
    lines = [json.loads(line) for line in (tmp_path / "zero-shot/samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [r.id for r in RECORDS]
    assert [line["references"] for line in lines] == [[r.completion] for r in RECORDS]
    assert [line["prompt"] for line in lines] == [r.prompt for r in RECORDS]
    assert lines[0]["cluster"] == lines[2]["cluster"] != lines[1]["cluster"]
    assert ",".join(lines[0]) == "id,task,cluster,prompt,prediction,references,ended,metrics,num_target_tokens"
    assert list(lines[0]["metrics"]) == ["rougeL", "exact_match", "bleu", "loss", "perplexity"]
    assert lines[0]["num_target_tokens"] == len("a colour") + 1

    written = read_json(tmp_path / "zero-shot/scores.json")
    assert (written["model"], written["shots"], written["split"]) == ("base", 0, "test")
    assert written["decoding"]["strategy"] == "greedy"
    assert written["decoding"]["max_new_tokens"] == 10
    assert written["decoding"]["stop_ids"][0] == EOS
    assert (written["num_records"], written["num_left_out"]) == (6, 0)
    assert written["cut_fraction"] == sum(not line["ended"] for line in lines) / 6
    assert written["metrics"]["loss"]["higher_is_better"] is False
    assert "nrefs:1|" in written["metrics"]["bleu"]["signature"]
    assert [(s["task"], s["metric"]) for s in written["scores"]][:2] == [("t", "rougeL"), ("t", "exact_match")]
    assert written["scores"][-1].keys() == {
        "model", "shots", "task", "metric", "mean", "standard_error", "low", "high", "num_records", "num_clusters",
    }  # fmt: skip
    assert [s["mean"] for s in written["scores"]] == [score.mean for score in scores]
    assert {s["num_clusters"] for s in written["scores"] if s["task"] == "all"} == {5}
    manifest = verify_folder(tmp_path / "zero-shot")
    assert manifest is not None
    assert manifest["key"] == "k"


def test_the_loss_is_that_of_transformers_on_the_completion_and_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, split = seeded(llama), split_of(RECORDS, tokenizer)
    evaluate(model, split, bench_of(tokenizer), tmp_path / "a", metrics=["loss"])
    for found, one in zip(read_answers(tmp_path / "a"), RECORDS, strict=True):
        prompt, completion = (f"{one.prompt}\n").encode(), one.completion.encode()
        text = tokenizer.encode([(prompt + completion).decode()], first=True)[0] + [EOS]
        labels = [-100] * len(prompt) + text[len(prompt) :]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([text]), labels=torch.tensor([labels])).loss
        assert found.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert found.metrics["perplexity"] == pytest.approx(math.exp(float(expected)), rel=1e-4)


@pytest.mark.parametrize(("make", "layouts"), [(llama, ["packed", "padded"]), (gpt2, ["padded"]), (t5, ["pairs"])])
def test_neither_batch_size_nor_layout_changes_an_answer_or_its_loss(
    make: Callable[[], PreTrainedModel], layouts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, split = seeded(make), split_of(RECORDS, tokenizer, pairs=make is t5)
    answers = {}
    for layout in layouts:
        for tokens_per_batch in (1, 150, 100_000):
            folder = tmp_path / f"{layout}-{tokens_per_batch}"
            bench = bench_of(tokenizer, layout=layout, tokens_per_batch=tokens_per_batch)
            evaluate(model, split, bench, folder)
            answers[folder] = read_answers(folder)
    first, *others = answers.values()
    assert len({answer.prediction for answer in first}) > 1, "the test wants different answers"
    for other in others:
        assert [(a.prediction, a.ended) for a in other] == [(a.prediction, a.ended) for a in first]
        for a, b in zip(first, other, strict=True):
            assert a.metrics["rougeL"] == b.metrics["rougeL"]
            assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-5)


def test_predictions_are_what_follows_the_prompt_without_the_stop_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, split, bench = seeded(llama), split_of(RECORDS, tokenizer), bench_of(tokenizer)
    evaluate(model, split, bench, tmp_path / "a")
    for found, one in zip(read_answers(tmp_path / "a"), RECORDS, strict=True):
        ids = tokenizer.encode([f"{one.prompt}\n"], first=True)[0]
        new: list[int] = []
        while len(new) < 10 and not set(new) & set(bench.decoding.stop_ids):
            with torch.no_grad():
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert found.ended == (new[-1] in bench.decoding.stop_ids)
        assert found.prediction == tokenizer.decode(new[:-1] if found.ended else new, skip_special_tokens=True)


def test_of_several_turns_the_last_completion_alone_is_answered_and_scored(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turns = (Message("user", "One?"), Message("assistant", "1"), Message("user", "Two?"), Message("assistant", "two"))
    split = split_of([Record("r", "t", "made:1", turns)], tokenizer)
    assert int(split.examples.num_targets[0]) == len("1") + 1 + len("two") + 1
    evaluate(seeded(llama), split, bench_of(tokenizer), tmp_path / "a")
    (found,) = read_answers(tmp_path / "a")
    assert found.references == ("two",)
    assert found.num_target_tokens == len("two") + 1


def test_records_without_tokens_are_counted_as_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = split_of(RECORDS, tokenizer, max_length=30)
    evaluate(seeded(llama), split, bench_of(tokenizer), tmp_path / "a")
    written = read_json(tmp_path / "a/scores.json")
    assert (written["num_records"], written["num_left_out"]) == (3, 3) == (len(split.examples), 3)


def test_the_prompts_hash_changes_with_the_prompts_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    hashes = []
    for i, (records, make) in enumerate([(RECORDS, llama), (RECORDS, gpt2), (RECORDS[:5], llama)]):
        layout = "packed" if make is llama else "padded"
        evaluate(seeded(make), split_of(records, tokenizer), bench_of(tokenizer, layout=layout), tmp_path / str(i))
        hashes.append(read_json(tmp_path / str(i) / "scores.json")["prompt_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("metric", ["loss", "perplexity", "rougeL", "bleu"])
def test_a_validation_value_is_the_overall_score(metric: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, split, bench = seeded(llama), split_of(RECORDS, tokenizer), bench_of(tokenizer)
    scores = evaluate(model, split, bench, tmp_path / "a")
    (expected,) = [score.mean for score in scores if (score.task, score.metric) == ("all", metric)]
    value = validation_value(model, split=split, bench=bench, metric=metric, num_records=99)
    assert value == pytest.approx(expected, rel=1e-9)


def test_a_bounded_validation_takes_the_same_records_in_any_order(tokenizer: Tokenizer) -> None:
    model, bench = seeded(llama), bench_of(tokenizer)
    values = [
        validation_value(model, split=split_of(records, tokenizer), bench=bench, metric="loss", num_records=2)
        for records in (RECORDS, RECORDS[::-1], sorted(RECORDS, key=lambda r: r.id)[:2])
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] == pytest.approx(values[2], rel=1e-6)


def fails(*_: Any, **__: Any) -> Any:
    raise AssertionError("not needed for this value")


def test_validation_computes_only_what_its_metric_needs(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, split, bench = seeded(llama), split_of(RECORDS, tokenizer), bench_of(tokenizer)
    without_loss = replace(bench, target_losses=fails)
    assert 0 <= validation_value(model, split=split, bench=without_loss, metric="rougeL", num_records=3) <= 1
    monkeypatch.setattr(model, "generate", fails)
    assert validation_value(model, split=split, bench=bench, metric="perplexity", num_records=3) > 1


def test_a_loss_that_is_not_finite_is_refused_with_its_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = seeded(llama)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(NonFiniteError) as error:
        evaluate(model, split_of(RECORDS, tokenizer), bench_of(tokenizer), tmp_path / "a")
    assert str(error.value) == (
        f"record {RECORDS[0].id}: found a loss of nan on its completion, and so on 6 of 6 records; expected finite "
        "ones. The weights are broken: train with a lower learning_rate."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_stop_leaves_nothing_half_written(after: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    calls = iter([False] * after)
    bench = replace(bench_of(tokenizer, tokens_per_batch=1), stop_requested=lambda: next(calls, True))
    evaluate(seeded(llama), split_of(RECORDS, tokenizer), bench_of(tokenizer), tmp_path / "a")
    before = (tmp_path / "a/samples.jsonl").read_bytes()
    with pytest.raises(
        Interrupted, match=r"^(answers|losses): stopped on request; .*the same command again to go on\.$"
    ):
        evaluate(seeded(gpt2), split_of(RECORDS, tokenizer), bench, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a/samples.jsonl").read_bytes() == before


def test_a_stop_is_heard_between_losses(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = seeded(llama), iter([False, False])
    monkeypatch.setattr(model, "generate", fails)
    bench = replace(bench_of(tokenizer, tokens_per_batch=1), stop_requested=lambda: next(calls, True))
    with pytest.raises(Interrupted, match=r"^losses: stopped on request; .*the same command again to go on\.$"):
        validation_value(model, split=split_of(RECORDS, tokenizer), bench=bench, metric="loss", num_records=9)


def test_special_tokens_in_an_answer_are_no_text(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (hi,) = seeded(llama), tokenizer.encode(["hi"], first=False)

    def says_hi(input_ids: Tensor, **_: Any) -> Tensor:
        return torch.tensor([[*row, PAD, *hi, PAD, EOS] for row in input_ids.tolist()])

    monkeypatch.setattr(model, "generate", says_hi)
    evaluate(model, split_of(RECORDS, tokenizer), bench_of(tokenizer), tmp_path / "a")
    assert {(found.prediction, found.ended) for found in read_answers(tmp_path / "a")} == {("hi", True)}


def test_a_loss_without_memory_names_its_setting(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def crowded(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench = replace(bench_of(tokenizer), target_losses=crowded)
    with pytest.raises(OutOfMemoryError) as error:
        evaluate(seeded(llama), split_of(RECORDS, tokenizer), bench, tmp_path / "a")
    assert str(error.value) == (
        "evaluation.tokens_per_batch: found no memory for the loss of 300 tokens; expected them to fit. "
        "Lower evaluation.tokens_per_batch."
    )
    with pytest.raises(RuntimeError, match="shape"):
        evaluate(
            seeded(llama),
            split_of(RECORDS, tokenizer),
            replace(bench, target_losses=lambda *_: (_ for _ in ()).throw(RuntimeError("shape"))),
            tmp_path / "a",
        )


def test_answers_that_were_never_written_or_edited_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"samples\.jsonl: no such file or folder; expected a place to read"):
        read_answers(tmp_path)
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:1: found no field 'id'; expected an answer written by"):
        read_answers(tmp_path)


def test_text_beyond_ascii_and_lone_surrogates_survive_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [record("Wie heißt du? 你好", "ü\u2028\ud800")]
    split = split_of([record("Wie heißt du? 你好", "ü")], tokenizer)
    split = Split("test", records, Table([records[0].id], [split.examples[0]]))
    evaluate(seeded(llama), split, bench_of(tokenizer), tmp_path / "a", metrics=["loss"])
    assert read_answers(tmp_path / "a")[0].references == ("ü\u2028\ud800",)


def test_low_precision_compute_is_used_where_asked_for(tokenizer: Tokenizer) -> None:
    seen = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return target_losses(model, batch)

    model, split = seeded(llama), split_of(RECORDS, tokenizer)
    exact = replace(bench_of(tokenizer), target_losses=losses)
    rounded = replace(exact, autocast=torch.bfloat16)
    values = [
        validation_value(model, split=split, bench=bench, metric="loss", num_records=9) for bench in (exact, rounded)
    ]
    assert values[0] == pytest.approx(values[1], rel=0.05)
    assert {*seen} == {True, False}


@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "models/english-3m").is_dir(), reason="needs ../shared/models/english-3m")
def test_a_real_base_model_is_scored_on_real_records(tmp_path: Path) -> None:
    import gzip

    from keeptune.model.load import load_model

    folder = SHARED / "models/english-3m"
    tokenizer = Tokenizer.load(folder)
    with gzip.open(SHARED / "data/p3_sample/ag_news_classify.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(100), strict=False)]
    records = [record(row["prompt"], row["completion"]) for row in rows]
    template = make_template("alpaca", tokenizer=tokenizer, encoder_decoder=False)
    items = tokenize(
        records,
        tokenizer=tokenizer,
        template=template,
        train_on="all",
        max_length=512,
        over_length="error",
        encoder_decoder=False,
    )
    table = Table([r.id for r in records], [item.example for item in items if item.example is not None])
    bench = bench_of(tokenizer, tokens_per_batch=4096)
    decoding = replace(bench.decoding, stop_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id, max_positions=1024)
    bench = replace(bench, decoding=replace(decoding, max_new_tokens=6))
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    scores = evaluate(model, Split("test", records, table), bench, tmp_path / "a", metrics=["rougeL", "exact_match"])
    by_name = {score.metric: score for score in scores if score.task == "all"}
    assert 0 <= by_name["exact_match"].mean < 0.2
    assert 1 < by_name["loss"].mean < 20
    answers = read_answers(tmp_path / "a")
    assert answers[0].prompt.endswith("What label best describes this news article?")
    assert answers[0].references == ("Business",)
    assert score_answers(answers, metrics=["rougeL", "exact_match", "loss", "perplexity"]) == scores
    (paired,) = [p for p in paired_differences(answers, answers, metrics=["loss"], model="a", against="b")][1:]
    # A loss that no record changes says nothing of how much one may: a loss has no bounds.
    assert (paired.difference, paired.low, paired.high) == (0.0, None, None)
