"""The divergence over kept tokens and the rest, and its gradient, against autograd on the formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from keeptune.model.soft_targets import RowDivergences, SoftTargets, row_divergences, top_log_probs

V = 11


def logits(seed: int, *, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(6, V, generator=torch.Generator().manual_seed(seed))


def reference(logits_CV: Tensor, base_CV: Tensor, k: int) -> Tensor:
    """KL over k tokens and the rest, written out in fp64."""
    p, q = base_CV.double().softmax(1), logits_CV.double().softmax(1)
    rows = []
    for p_V, q_V in zip(p, q, strict=True):
        kept = p_V.topk(min(k, V)).indices
        total = (p_V[kept] * (p_V[kept] / q_V[kept]).log()).sum()
        rest = [j for j in range(V) if j not in kept.tolist()]
        if rest:
            total = total + p_V[rest].sum() * (p_V[rest].sum() / q_V[rest].sum()).log()
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 4, V - 1, V, 32])
def test_value_and_gradient_are_those_of_the_formula(k: int) -> None:
    base, model = logits(0), logits(1)
    soft = top_log_probs(base, k=k)
    assert soft.ids_MK.shape == (6, min(k, V)) and soft.log_probs_ML.shape == (6, min(k, V) + 1)
    ours, theirs = model.clone().requires_grad_(), model.clone().requires_grad_()
    weights = torch.arange(1.0, 7.0)
    found, expected = RowDivergences.apply(ours, soft), reference(theirs, base, k)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(found, expected.float(), atol=1e-6)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.equal(row_divergences(model, soft), found.detach())


def test_with_the_whole_vocabulary_it_is_the_divergence_and_with_less_a_lower_bound() -> None:
    base, model = logits(0), logits(1)
    exact = torch.nn.functional.kl_div(model.log_softmax(1), base.log_softmax(1), log_target=True, reduction="none")
    by_k = [row_divergences(model, top_log_probs(base, k=k)) for k in range(1, V + 1)]
    assert torch.allclose(by_k[-1], exact.sum(1), atol=1e-6)
    assert all(bool((fewer <= more + 1e-6).all()) for fewer, more in itertools.pairwise(by_k))
    assert bool((by_k[0] < by_k[-1]).all())


@pytest.mark.parametrize("k", [1, 4, V])
def test_equal_logits_diverge_by_exactly_nothing(k: int) -> None:
    base = logits(0)
    soft = top_log_probs(base, k=k)
    assert row_divergences(base, soft).tolist() == [0.0] * 6
    ours = base.clone().requires_grad_()
    RowDivergences.apply(ours, soft).sum().backward()
    assert ours.grad is not None and ours.grad.abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_a_rest_without_probability_gives_finite_numbers(scale: float) -> None:
    base, model = logits(0, scale=scale), logits(1, scale=scale)
    for k in (1, 4, V):
        for first, second in ((base, model), (base, base), (base, base.flip(1)), (base / scale, model)):
            ours = second.clone().requires_grad_()
            found = RowDivergences.apply(ours, top_log_probs(first, k=k))
            found.sum().backward()
            assert ours.grad is not None
            assert bool(found.isfinite().all()) and bool((found >= 0).all())
            assert bool(ours.grad.isfinite().all()) and ours.grad.abs().max() <= 1 + 1e-6
            assert ours.grad.sum(1).abs().max() < 1e-4


def test_a_token_that_the_base_excludes_adds_nothing() -> None:
    base = logits(0)
    base[:, 3] = -torch.inf
    model = logits(1).requires_grad_()
    found = RowDivergences.apply(model, top_log_probs(base, k=V))
    (gradient,) = torch.autograd.grad(found.sum(), model)
    assert torch.allclose(found, reference(model, base.clamp_min(-1e2), V).detach().float(), atol=1e-6)
    assert torch.allclose(gradient, model.softmax(1) - base.softmax(1), atol=1e-6)


def test_shorter_logits_give_an_fp32_value_and_a_gradient_of_their_own_type() -> None:
    base, model = logits(0).bfloat16(), logits(1).bfloat16().requires_grad_()
    soft = top_log_probs(base, k=4)
    assert isinstance(soft, SoftTargets) and soft.log_probs_ML.dtype == torch.float32
    found = RowDivergences.apply(model, soft)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert model.grad is not None and model.grad.dtype == torch.bfloat16


def test_rounding_makes_no_divergence_negative() -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 3
    assert row_divergences(logits + 7.3, top_log_probs(logits, k=8)).min() == 0.0
