"""Each version of torch's variable-length kernel, and of what it is given, computes the same attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from keeptune.model import varlen
from keeptune.model.varlen import Kernel, attend_varlen, has_varlen, torch_kernel

LENGTHS, SCALE = [5, 1, 8], 0.3


def plain(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *, left: int, scale: float | None) -> Tensor:
    """Attend from (T, H, E) within the bounds, causally and in a window of `left` tokens before each."""
    out = torch.empty_like(q)
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)
        seen = (j <= i) & (j >= i - left if left >= 0 else True)
        q1, k1, v1 = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        assert q1.shape[1] == k1.shape[1]
        out[start:end] = F.scaled_dot_product_attention(q1, k1, v1, seen, scale=scale)[0].transpose(0, 1)
    return out


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    assert is_causal
    return plain(query, key, value, cu_seq_q, left=-1, scale=None)


def torch_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0
    return plain(query, key, value, cu_seq_q, left=window_size[0], scale=scale)


def torch_2_13(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size[1] == 0 and enable_gqa
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return plain(query, key, value, cu_seq_q, left=window_size[0], scale=scale)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("version", [torch_2_10, torch_2_11, torch_2_13])
def test_every_version_of_torch_gives_the_attention_of_the_examples_alone(
    version: Callable[..., Tensor], scale: float | None, window: int
) -> None:
    kernel = torch_kernel(version)
    if window and not kernel.takes_windows:
        assert version is torch_2_10
        return
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 14, 8, generator=generator) for heads in (4, 2, 2))
    out = attend_varlen((q, k, v), LENGTHS, window=window, scale=scale, kernel=kernel)
    for start, end in ((0, 5), (5, 6), (6, 14)):
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)
        seen = (j <= i) & (j > i - (window or 99))
        expected = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], seen, scale=scale, enable_gqa=True
        )
        assert torch.allclose(out[:, start:end], expected.transpose(1, 2), atol=1e-6)


def heads(*widths: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.zeros(1, 2, 3, width, dtype=dtype, device="cuda") for width in widths)
    return query, key, value


def test_a_kernel_is_asked_for_what_it_takes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        assert has_varlen(heads(64, 64, 64), window=0)
        assert has_varlen(heads(64, 64, 64), window=8)
        # Attention with latent keys has values of another width.
        assert not has_varlen(heads(192, 192, 128), window=0)
        assert not has_varlen(heads(512, 512, 512), window=0)
        assert not has_varlen(heads(64, 64, 64, dtype=torch.float32), window=0)
        monkeypatch.setattr(varlen, "_kernel", lambda: Kernel(lambda *_: _[0], takes_windows=False))
        assert has_varlen(heads(64, 64, 64), window=0)
        assert not has_varlen(heads(64, 64, 64), window=8)


def test_a_processor_has_no_variable_length_kernel() -> None:
    query = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not has_varlen((query, query, query), window=0)
