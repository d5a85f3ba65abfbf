"""Packed micro-batches arrive as one row of tokens; every example attends to itself alone, as if it stood alone.

transformers asks two registered functions: one for the mask (once a forward pass) and one for the attention (in each
layer). Here the mask function answers with a slip of numbers, (1, 1, 1, 1 + B): the layer's sliding window (0: none)
and the B lengths. It travels where masks travel, through gradient checkpointing too, and the attention function reads
it. Without a slip both functions pass everything on to transformers' own: generation and padded batches are untouched.

Shape key: T tokens of the pack, H query heads, K key heads, L tokens of an example, E width of a head.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keeptune.model.device import computes_short
from keeptune.model.memory import lacks_memory
from keeptune.model.modes import evaluating
from keeptune.model.varlen import attend_varlen, has_varlen, repeated

_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("packed_lengths", default=None)
_PREFIX = "keeptune_"
# Arguments that change the attention in ways that a pack cannot follow.
_REFUSED = ("s_aux", "sinks", "position_bias", "alibi", "cache")


class CannotPack(Exception):
    """A model asks for an attention that packs cannot give exactly; `can_pack` turns it into False."""


@contextlib.contextmanager
def packed_attention(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Within the block, `model` reads its one row of `sum(lengths)` tokens as examples of these lengths.

    Position ids must restart at each example. The model's attention functions stay registered after the block,
    because the backward pass of checkpointed layers asks for them again; they are transformers' own without a pack.
    """
    _register(base_of(model))
    token = _LENGTHS.set(tuple(int(length) for length in lengths))
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap is not None else model
    assert isinstance(base, PreTrainedModel), type(base)
    return base


def vocab_size(base: PreTrainedModel) -> int:
    """Return how many token ids the model both reads and predicts; on either side it may have more."""
    read = getattr(base.get_input_embeddings(), "num_embeddings", None)
    predicted = getattr(base.get_output_embeddings(), "out_features", None)
    sizes = [read, predicted, getattr(base.config.get_text_config(decoder=True), "vocab_size", None)]
    return min(size for size in sizes if size)


def uses_virtual_tokens(model: nn.Module) -> bool:
    """Tell whether PEFT puts trained tokens before the input (prompt and prefix tuning)."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def can_pack(model: nn.Module, *, tolerance: float | None = None) -> bool:
    """Tell whether packed hidden states equal those of the same examples one by one.

    A random pack is run through the model, without gradients and in evaluation mode: call this under the autocast of
    the training. `tolerance` is relative to the largest hidden state; the default is 1e-4 in fp32 and 0.02 in shorter
    formats. One by one, the model numbers the positions itself: RoBERTa, for one, does not begin at 0, as the positions
    of a pack do.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    known = inspect.signature(base.forward).parameters
    if base.config.is_encoder_decoder or uses_virtual_tokens(model) or "position_ids" not in known:
        return False
    if getattr(config, "attention_chunk_size", None) or not base._can_set_attn_implementation():
        return False
    if _attention_name(base) not in _ORIGINALS:
        return False
    if tolerance is None:
        tolerance = 0.02 if computes_short(base.device, base.dtype) else 1e-4
    window = getattr(config, "sliding_window", None)
    # One example outgrows a short window, so that the probe sees it.
    lengths = [7, 1, 12, 5 + (window if window and window <= 256 else 0)]
    try:
        with evaluating(base):
            return _probe_difference(base, lengths) <= tolerance
    # Models that compute with the mask, or know nothing of packs, fail in their own ways: they are padded.
    except (CannotPack, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        if lacks_memory(error):
            raise
        return False


def _probe_difference(base: PreTrainedModel, lengths: list[int]) -> float:
    device = base.device
    generator = torch.Generator().manual_seed(0)
    highest = vocab_size(base)
    examples = [torch.randint(highest, (length,), generator=generator).to(device) for length in lengths]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    alone = torch.cat([_hidden(base, ids) for ids in examples])
    with packed_attention(base, lengths):
        packed = _hidden(base, torch.cat(examples), position_ids=positions[None])
    difference = (packed - alone).abs().max() / alone.abs().max()
    return float(difference.nan_to_num(nan=float("inf")))


def _hidden(base: PreTrainedModel, ids_T: Tensor, **positions: Tensor) -> Tensor:
    output = base.base_model(input_ids=ids_T[None], use_cache=False, **positions)
    return output.last_hidden_state[0].float()


def _register(base: PreTrainedModel) -> None:
    original = _attention_name(base)
    name = _PREFIX + original
    if base.config._attn_implementation == name:
        return
    if original not in _ORIGINALS:
        raise CannotPack(f"attention {original!r}")
    attend, mask = _ORIGINALS[original]
    ALL_ATTENTION_FUNCTIONS.register(name, _packing_attention(attend))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _packing_mask(mask))
    base.set_attn_implementation(name)


def _attention_name(base: PreTrainedModel) -> str:
    return (base.config._attn_implementation or "eager").removeprefix(_PREFIX)


def _packing_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        lengths = _LENGTHS.get()
        return original(*args, **kwargs) if lengths is None else _slip(lengths, **kwargs)

    return mask


def _slip(lengths: tuple[int, ...], **asked: Any) -> Tensor:
    """Return the slip for a layer type, or refuse what is neither causal nor causal in a window."""
    bidirectional = "allow_is_bidirectional_skip" in asked or asked.get("use_vmap", False)
    chunked = getattr(asked.get("config"), "attention_chunk_size", None) is not None
    if bidirectional or chunked or asked.get("attention_mask") is not None:
        raise CannotPack("a mask that is not plainly causal")
    assert asked["q_length"] == asked["kv_length"] == sum(lengths), (asked["q_length"], sum(lengths))
    # On the CPU wherever the model is: the lengths are read as Python numbers in each layer.
    return torch.tensor([asked.get("local_size") or 0, *lengths], device="cpu").view(1, 1, 1, -1)


def _packing_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    def attend(  # noqa: PLR0917 (transformers' own signature)
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is None or attention_mask.dtype != torch.int64:
            return original(module, query, key, value, attention_mask, **kwargs)
        refused = [name for name in _REFUSED if kwargs.get(name) is not None]
        if refused or kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
            raise CannotPack(f"attention with {refused or 'no causal order'}")
        window, *lengths = attention_mask.flatten().tolist()
        if query.shape[2] != sum(lengths) or query.shape[0] != 1:
            raise CannotPack("a mask that the model reshapes")
        scale = kwargs.get("scaling")
        dropout = kwargs.get("dropout", 0.0)
        softcap = kwargs.get("softcap")
        if not dropout and not softcap and has_varlen((query, key, value), window=window):
            return attend_varlen((query, key, value), lengths, window=window, scale=scale), None
        given = value.dtype
        # On a processor, attention in half precision is slower than in fp32, which rotary embeddings leave anyway.
        if query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        elif query.dtype == torch.float32 and query.shape[1] != key.shape[1]:
            # torch's fused kernels take grouped heads in half precision only.
            key, value = repeated(query, key, value)
        parts = []
        with torch.autocast("cpu", enabled=False):
            for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
                parts.append(_attend_one(q, k, v, window=window, scale=scale, dropout=dropout, softcap=softcap))
        out = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        # Under autocast the next layer casts what it is given; without, it needs its weights' own format.
        if query.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            out = out.to(given)
        return out, None

    return attend


def _attend_one(
    q_HLE: Tensor,
    k_KLE: Tensor,
    v_KLE: Tensor,
    *,
    window: int,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Return one example's attention as (1, L, H, E); the leading 1 of every tensor is transformers' batch."""
    length = q_HLE.shape[2]
    if softcap:
        return _attend_softcapped(q_HLE, k_KLE, v_KLE, window=window, scale=scale, dropout=dropout, softcap=softcap)
    grouped = q_HLE.shape[1] != k_KLE.shape[1]
    if not window or length <= window:
        out = F.scaled_dot_product_attention(
            q_HLE, k_KLE, v_KLE, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    # Queries go in blocks of one window; a block sees itself and the window before it, so that masks stay
    # (window, 2 window) however long the example is.
    parts = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(start - window + 1, 0)
        mask = _window_mask(start, end, first=first, window=window, device=q_HLE.device)
        k, v = k_KLE[:, :, first:end], v_KLE[:, :, first:end]
        q = q_HLE[:, :, start:end]
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, 2).transpose(1, 2)


def _window_mask(start: int, end: int, *, first: int, window: int, device: torch.device) -> Tensor:
    """Return (end - start, end - first): query i sees the keys in (i - window, i]."""
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(first, end, device=device)
    return (key <= query) & (key > query - window)


def _attend_softcapped(
    q_HLE: Tensor,
    k_KLE: Tensor,
    v_KLE: Tensor,
    *,
    window: int,
    scale: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Return the attention with scores squeezed into (-softcap, softcap), which fused kernels do not offer."""
    length = q_HLE.shape[2]
    num_groups = q_HLE.shape[1] // k_KLE.shape[1]
    k_HLE, v_HLE = k_KLE.repeat_interleave(num_groups, 1), v_KLE.repeat_interleave(num_groups, 1)
    scores = torch.matmul(q_HLE, k_HLE.transpose(2, 3)) * (q_HLE.shape[3] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    seen = _window_mask(0, length, first=0, window=window or length, device=q_HLE.device)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1, dtype=torch.float32).to(q_HLE.dtype)
    return torch.matmul(F.dropout(weights, dropout), v_HLE).transpose(1, 2)


def _eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the eager attention of the module's own modelling file."""
    attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if attend is None:
        raise CannotPack(f"{type(module).__name__} has no eager attention function")
    return attend(module, *args, **kwargs)


_ORIGINALS = {"sdpa": (sdpa_attention_forward, sdpa_mask), "eager": (_eager_attention, eager_mask)}
