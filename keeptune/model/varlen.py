"""Queries, keys and values of a whole pack arrive on a GPU; one kernel call attends within every example.

torch's own `varlen_attn` is taken where it knows scales and windows, else flash-attn where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_MAX_HEAD_WIDTH = 256
# Ampere: the first GPUs that flash attention runs on.
_MIN_CAPABILITY = 8


def has_varlen(query: Tensor) -> bool:
    """Tell whether a variable-length kernel takes a query like this one (its device, type and head width)."""
    if query.device.type != "cuda" or query.shape[-1] > _MAX_HEAD_WIDTH or query.shape[-1] % 8:
        return False
    if _compute_dtype(query) not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(query.device)[0] >= _MIN_CAPABILITY and _kernel() is not None


def attend_varlen(
    qkv: tuple[Tensor, Tensor, Tensor], lengths: list[int], *, window: int, scale: float | None
) -> Tensor:
    """Return (1, T, H, E) from a query (1, H, T, E) and keys and values (1, K, T, E) of examples of these lengths."""
    kernel = _kernel()
    assert kernel is not None
    dtype = _compute_dtype(qkv[0])
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in qkv)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = ends.to(query.device, non_blocking=True)
    # A window of W tokens holds the token itself and W - 1 before it; -1 stands for no limit.
    return kernel(query, key, value, bounds, max(lengths), (window - 1, 0) if window else (-1, 0), scale)[None]


def _compute_dtype(query: Tensor) -> torch.dtype:
    # Rotary embeddings leave fp32 queries under autocast; torch's own attention would cast them likewise.
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, tuple[int, int], float | None], Tensor]


@lru_cache(maxsize=1)
def _kernel() -> Kernel | None:
    """Return the first installed kernel in one calling form: (q, k, v, bounds, longest, window, scale)."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        varlen = None
    if varlen is not None and "window_size" in inspect.signature(varlen).parameters:
        return lambda q, k, v, bounds, longest, window, scale: varlen(
            q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=window, enable_gqa=True
        )
    if importlib.util.find_spec("flash_attn") is None:
        return None
    flash = importlib.import_module("flash_attn").flash_attn_varlen_func
    return lambda q, k, v, bounds, longest, window, scale: flash(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, window_size=window
    )
