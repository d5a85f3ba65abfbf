"""How records may share a micro-batch: a model arrives; the layouts that leave each record its own loss leave.

Padding hides a record's neighbours only from models that honour the attention mask. Some ignore it (CPM-Ant counts its
prompt over the padding), some share a resource among all tokens of a batch (experts with a capacity), and some look at
the longest record (LongRoPE). A probe tries it; what no short probe can see is read from the configuration.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from keeptune.errors import NonFiniteError, RecipeError
from keeptune.model.attention import base_of, can_pack, uses_virtual_tokens, vocab_size
from keeptune.model.device import computes_short
from keeptune.model.load import FAILURES, library_errors
from keeptune.model.loss import target_losses
from keeptune.model.memory import lacks_memory
from keeptune.model.modes import evaluating
from keeptune.text.batches import Layout, pad, pad_pairs
from keeptune.text.tokens import Example

_LENGTHS = (9, 3, 12, 6)


def layout_of(model: nn.Module, *, through_logits: bool, longest: int) -> Layout:
    """Return the layout that wastes least among those under which each record has the loss that it has alone.

    `longest` is the number of tokens of the longest record and its answer.

    Raises:
        NonFiniteError: the loss of a random record is NaN or infinite.
        RecipeError: the model sees the tokens that it is to predict, or fails on a record that stands alone.
    """
    together = not depends_on_the_batch(model, longest=longest)
    if together and not uses_virtual_tokens(model) and can_pack(model):
        return "packed"
    require_causal(model, through_logits=through_logits)
    if not together or not can_pad(model, through_logits=through_logits):
        return "single"
    return "pairs" if base_of(model).config.is_encoder_decoder else "padded"


def depends_on_the_batch(model: nn.Module, *, longest: int) -> bool:
    """Tell whether a record's output depends on the records beside it in ways that no short probe shows."""
    config = base_of(model).config.get_text_config(decoder=True)
    # Experts with a capacity leave out the tokens that come last, of whichever record they are.
    if getattr(config, "expert_capacity", None) is not None:
        return True
    limit = _longrope_limit(config)
    return limit is not None and longest > limit


def _longrope_limit(config: PreTrainedConfig) -> int | None:
    """Return the length from which LongRoPE turns every record of a batch by its factors for long ones."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((limit for limit in limits if limit is not None), default=None)


def can_pad(model: nn.Module, *, through_logits: bool = False) -> bool:
    """Tell whether the losses of padded records equal those of the same records one by one.

    Random records go through the model, without gradients and in evaluation mode.

    Raises:
        RecipeError: the model fails on a record that stands alone.
    """
    records = _records(model)
    with evaluating(model):
        with model_errors(model):
            alone = torch.cat([_losses(model, [record], through_logits=through_logits) for record in records])
        try:
            padded = _losses(model, records, through_logits=through_logits)
        except FAILURES as error:
            if lacks_memory(error):
                raise
            return False
    return differ_by(padded, alone) <= tolerance_of(model)


def require_causal(model: nn.Module, *, through_logits: bool = False) -> None:
    """Accept a model that predicts each token from those before it.

    Raises:
        NonFiniteError: the loss of a record is NaN or infinite.
        RecipeError: another last token changes what is predicted before it, or the model fails on a record.
    """
    (record, *_) = _records(model)
    # The last label is no input of the decoder behind an encoder, the one before it is.
    changed = -2 if base_of(model).config.is_encoder_decoder else -1
    other = Example(record.input_ids.copy(), record.loss_mask)
    other.input_ids[changed] = next(token for token in record.input_ids if token != record.input_ids[changed])
    with evaluating(model), model_errors(model):
        before, after = (_losses(model, [each], through_logits=through_logits)[:changed] for each in (record, other))
    if not bool(before.isfinite().all()):
        raise NonFiniteError(
            "model: found a loss that is not finite on a record of random tokens; expected a finite one. The weights "
            "are broken or overflow their type: fetch the model again, or choose another one."
        )
    if differ_by(after, before) > tolerance_of(model):
        raise RecipeError(
            f"model: found a {type(base_of(model)).__name__} that sees the tokens that it is to predict; expected a "
            "model that reads from left to right. Choose a decoder-only or an encoder-decoder language model."
        )


def model_errors(model: nn.Module) -> AbstractContextManager[None]:
    """Turn what a model raises inside the block, where it is given one plain record, into a `RecipeError`."""
    name = type(base_of(model)).__name__
    return library_errors(
        lambda reason: (
            f"model: found that {name} of transformers fails on a single record ({reason}); expected a loss and an "
            "answer. Choose another model, or another version of transformers."
        )
    )


def tolerance_of(model: nn.Module) -> float:
    """Return the largest relative difference that rounding explains in the model's type."""
    base = base_of(model)
    return 0.1 if computes_short(base.device, base.dtype) else 1e-4


def differ_by(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of `expected`; infinite where a number is not finite."""
    difference = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)
    return float(difference.nan_to_num(nan=float("inf")))


def probe_ids(model: nn.Module, length: int, *, seed: int) -> list[int]:
    """Return random ordinary tokens of the model, always the same ones."""
    base = base_of(model)
    config = base.config.get_text_config(decoder=True)
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")]
    special = {token for ids in named for token in (ids if isinstance(ids, list) else [ids])}
    ordinary = [token for token in range(min(vocab_size(base), 5000)) if token not in special]
    generator = np.random.Generator(np.random.Philox(seed))
    return [ordinary[i] for i in generator.integers(len(ordinary), size=length)]


def probe_pad_id(model: nn.Module) -> int:
    """Return the id that fills a batch of probes."""
    return getattr(base_of(model).config.get_text_config(decoder=True), "pad_token_id", None) or 0


def _records(model: nn.Module) -> list[Example]:
    """Return random records; all but the first token of each is predicted, behind an encoder the second half."""
    pairs = base_of(model).config.is_encoder_decoder
    return [
        Example(
            np.array(probe_ids(model, length, seed=length)),
            loss_mask=np.arange(length) >= (length // 2 if pairs else 1),
        )
        for length in _LENGTHS
    ]


def _losses(model: nn.Module, records: list[Example], *, through_logits: bool) -> Tensor:
    collate = pad_pairs if base_of(model).config.is_encoder_decoder else pad
    batch = collate(records, pad_id=probe_pad_id(model))
    return target_losses(model, batch, through_logits=through_logits)
