"""A model and what another expects arrive; how far apart they are at each target token leaves, in nats.

Shape key: N targets, C targets of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keeptune.model.attention import base_of
from keeptune.model.loss import target_logits
from keeptune.model.modes import evaluating
from keeptune.model.soft_targets import SoftTargets, row_divergences
from keeptune.text.batches import Batch
from keeptune.text.tokens import Teacher


def target_divergences(
    model: nn.Module, batch: Batch, teacher: Teacher, *, chunk_targets: int = 512, through_logits: bool = False
) -> Tensor:
    """Return KL(base‖model) at every target, (N,) in the batch's order, fp32; `teacher` has a row for each of them.

    Exact where the teacher keeps the whole vocabulary, else a lower bound; never below 0. Dropout is off.
    """
    assert len(teacher.ids) == batch.num_targets
    soft = SoftTargets.of(teacher, device=base_of(model).device)
    parts, start = [], 0
    with evaluating(model):
        for logits_CV in target_logits(model, batch, chunk_targets=chunk_targets, through_logits=through_logits):
            parts.append(row_divergences(logits_CV, soft.rows(slice(start, start + len(logits_CV)))))
            start += len(logits_CV)
    return torch.cat(parts)


def pair_divergences(
    model: nn.Module, base: nn.Module, batch: Batch, *, chunk_targets: int = 512, through_logits: bool = False
) -> Tensor:
    """Return KL(base‖model) over the whole vocabulary at every target, (N,) in the batch's order, fp32.

    Both models run over the batch, without dropout; their logits are there for one chunk of targets at a time. Exactly
    0 where both models are equal.
    """
    limits = {"chunk_targets": chunk_targets, "through_logits": through_logits}
    parts = []
    with evaluating(model), evaluating(base):
        pairs = zip(target_logits(base, batch, **limits), target_logits(model, batch, **limits), strict=True)
        for base_CV, model_CV in pairs:
            log_p_CV, log_q_CV = base_CV.log_softmax(1), model_CV.log_softmax(1)
            probs_CV = log_p_CV.exp()
            # 0 log 0 is 0; rounding may leave a sum a little below 0, where no divergence is.
            terms_CV = torch.where(probs_CV > 0, probs_CV * (log_p_CV - log_q_CV), 0.0)
            parts.append(terms_CV.sum(1).clamp_min(0.0))
    return torch.cat(parts)
