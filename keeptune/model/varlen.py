"""Queries, keys and values of a whole pack arrive on a GPU; one kernel call attends within every example.

torch's own `varlen_attn` is taken as far as its version goes (2.10 knows no windows), else flash-attn where it is
installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_MAX_HEAD_WIDTH = 256
# Ampere: the first GPUs that flash attention runs on.
_MIN_CAPABILITY = 8
Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention function in one calling form: (q, k, v, bounds, longest, window, scale).

    Query (T, H, E), key and value (T, K, E); `bounds` are the examples' starts and the last one's end; a window of
    (-1, 0) has no limit.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, tuple[int, int], float | None], Tensor]
    takes_windows: bool


def has_varlen(qkv: Heads, *, window: int) -> bool:
    """Tell whether a variable-length kernel takes heads like these (device, format, widths) and the window."""
    device, widths = qkv[0].device, {heads.shape[-1] for heads in qkv}
    # Attention with latent keys (DeepSeek's) has values of another width.
    if device.type != "cuda" or len(widths) > 1 or max(widths) > _MAX_HEAD_WIDTH or max(widths) % 8:
        return False
    if _compute_dtype(qkv[0]) not in (torch.float16, torch.bfloat16):
        return False
    kernel = _kernel()
    if kernel is None or (window and not kernel.takes_windows):
        return False
    return torch.cuda.get_device_capability(device)[0] >= _MIN_CAPABILITY


def attend_varlen(
    qkv: Heads, lengths: list[int], *, window: int, scale: float | None, kernel: Kernel | None = None
) -> Tensor:
    """Return (1, T, H, E) from a query (1, H, T, E) and keys and values (1, K, T, E) of examples of these lengths."""
    kernel = kernel or _kernel()
    assert kernel is not None
    dtype = _compute_dtype(qkv[0])
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in qkv)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = ends.to(query.device, non_blocking=True)
    # A window of W tokens holds the token itself and W - 1 before it; -1 stands for no limit.
    return kernel.attend(query, key, value, bounds, max(lengths), (window - 1, 0) if window else (-1, 0), scale)[None]


def repeated(query: Tensor, key: Tensor, value: Tensor, *, heads: int = 1) -> tuple[Tensor, Tensor]:
    """Return key and value with as many heads as the query, each for its group; `heads` is the heads' dimension."""
    times = query.shape[heads] // key.shape[heads]
    return key.repeat_interleave(times, heads), value.repeat_interleave(times, heads)


def _compute_dtype(query: Tensor) -> torch.dtype:
    # Rotary embeddings leave fp32 queries under autocast; torch's own attention would cast them likewise.
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


@lru_cache(maxsize=1)
def _kernel() -> Kernel | None:
    """Return flash-attn's kernel where it is installed and torch's knows no windows, else torch's if there is one."""
    try:
        own = torch_kernel(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    except ImportError:
        own = None
    if (own is not None and own.takes_windows) or importlib.util.find_spec("flash_attn") is None:
        return own
    flash = importlib.import_module("flash_attn").flash_attn_varlen_func
    return Kernel(
        lambda q, k, v, bounds, longest, window, scale: flash(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, window_size=window
        ),
        takes_windows=True,
    )


def torch_kernel(varlen_attn: Callable[..., Any]) -> Kernel:
    """Return torch's `varlen_attn` in the one calling form, whichever arguments this version of torch has.

    Of 2.10 it has `is_causal`, from 2.11 on `window_size` and `scale`, from 2.12 on `enable_gqa`.
    """
    known = inspect.signature(varlen_attn).parameters
    takes_windows = "window_size" in known

    def attend(  # noqa: PLR0917 (the form of every kernel)
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: tuple[int, int], scale: float | None
    ) -> Tensor:
        asked: dict[str, Any] = {"window_size": window} if takes_windows else {"is_causal": True}
        if "enable_gqa" in known:
            asked["enable_gqa"] = True
        elif q.shape[1] != k.shape[1]:
            k, v = repeated(q, k, v)
        if "scale" in known:
            asked["scale"] = scale
        elif scale is not None:
            # Scores are scaled by 1 / sqrt(E) inside.
            q = q * (scale * q.shape[-1] ** 0.5)
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **asked)

    return Kernel(attend, takes_windows)
