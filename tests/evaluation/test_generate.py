from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from keeptune.errors import DataError, Interrupted, OutOfMemoryError
from keeptune.evaluation.generate import Decoding, Generated, _batches, auto_max_new_tokens, generate
from keeptune.progress import Silent

pytestmark = [
    # PEFT asks transformers for an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PAD, VOCAB, POSITIONS = 0, 67, 64
DECODING = Decoding(
    max_new_tokens=12,
    stop_ids=(2, 3, 4, 5),
    pad_id=PAD,
    tokens_per_batch=200,
    encoder_decoder=False,
    max_positions=POSITIONS,
)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.5,
        )
    )


def gpt2() -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.5, bos_token_id=1, eos_token_id=2, **sizes))


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            initializer_range=0.5,
        )
    )


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            init_std=0.5,
        )
    )


def t5() -> PreTrainedModel:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, initializer_factor=4.0, **sizes, **special))


def bart() -> PreTrainedModel:
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=POSITIONS,
            init_std=0.5,
            pad_token_id=PAD,
            decoder_start_token_id=2,
        )
    )
    model.generation_config.forced_bos_token_id = 1
    return model


def prompt_tuned() -> PreTrainedModel:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(gpt2(), config)  # pyright: ignore[reportReturnType]


def prompt_tuned_t5() -> PreTrainedModel:
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    return get_peft_model(t5(), config)  # pyright: ignore[reportReturnType]


def lora() -> PreTrainedModel:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(llama(), config)  # pyright: ignore[reportReturnType]


MODELS: list[Callable[[], PreTrainedModel]] = [
    llama,
    gpt2,
    gpt_neox,
    opt,
    t5,
    bart,
    lora,
    prompt_tuned,
    prompt_tuned_t5,
]


def seeded(make: Callable[[], PreTrainedModel], *, seed: int = 0) -> tuple[PreTrainedModel, Decoding]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().float().eval()
    return model, replace(DECODING, encoder_decoder=bool(model.config.is_encoder_decoder))


def prompts(count: int, *, seed: int = 0, longest: int = 50) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, VOCAB, size=rng.integers(1, longest)).tolist() for _ in range(count)]


def answer(model: Any, asked: list[list[int]], decoding: Decoding) -> list[Generated]:
    return generate(model, asked, decoding=decoding, progress=Silent(), stop_requested=lambda: False)


@torch.no_grad()
def one_by_one(model: PreTrainedModel, prompt: list[int], *, decoding: Decoding, limit: int) -> Generated:
    """Decode without cache, padding, batch or `generate`."""
    ids = [model.config.decoder_start_token_id] if decoding.encoder_decoder else list(prompt)
    start = len(ids)
    while len(ids) < start + limit:
        inputs = {"input_ids": torch.tensor([prompt if decoding.encoder_decoder else ids])}
        if decoding.encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([ids])
        ids.append(int(model(**inputs).logits[0, -1].argmax()))
        if ids[-1] in decoding.stop_ids:
            return Generated(ids[start:-1], ended=True)
    return Generated(ids[start:], ended=False)


@pytest.mark.parametrize("make", MODELS)
def test_batch_size_changes_no_answer_and_each_is_the_plain_greedy_one(make: Callable[[], PreTrainedModel]) -> None:
    model, decoding = seeded(make)
    decoding, asked = replace(decoding, max_new_tokens=7), prompts(12)
    expected = [one_by_one(model, prompt, decoding=decoding, limit=7) for prompt in asked]
    assert {found.ended for found in expected} == {True, False}, "the test wants answers of both kinds"
    assert len({tuple(found.ids) for found in expected}) > 4, "the test wants different answers"
    for tokens_per_batch in (1, 150, 100_000):
        assert answer(model, asked, replace(decoding, tokens_per_batch=tokens_per_batch)) == expected


@given(st.lists(st.integers(1, 70), max_size=30), st.integers(1, 900), st.sampled_from([None, 80]))
@settings(max_examples=60, deadline=None)
def test_batches_keep_to_the_budget_and_hold_each_prompt_once(
    lengths: list[int], tokens_per_batch: int, max_positions: int | None
) -> None:
    decoding = replace(DECODING, tokens_per_batch=tokens_per_batch, max_positions=max_positions)
    batches = list(_batches(lengths, decoding=decoding))
    assert sorted(i for batch, _ in batches for i in batch) == list(range(len(lengths)))
    for batch, limit in batches:
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + limit) <= tokens_per_batch
        assert all(decoding.new_tokens(lengths[i]) == limit for i in batch)


@pytest.mark.parametrize("make", [gpt2, opt])
def test_answers_near_the_last_position_have_their_own_limit_whatever_stands_beside_them(
    make: Callable[[], PreTrainedModel],
) -> None:
    model, decoding = seeded(make)
    decoding = replace(decoding, stop_ids=(2,), tokens_per_batch=100_000)
    rng = np.random.default_rng(1)
    asked = [rng.integers(6, VOCAB, size=length).tolist() for length in (5, 63, 52, 60, 53, 60, 40)]
    limits = [12, 1, 12, 4, 11, 4, 12]
    expected = [one_by_one(model, p, decoding=decoding, limit=n) for p, n in zip(asked, limits, strict=True)]
    assert answer(model, asked, decoding) == expected


@pytest.mark.parametrize(("make", "length"), [(gpt2, 64), (bart, 65)])
def test_a_prompt_without_room_for_an_answer_is_refused(make: Callable[[], PreTrainedModel], length: int) -> None:
    model, decoding = seeded(make)
    with pytest.raises(DataError) as error:
        answer(model, [[9], [9] * length], decoding)
    assert str(error.value) == (
        f"prompt 1: found {length} tokens; expected fewer than the model's 64 positions. Lower data.max_length."
    )


def test_with_an_encoder_the_prompt_takes_no_room_from_the_answer() -> None:
    assert replace(DECODING, encoder_decoder=True).new_tokens(64) == 12
    assert replace(DECODING, encoder_decoder=True, max_new_tokens=99).new_tokens(10) == 64
    assert replace(DECODING, max_positions=None).new_tokens(10**6) == 12


def test_every_stop_id_ends_an_answer_and_none_stays_in_it() -> None:
    model, decoding = seeded(llama)
    asked = prompts(40, seed=3)
    without = answer(model, asked, replace(decoding, stop_ids=(2,)))
    stops = sorted({found.ids[4] for found in without if len(found.ids) > 4} - {PAD})[:6]
    for found, plain in zip(answer(model, asked, replace(decoding, stop_ids=(2, *stops))), without, strict=True):
        ends = [i for i, token in enumerate(plain.ids) if token in stops]
        assert found.ids == (plain.ids[: ends[0]] if ends else plain.ids)
        assert found.ended == (bool(ends) or plain.ended)


def test_decoding_ends_as_soon_as_every_answer_has_met_any_stop_id() -> None:
    model, decoding = seeded(llama)
    calls: list[int] = []
    decoding = replace(decoding, stop_ids=tuple(range(VOCAB)), tokens_per_batch=100_000)
    found = generate(
        model, prompts(5), decoding=decoding, progress=Silent(), stop_requested=lambda: bool(calls.append(1))
    )
    assert found == [Generated([], ended=True)] * 5
    assert len(calls) == 2, "a stop is asked about after the only token, and after the batch"


def test_virtual_tokens_take_their_positions_from_the_answers() -> None:
    model, decoding = seeded(prompt_tuned)
    decoding = replace(decoding, stop_ids=(2,))
    rng = np.random.default_rng(1)
    asked = [rng.integers(6, VOCAB, size=length).tolist() for length in (60, 40)]
    expected = [one_by_one(model, p, decoding=decoding, limit=n) for p, n in zip(asked, (1, 12), strict=True)]
    assert answer(model, asked, decoding) == expected


def test_an_end_token_that_is_also_the_padding_ends_answers_too() -> None:
    model, decoding = seeded(llama)
    asked = prompts(24)
    with_own_padding = answer(model, asked, replace(decoding, stop_ids=(2, 3)))
    assert answer(model, asked, replace(decoding, stop_ids=(2, 3), pad_id=2)) == with_own_padding


@pytest.mark.parametrize("make", [llama, lora])
def test_a_models_own_sampling_and_penalties_have_no_effect_and_come_back(make: Callable[[], PreTrainedModel]) -> None:
    model, decoding = seeded(make)
    asked = prompts(16)
    expected = answer(model, asked, decoding)
    inner = model.get_base_model() if make is lora else model  # pyright: ignore
    own = inner.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3)
    own.update(suppress_tokens=list(range(6, 60)), min_new_tokens=11)
    assert answer(model, asked, decoding) == expected
    assert inner.generation_config is own


def test_modes_and_gradients_are_left_as_they_came() -> None:
    model, decoding = seeded(llama)
    model.train()
    model.model.layers[0].eval()
    answer(model, prompts(3), decoding)
    assert model.training
    assert not model.model.layers[0].training
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_answers_are_made() -> None:
    model, decoding = seeded(gpt2)
    asked = prompts(12)
    expected = answer(model, asked, decoding)
    model.train()
    assert answer(model, asked, decoding) == expected


class Crowded:
    """Runs out of memory with more than `room` prompts side by side."""

    def __init__(self, model: PreTrainedModel, *, room: int, error: BaseException) -> None:
        self.generate_, self.room, self.error, self.sizes = model.generate, room, error, []

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        self.sizes.append(len(kwargs["input_ids"]))
        if self.sizes[-1] > self.room:
            raise self.error
        return self.generate_(**kwargs)  # pyright: ignore


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["cuda", "python", "host"])
def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    model, decoding = seeded(llama)
    decoding = replace(decoding, tokens_per_batch=100_000)
    asked = prompts(7)
    expected = answer(model, asked, decoding)
    crowded = Crowded(model, room=4, error=error)
    monkeypatch.setattr(model, "generate", crowded)
    assert answer(model, asked, decoding) == expected
    assert crowded.sizes == [7, 4, 3]


def test_half_a_batch_that_does_not_fit_either_stops_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoding = seeded(llama)
    monkeypatch.setattr(model, "generate", Crowded(model, room=0, error=MemoryError()))
    for count, tried in ((9, 5), (1, 1)):
        with pytest.raises(OutOfMemoryError) as error:
            answer(model, prompts(count), replace(decoding, tokens_per_batch=1000))
        assert str(error.value) == (
            f"evaluation.tokens_per_batch: found no memory for {tried} answers of up to 12 tokens side by side; "
            "expected 1000 tokens, or one answer, to fit. Lower evaluation.tokens_per_batch or "
            "evaluation.max_new_tokens."
        )


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoding = seeded(llama)
    monkeypatch.setattr(model, "generate", Crowded(model, room=0, error=RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        answer(model, prompts(2), decoding)


def test_a_stop_is_heard_within_an_answer() -> None:
    model, decoding = seeded(llama)
    asked_for, calls = iter([False, False, True]), []

    def stop_requested() -> bool:
        calls.append(1)
        return next(asked_for, True)

    decoding = replace(decoding, stop_ids=(1,), max_new_tokens=60, max_positions=None)
    with pytest.raises(Interrupted, match=r"^answers: stopped on request; .* the same command again to go on"):
        generate(model, [[7, 8]], decoding=decoding, progress=Silent(), stop_requested=stop_requested)
    assert len(calls) == 4


class Counting(Silent):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def start(self, title: str, *, total: int, unit: str) -> None:
        self.events.append((f"{title} in {unit}", total))

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self.events.append(("advance", count))

    def finish(self) -> None:
        self.events.append(("finish", 0))


def test_progress_counts_every_record() -> None:
    model, decoding = seeded(llama)
    progress = Counting()
    generate(model, prompts(9), decoding=decoding, progress=progress, stop_requested=lambda: False)
    assert progress.events[0] == ("Answers in records", 9)
    assert progress.events[-1] == ("finish", 0)
    assert sum(count for event, count in progress.events if event == "advance") == 9


def test_no_prompt_gives_no_answer() -> None:
    model, decoding = seeded(llama)
    assert answer(model, [], decoding) == []


def test_the_automatic_limit_stands_a_tenth_above_the_99th_percentile() -> None:
    lengths = np.array([20] * 985 + [100] * 14 + [5000], dtype=np.int64)
    assert auto_max_new_tokens(lengths) == 111
    assert auto_max_new_tokens(np.array([2, 2, 3], dtype=np.int64)) == 8
