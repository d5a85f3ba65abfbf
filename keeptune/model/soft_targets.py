"""Logits and what the base model expected arrive; the divergence of each row in nats, and its gradient, leave.

Outcomes are the base's k likeliest tokens, and all other tokens together as one. A divergence over these is exact where
k is the whole vocabulary, and else a lower bound of that over all tokens: joining outcomes only loses information.

Shape key: M rows, C rows of a chunk, V vocabulary, K kept tokens, L = K + 1 outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeptune.text.tokens import Teacher


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """A teacher on the logits' device; `ids_MK` are int64, `log_probs_ML` fp32."""

    ids_MK: Tensor
    log_probs_ML: Tensor

    @classmethod
    def of(cls, teacher: Teacher, *, device: torch.device) -> SoftTargets:
        """Return the teacher's rows as tensors."""
        return cls(torch.from_numpy(teacher.ids).to(device).long(), torch.from_numpy(teacher.log_probs).to(device))

    def rows(self, rows: slice) -> SoftTargets:
        """Return some of the rows."""
        return SoftTargets(self.ids_MK[rows], self.log_probs_ML[rows])


def top_log_probs(logits_CV: Tensor, *, k: int) -> SoftTargets:
    """Return the k likeliest tokens of each row, all of them where there are fewer, with their log-probabilities."""
    logits_CV = logits_CV.float()
    ids_CK = logits_CV.topk(min(k, logits_CV.shape[1]), dim=1).indices
    log_probs_CL, *_ = _outcomes(logits_CV, ids_CK)
    return SoftTargets(ids_CK, log_probs_CL)


def row_divergences(logits_CV: Tensor, soft: SoftTargets) -> Tensor:
    """Return the divergence of each row from what the base expected, KL(base‖model) over the outcomes, (C,) in fp32."""
    log_probs_CL, *_ = _outcomes(logits_CV.float(), soft.ids_MK)
    return _divergences(log_probs_CL, soft)


class RowDivergences(torch.autograd.Function):
    """The same with a gradient for the logits.

    With z the logits, q = softmax(z), p the base's, S the k kept tokens and R the rest, Σ p over S and R being 1:
    KL = const - Σ_{i∈S} p_i log q_i - p_R log q_R, where log q_i = z_i - lse(z) and log q_R = lse_R(z) - lse(z), so
    ∂KL/∂z_j = q_j - p_j for j in S, and q_j - p_R · q_j / q_R for j in R: q less a target that adds up to 1.
    q_j / q_R is the softmax over R alone, which is finite however small q_R and p_R are.
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, soft: SoftTargets) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        log_probs_CL, log_sum_C1, rest_CV = _outcomes(logits_CV.float(), soft.ids_MK)
        probs_CL = soft.log_probs_ML.exp()
        # Where every token is kept, the rest's softmax is NaN, and then overwritten wholly.
        target_CV = rest_CV.sub_(rest_CV.logsumexp(1, keepdim=True)).exp_().mul_(probs_CL[:, -1:])
        target_CV.scatter_(1, soft.ids_MK, probs_CL[:, :-1])
        ctx.save_for_backward((logits_CV.float() - log_sum_C1).exp_().sub_(target_CV))
        return _divergences(log_probs_CL, soft)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient_CV,) = ctx.saved_tensors
        return gradient_CV * grad_C[:, None], None


def _outcomes(logits_CV: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outcomes' log-probabilities (C, L), the log of the softmax's sum (C, 1), and the rest's logits.

    The rest's are a copy of all, (C, V), with those of the tokens in `ids_CK` at -inf.
    """
    rest_CV = logits_CV.scatter(1, ids_CK, -torch.inf)
    log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
    outcomes_CL = torch.cat([logits_CV.gather(1, ids_CK), rest_CV.logsumexp(1, keepdim=True)], 1)
    return outcomes_CL - log_sum_C1, log_sum_C1, rest_CV


def _divergences(log_probs_CL: Tensor, soft: SoftTargets) -> Tensor:
    probs_CL = soft.log_probs_ML.exp()
    terms_CL = probs_CL * (soft.log_probs_ML - log_probs_CL)
    # 0 log 0 is 0; rounding may leave a sum a little below 0, where no divergence is.
    return torch.where(probs_CL > 0, terms_CL, 0.0).sum(1).clamp_min(0.0)
