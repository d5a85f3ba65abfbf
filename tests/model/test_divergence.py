"""Two models, or a model and a teacher: how far apart they are at each target, against torch on full logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from keeptune.model.divergence import pair_divergences, target_divergences
from keeptune.text.batches import pack
from tests.model.test_attention import LargestTensor
from tests.model.test_teacher import EVERYTHING, KINDS, Collate, examples, logits_of, model_of, teachers, with_teachers
from tests.model.tiny import CONFIGS, make_model

GIVEN = examples([9, 3, 12])


def kl(model: Any, base: Any, collate: Collate) -> Tensor:
    rows = []
    for example in GIVEN:
        log_p, log_q = (logits_of(m, example, collate).log_softmax(1) for m in (base, model))
        rows.append(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1))
    return torch.cat(rows).detach()


@pytest.mark.parametrize(("name", "collate"), KINDS)
@pytest.mark.parametrize("through_logits", [False, True])
def test_a_pair_diverges_as_its_full_logits_say(name: str, collate: Collate, through_logits: bool) -> None:
    base, model = model_of(name).eval(), model_of(name, seed=1).eval()
    batch, expected = collate(GIVEN), kl(model, base, collate)
    found = pair_divergences(model, base, batch, chunk_targets=4, through_logits=through_logits)
    assert found.shape == (batch.num_targets,) and not found.requires_grad
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    whole = collate(with_teachers(GIVEN, teachers(base, GIVEN, k=EVERYTHING, collate=collate), taught=[0, 1, 2]))
    assert whole.teacher is not None
    from_teacher = target_divergences(model, whole, whole.teacher, chunk_targets=4, through_logits=through_logits)
    assert torch.allclose(from_teacher, expected, rtol=1e-4, atol=1e-6)


def test_equal_models_diverge_by_exactly_nothing_even_with_dropout() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    model, base = make_model(config), make_model(config)
    assert pair_divergences(model, base, pack(GIVEN), chunk_targets=4).tolist() == [0.0] * pack(GIVEN).num_targets
    assert model.training and base.training


@pytest.mark.parametrize("k", [4, EVERYTHING])
def test_the_teachers_own_model_diverges_by_exactly_nothing(k: int) -> None:
    model = model_of("llama")
    batch = pack(with_teachers(GIVEN, teachers(model, GIVEN, k=k), taught=[0, 1, 2]))
    assert batch.teacher is not None
    assert target_divergences(model, batch, batch.teacher).tolist() == [0.0] * batch.num_targets


def test_fewer_kept_tokens_give_a_lower_bound() -> None:
    base, model = model_of("llama").eval(), model_of("llama", seed=1).eval()
    found = []
    for k in (2, 8, EVERYTHING):
        batch = pack(with_teachers(GIVEN, teachers(base, GIVEN, k=k), taught=[0, 1, 2]))
        assert batch.teacher is not None
        found.append(target_divergences(model, batch, batch.teacher))
    assert bool((found[0] <= found[1] + 1e-6).all()) and bool((found[1] <= found[2] + 1e-6).all())
    assert found[0].sum() < found[2].sum()


def test_no_tensor_of_tokens_by_vocabulary_is_made() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.max_position_embeddings = 2000, 512  # pyright: ignore[reportAttributeAccessIssue]
    model, base = make_model(config), make_model(config, seed=1)
    with LargestTensor() as largest:
        pair_divergences(model, base, pack(examples([200, 200])), chunk_targets=16)
    # 16 targets by 2000; the hidden states of 400 tokens are the smaller ones.
    assert largest.num_elements <= 2000 * 32
