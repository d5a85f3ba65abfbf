"""The base model and fixed texts arrive; what it expects at each of their target tokens leaves, a `Teacher` a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from keeptune.model.attention import base_of
from keeptune.model.device import autocasting
from keeptune.model.loss import target_logits
from keeptune.model.modes import evaluating
from keeptune.model.soft_targets import top_log_probs
from keeptune.progress import Progress
from keeptune.text.batches import Batch
from keeptune.text.tokens import Example, Examples, Teacher

TOP_K = 32


def base_top_k(
    model: nn.Module,
    examples: Examples,
    *,
    k: int = TOP_K,
    micro_batches: Sequence[Sequence[int]],
    collate: Callable[[Sequence[Example]], Batch],
    through_logits: bool,
    autocast: torch.dtype | None,
    progress: Progress,
) -> list[Teacher]:
    """Return the k likeliest next tokens at every target of each example, as `model` expects them without dropout.

    `micro_batches` hold every example once. All tokens of the vocabulary are kept where there are no more than k. Costs
    one forward pass, and 8 k + 4 bytes of memory a target.
    """
    teachers: dict[int, Teacher] = {}
    progress.start("Asking the base model", total=int(examples.lengths.sum()), unit="tokens")
    with evaluating(model), autocasting(base_of(model).device, autocast):
        for micro_batch in micro_batches:
            batch = collate([examples[i] for i in micro_batch])
            teacher = _batch_teacher(model, batch, k=k, through_logits=through_logits)
            ends = np.cumsum(examples.num_targets[list(micro_batch)])
            assert ends[-1] == batch.num_targets
            for i, start, end in zip(micro_batch, [0, *ends[:-1]], ends, strict=True):
                teachers[i] = Teacher(teacher.ids[start:end], log_probs=teacher.log_probs[start:end])
            progress.advance(int(examples.lengths[list(micro_batch)].sum()))
    progress.finish()
    return [teachers[i] for i in range(len(examples))]


def _batch_teacher(model: nn.Module, batch: Batch, *, k: int, through_logits: bool) -> Teacher:
    chunks = [top_log_probs(logits, k=k) for logits in target_logits(model, batch, through_logits=through_logits)]
    return Teacher(
        torch.cat([chunk.ids_MK for chunk in chunks]).int().cpu().numpy(),
        log_probs=torch.cat([chunk.log_probs_ML for chunk in chunks]).cpu().numpy(),
    )
