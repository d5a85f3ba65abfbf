"""Hidden states and a plain linear output layer arrive; their summed cross-entropy leaves, gradients already taken.

Shape key: D width, V vocabulary, N targets, C targets of a chunk.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T + bias`, in nats, summed; logits are held for one chunk of targets at a time.

    With p = softmax(logits) and y the target's unit vector, d loss / d logits = p - y: known in the forward pass, so
    the gradients for hidden states and weights are summed there and only scaled in the backward pass.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk_targets: int
    ) -> Tensor:
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD: Tensor | None = None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None
        with torch.autocast(device, enabled=False):
            matrix_VD = weight_VD.to(dtype)
            for rows in even_chunks(len(targets_N), chunk_targets):
                hidden_CD = hidden_ND[rows].to(dtype)
                logits_CV = torch.mm(hidden_CD, matrix_VD.t())
                if bias_V is not None:
                    logits_CV += bias_V.to(dtype)
                loss, grad_logits_CV = _loss_and_gradient(logits_CV, targets_N[rows])
                total += loss
                if grad_bias_V is not None:
                    grad_bias_V += grad_logits_CV.sum(0)
                grad_logits_CV = grad_logits_CV.to(dtype)
                grad_hidden_ND[rows] = torch.mm(grad_logits_CV, matrix_VD)
                if needs_weight:
                    grad_weight_VD = _add_product(grad_weight_VD, grad_logits_CV.t(), hidden_CD)
        ctx.grads = (grad_hidden_ND, grad_weight_VD, grad_bias_V)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = ctx.grads
        del ctx.grads  # a second backward pass would scale these gradients twice: let it fail
        return (*(None if grad is None else grad.mul_(grad_total) for grad in grads), None, None)


def even_chunks(number: int, largest: int) -> list[slice]:
    """Return slices that cut `number` rows into the fewest chunks of at most `largest`, of nearly equal length."""
    num_chunks = -(-number // largest)
    bounds = [number * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else []
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def row_losses(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the cross-entropy of each row in nats, fp32."""
    logits_CV = logits_CV.float()
    return logits_CV.logsumexp(1) - logits_CV.gather(1, targets_C[:, None])[:, 0]


def _loss_and_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and d loss / d logits in fp32; overwrites fp32 logits."""
    logits_CV = logits_CV.float()
    target_logits_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    largest_C = logits_CV.amax(1)
    weights_CV = logits_CV.sub_(largest_C[:, None]).exp_()
    sums_C = weights_CV.sum(1)
    loss = (largest_C + sums_C.log() - target_logits_C).sum()
    weights_CV.mul_(sums_C.reciprocal_()[:, None])
    weights_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    return loss, weights_CV


def _add_product(total_VD: Tensor | None, left_VC: Tensor, right_CD: Tensor) -> Tensor:
    """Return total + left @ right in fp32; overwrites the total."""
    if total_VD is None:
        return torch.mm(left_VC, right_CD).float()
    if total_VD.dtype == left_VC.dtype:
        return total_VD.addmm_(left_VC, right_CD)
    return total_VD.add_(torch.mm(left_VC, right_CD))
