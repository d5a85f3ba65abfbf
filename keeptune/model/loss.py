"""A model and a batch arrive; the summed loss in nats over the batch's target tokens leaves.

A target's loss is its cross-entropy, or, where the batch has a teacher for it, the divergence from the base model.

Labels arrive unshifted; they are shifted here and nowhere else. Only the positions that predict a target reach the
output layer, a chunk at a time, and each chunk's gradient is taken while its logits are there: no (T, V) tensor exists.

Shape key: B examples, T tokens (of the pack, or padded), D width, V vocabulary, N targets, C targets of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.model.attention import base_of, packed_attention, uses_virtual_tokens, vocab_size
from keeptune.model.device import computes_short
from keeptune.model.linear_loss import LinearCrossEntropy, row_losses
from keeptune.model.memory import lacks_memory
from keeptune.model.modes import evaluating
from keeptune.model.soft_targets import RowDivergences, SoftTargets
from keeptune.text.batches import NOT_TRAINED, Batch


def batch_loss(
    model: nn.Module,
    batch: Batch,
    *,
    chunk_targets: int = 512,
    through_logits: bool = False,
    kl_weight: float = 1.0,
) -> Tensor:
    """Return the summed loss in nats over `batch.num_targets` target tokens, an fp32 scalar.

    That is the cross-entropy of every target without a teacher, and `kl_weight` times KL(base‖model) over the teacher's
    outcomes at those with one. `chunk_targets` bounds the logits held at once to (chunk_targets, V) and changes nothing
    else. `through_logits` takes the model's own logits instead, for a model on which `loss_is_exact` says False.
    """
    if batch.teacher is not None:
        hard, divergence = _taught_losses(model, batch, chunk_targets=chunk_targets, through_logits=through_logits)
        return hard + kl_weight * divergence
    if not torch.is_grad_enabled():
        return target_losses(model, batch, chunk_targets=chunk_targets, through_logits=through_logits).sum()
    if through_logits:
        return _losses_of_logits(model, batch).sum()
    hidden_ND, ids_N = _hidden_at_targets(model, batch)
    return _cross_entropy(model, hidden_ND, ids_N, chunk_targets=chunk_targets)


@torch.no_grad()
def target_losses(model: nn.Module, batch: Batch, *, chunk_targets: int = 512, through_logits: bool = False) -> Tensor:
    """Return the cross-entropy in nats of every target, (N,) in the batch's order, fp32, without gradients.

    Teachers are not asked.
    """
    if through_logits:
        return _losses_of_logits(model, batch)
    hidden_ND, targets_N = _hidden_at_targets(model, batch)
    logits = _head_logits(model)
    losses = []
    for hidden_CD, targets_C in zip(hidden_ND.split(chunk_targets), targets_N.split(chunk_targets), strict=True):
        losses.append(row_losses(logits(hidden_CD), targets_C))
    return torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def target_logits(
    model: nn.Module, batch: Batch, *, chunk_targets: int = 512, through_logits: bool = False
) -> Iterator[Tensor]:
    """Yield the logits that predict the batch's targets, in its order, fp32, up to `chunk_targets` rows at a time."""
    if through_logits:
        logits_NV, _ = _logits_at_targets(model, batch)
        yield from (logits_CV.float() for logits_CV in logits_NV.split(chunk_targets))
        return
    hidden_ND, _ = _hidden_at_targets(model, batch)
    logits = _head_logits(model)
    for hidden_CD in hidden_ND.split(chunk_targets):
        yield logits(hidden_CD).float()


def loss_is_exact(model: nn.Module, *, tolerance: float | None = None) -> bool:
    """Tell whether the chunked loss equals that of the model's own logits, on a small random padded batch.

    Where it does not, the model computes on its logits in a way unknown here: pass `through_logits=True`.
    Call this under the autocast of the training. `tolerance` is relative; the default is 1e-4 in fp32 and 0.02 in
    shorter formats.
    """
    base = base_of(model)
    if tolerance is None:
        tolerance = 0.02 if computes_short(base.device, base.dtype) else 1e-4
    generator = np.random.Generator(np.random.Philox(0))
    input_ids = generator.integers(vocab_size(base), size=(2, 9))
    lengths = np.array([9, 6])
    labels = np.where(np.arange(9) < lengths[:, None], input_ids, NOT_TRAINED)
    pairs = base.config.is_encoder_decoder
    if not pairs:
        labels[:, 0] = NOT_TRAINED
    batch = Batch(input_ids, labels, lengths=lengths, packed=False, label_lengths=lengths if pairs else None)
    with evaluating(model):
        try:
            ours = target_losses(model, batch)
        # ProphetNet's output layer, for one, does not take a batch without rows.
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            if lacks_memory(error):
                raise
            return False
        reference = target_losses(model, batch, through_logits=True)
    return bool(torch.allclose(ours, reference, rtol=tolerance, atol=tolerance))


def _taught_losses(
    model: nn.Module, batch: Batch, *, chunk_targets: int, through_logits: bool
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the targets without a teacher, and the summed divergence of those with one."""
    assert batch.teacher is not None and batch.teacher_rows is not None
    inputs, ids_N = (_logits_at_targets if through_logits else _hidden_at_targets)(model, batch)
    soft = SoftTargets.of(batch.teacher, device=inputs.device)
    soft_M = torch.from_numpy(batch.teacher_rows).to(inputs.device)
    is_hard_N = torch.ones_like(ids_N, dtype=torch.bool).index_fill_(0, soft_M, False)
    if through_logits:
        cross_entropy = F.cross_entropy(inputs[is_hard_N].float(), ids_N[is_hard_N], reduction="sum")
        return cross_entropy, RowDivergences.apply(inputs[soft_M], soft).sum()
    return (
        _cross_entropy(model, inputs[is_hard_N], ids_N[is_hard_N], chunk_targets=chunk_targets),
        _divergence(model, inputs[soft_M], soft, chunk_targets=chunk_targets),
    )


def _cross_entropy(model: nn.Module, hidden_ND: Tensor, ids_N: Tensor, *, chunk_targets: int) -> Tensor:
    head = _output_layer(model)
    if _after_head(base_of(model)) is None and type(head) is nn.Linear and not head._forward_hooks:
        return LinearCrossEntropy.apply(hidden_ND, head.weight, head.bias, ids_N, chunk_targets)

    def loss(logits_CV: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(logits_CV.float(), ids_N[rows], reduction="sum")

    return _HeadLoss.apply(hidden_ND, chunk_targets, _head_logits(model), loss, *_trained(head))


def _divergence(model: nn.Module, hidden_MD: Tensor, soft: SoftTargets, *, chunk_targets: int) -> Tensor:
    def loss(logits_CV: Tensor, rows: slice) -> Tensor:
        return RowDivergences.apply(logits_CV, soft.rows(rows)).sum()

    trained = _trained(_output_layer(model))
    return _HeadLoss.apply(hidden_MD, chunk_targets, _head_logits(model), loss, *trained)


def _trained(head: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


@dataclass(frozen=True, slots=True)
class _Targets:
    """Where the targets are predicted, as row and column of the output layer's input, and their token ids."""

    rows: np.ndarray
    columns: np.ndarray
    ids: np.ndarray


def _targets(batch: Batch) -> _Targets:
    labels = batch.labels[None] if batch.packed else batch.labels
    rows, columns = np.nonzero(labels != NOT_TRAINED)
    ids = labels[rows, columns]
    if batch.label_lengths is None:
        # The token at t is predicted at t - 1. An example's first token is predicted by nothing.
        starts = np.cumsum(batch.lengths) - batch.lengths if batch.packed else np.zeros(1, dtype=np.int64)
        assert not np.isin(columns, starts).any(), "the first token of an example carries loss"
        columns = columns - 1
    return _Targets(rows, columns, ids)


def _hidden_at_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what the output layer is given where a target is predicted, (N, D), and the targets, (N,)."""
    targets = _targets(batch)
    hidden_BTD = _output_layer_input(model, batch)
    num_columns = hidden_BTD.shape[1]
    # PEFT's virtual tokens stand before the input and move every position.
    num_virtual = num_columns - batch.labels.shape[-1]
    flat = torch.from_numpy(targets.rows * num_columns + targets.columns + num_virtual).to(hidden_BTD.device)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, flat)
    return hidden_ND, torch.from_numpy(targets.ids).to(hidden_BTD.device)


def _output_layer_input(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model up to its output layer, which is handed no rows, and return what it would have been given."""
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:])

    handle = _output_layer(model).register_forward_pre_hook(keep)
    try:
        _run(model, batch)
    finally:
        handle.remove()
    (hidden_BTD,) = found
    return hidden_BTD


def _run(model: nn.Module, batch: Batch) -> Any:
    base = base_of(model)
    device = base.device
    input_ids = torch.from_numpy(batch.input_ids).to(device)
    if batch.packed:
        assert not uses_virtual_tokens(model), "virtual tokens cannot be put before the examples of a pack"
        starts = np.cumsum(batch.lengths) - batch.lengths
        positions = np.arange(len(batch.input_ids)) - np.repeat(starts, batch.lengths)
        with packed_attention(model, batch.lengths.tolist()):
            position_ids = torch.from_numpy(positions).to(device)[None]
            return model(input_ids=input_ids[None], position_ids=position_ids, use_cache=False)
    lengths = torch.from_numpy(batch.lengths).to(device)
    attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
    if batch.label_lengths is None:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=_decoder_input_ids(base, batch).to(device),
        use_cache=False,
    )


def _decoder_input_ids(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the labels moved one place to the right behind the decoder's start token; the padding is never read.

    The decoder is causal and padded on the right, so no real position sees a padded one.
    """
    start = base.generation_config.decoder_start_token_id if base.generation_config else None
    if start is None:
        start = getattr(base.config, "decoder_start_token_id", None)
    assert start is not None, "an encoder-decoder configuration without decoder_start_token_id"
    shifted = np.full_like(batch.labels, start)
    shifted[:, 1:] = np.where(batch.labels[:, :-1] == NOT_TRAINED, start, batch.labels[:, :-1])
    return torch.from_numpy(shifted)


def _losses_of_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits_NV, ids_N = _logits_at_targets(model, batch)
    return F.cross_entropy(logits_NV.float(), ids_N, reduction="none")


def _logits_at_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the model's own logits where a target is predicted, (N, V), and the targets, (N,)."""
    targets = _targets(batch)
    logits_BTV = _run(model, batch).logits
    num_virtual = logits_BTV.shape[1] - batch.labels.shape[-1]
    logits_NV = logits_BTV[torch.from_numpy(targets.rows), torch.from_numpy(targets.columns + num_virtual)]
    return logits_NV, torch.from_numpy(targets.ids).to(logits_NV.device)


def _head_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what makes the model's logits of the output layer's input."""
    head, finish = _output_layer(model), _after_head(base_of(model))
    return head if finish is None else lambda hidden_CD: finish(head(hidden_CD))


def _output_layer(model: nn.Module) -> nn.Module:
    head = base_of(model).get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no output layer"
    return head


def _after_head(base: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """Return what the model does to the output layer's logits (scale, soft cap), or None where nothing is done."""
    config = base.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere multiplies by logit_scale, Granite divides by logits_scaling.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if softcap is None and scale == 1.0:
        return None

    def finish(logits: Tensor) -> Tensor:
        scaled = logits if scale == 1.0 else logits * scale
        return scaled if softcap is None else torch.tanh(scaled / softcap) * softcap

    return finish


class _HeadLoss(torch.autograd.Function):
    """A chunked loss for any output layer: autograd runs on a chunk's logits while they are there.

    `loss` returns the summed loss of the rows in a slice from their logits.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_ND: Tensor,
        chunk_targets: int,
        logits: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor, slice], Tensor],
        *trained: Tensor,
    ) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grads = [torch.zeros_like(parameter) for parameter in trained]
        for start in range(0, len(hidden_ND), chunk_targets):
            rows = slice(start, start + chunk_targets)
            hidden_CD = hidden_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                chunk_loss = loss(logits(hidden_CD), rows)
            parts = torch.autograd.grad(chunk_loss, [hidden_CD, *trained], allow_unused=True)
            total += chunk_loss.detach()
            grad_hidden_ND[rows] = parts[0]
            for grad, part in zip(grads, parts[1:], strict=True):
                if part is not None:
                    grad += part
        ctx.grads = (grad_hidden_ND, grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden_ND, grads = ctx.grads
        del ctx.grads  # a second backward pass would scale these gradients twice: let it fail
        return (grad_hidden_ND.mul_(grad_total), None, None, None, *(grad.mul_(grad_total) for grad in grads))
