"""A model arrives; inside a block its RMS norms and gated SiLU layers compute the same in fewer passes and less memory.

Autograd keeps every intermediate of these layers for the backward pass. Here a norm keeps its input and one number a
row; a gated layer keeps its two linear outputs, and the product that the last linear layer needs is made again.

Shape key: R rows (tokens), D width, I width of the gated layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows at a time in the gated layer, so that its five (rows, I) operands stay in the processor's cache.
_BLOCK_ROWS = 64
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """How many layers were replaced."""

    num_norms: int
    num_gated: int


@contextlib.contextmanager
def fused_layers(model: nn.Module) -> Iterator[FusedLayers]:
    """Within the block, every layer for which an exact replacement is known computes by it; weights stay in place.

    A layer is replaced only if a probe finds its output and gradients unchanged (1e-5 of the largest, fp32). Inputs of
    other types, and autocast, still go to the original. The backward pass belongs inside the block as well.
    """
    norms, gated = [], []
    try:
        for module in model.modules():
            if "forward" in vars(module):
                continue
            if _is_rms_norm(module) and _agrees(module, _norm_forward, width=module.weight.shape[0]):  # pyright: ignore
                norms.append(module)
                module.forward = functools.partial(_norm_forward, module, module.forward)
            elif _is_gated(module) and _agrees(module, _gated_forward, width=module.gate_proj.in_features):  # pyright: ignore
                gated.append(module)
                module.forward = functools.partial(_gated_forward, module, module.forward)
        yield FusedLayers(len(norms), len(gated))
    finally:
        for module in (*norms, *gated):
            del module.forward


Forward = Callable[[Any, Callable[[Tensor], Tensor], Tensor], Tensor]


def _is_rms_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.weight.ndim == 1 and _epsilon(module) is not None and not _children(module)  # pyright: ignore


def _is_gated(module: nn.Module) -> bool:
    expected = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return _children(module) == expected and isinstance(module.act_fn, nn.SiLU | _transformers_silu())


@functools.cache
def _transformers_silu() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _agrees(module: nn.Module, forward: Forward, *, width: int) -> bool:
    """Tell whether a replacement gives the module's output and gradients for random rows, in evaluation mode."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in module.parameters()):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, grad = torch.randn((2, 1, 5, width), generator=generator)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        outcomes = []
        for compute in (module.forward, functools.partial(forward, module, module.forward)):
            with torch.enable_grad():
                hidden = rows.clone().requires_grad_()
                out = compute(hidden)
                grads = torch.autograd.grad(out, [hidden, *parameters], grad.expand_as(out))
            outcomes.append((out.detach(), *grads))
    finally:
        for part, training in modes.items():
            part.training = training
    return all(
        float((ours - theirs).abs().max()) <= _TOLERANCE * max(float(theirs.abs().max()), 1e-6)
        for theirs, ours in zip(*outcomes, strict=True)
    )


def _norm_forward(module: Any, original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    if hidden.dtype != torch.float32 or not torch.is_grad_enabled():
        return original(hidden)
    return _RMSNorm.apply(hidden, module.weight, _epsilon(module))


def _gated_forward(module: Any, original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    if hidden.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return original(hidden)
    gate, up, down = module.gate_proj(hidden), module.up_proj(hidden), module.down_proj
    if type(down) is nn.Linear and down.bias is None and not down._forward_hooks and not down._forward_pre_hooks:
        return _GatedDown.apply(gate, up, down.weight)
    return down(_GatedProduct.apply(gate, up))


class _RMSNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + epsilon) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight_D, epsilon = inputs
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return torch.mul(x, scale).mul_(weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        # With s = scale: d s / d x = -s³ x / D, so  d x = s·g·w - x · (s³ / D) · sum(g·w·x)  and  d w = sum(g·x·s).
        x, weight_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        x_RD, grad_RD, scale_R1 = x.reshape(-1, width), grads[0].reshape(-1, width), scale.reshape(-1, 1)
        product_RD = torch.mul(grad_RD, x_RD)
        grad_weight_D = torch.mv(product_RD.t(), scale_R1[:, 0]) if ctx.needs_input_grad[1] else None
        factor_R1 = torch.mv(product_RD, weight_D)[:, None].mul_(scale_R1.pow(3)).div_(width)
        grad_x_RD = torch.mul(grad_RD, weight_D, out=product_RD).mul_(scale_R1).addcmul_(x_RD, factor_R1, value=-1)
        return grad_x_RD.view_as(x), grad_weight_D, None


class _GatedProduct(torch.autograd.Function):
    """silu(gate) · up, keeping the two operands only."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        gate, up = inputs
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, _ = _product_gradients(grads[0].clone(), gate, up)
        return grad_gate, grad_up


class _GatedDown(torch.autograd.Function):
    """(silu(gate) · up) @ weight.T, keeping the two operands only; the product is made again for the weight."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        gate, up, weight_DI = inputs
        ctx.save_for_backward(gate, up, weight_DI)
        return F.linear(_product(gate, up), weight_DI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate, up, weight_DI = ctx.saved_tensors
        grad_gate, grad_up, product = _product_gradients(torch.matmul(grads[0], weight_DI), gate, up)
        if not ctx.needs_input_grad[2]:
            return grad_gate, grad_up, None
        return grad_gate, grad_up, torch.mm(grads[0].flatten(0, -2).t(), product.flatten(0, -2))


def _product(gate: Tensor, up: Tensor) -> Tensor:
    product = torch.empty_like(gate)
    for g, u, p in zip(_blocks(gate), _blocks(up), _blocks(product), strict=True):
        torch.mul(F.silu(g), u, out=p)
    return product


def _product_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and the product; overwrites `grad` with up's."""
    grad_gate, product = torch.empty_like(gate), torch.empty_like(gate)
    blocks = zip(*(_blocks(tensor) for tensor in (grad, gate, up, grad_gate, product)), strict=True)
    for d, g, u, out_gate, p in blocks:
        silu = F.silu(g)
        torch.mul(silu, u, out=p)
        torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=out_gate)
        d.mul_(silu)
    return grad_gate, grad, product


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1, tensor.shape[-1]).split(_BLOCK_ROWS)
