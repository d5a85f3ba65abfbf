"""A model arrives; inside a block some of its layers compute the same in fewer passes and less memory.

Autograd keeps every intermediate of a layer for the backward pass. Here an RMS norm keeps its input and one number a
row; a gated SiLU layer keeps its two linear outputs, and makes the product that the last linear layer needs again; a
LoRA layer keeps its input and adds into its output in place.

Shape key: R rows (tokens), D width, I width of a gated layer, O outputs of a linear layer, K rank of its adapter.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import ACT2FN

# Rows at a time in the gated layer, so that its five (rows, I) operands stay in the processor's cache.
_BLOCK_ROWS = 64
_TOLERANCE = 1e-5


Compute = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """How many layers were replaced."""

    num_norms: int
    num_gated: int
    num_lora: int


@contextlib.contextmanager
def fused_layers(model: nn.Module) -> Iterator[FusedLayers]:
    """Within the block, every layer for which an exact replacement is known computes by it; weights stay in place.

    A layer is replaced only if a probe finds its output and gradients unchanged (1e-5 of the largest, fp32 on a CPU).
    Inputs of other types, autocast and passes without gradients still go to the original. Enter it after the adapter
    is in place; the backward pass belongs inside the block as well. A copy made inside would compute by the original's
    weights: copy models outside.
    """
    replaced: list[tuple[nn.Module, Compute]] = []
    try:
        for module in model.modules():
            compute = _replacement(module)
            if compute is not None and "forward" not in vars(module) and _agrees(module, compute):
                module.forward = _chosen(module, module.forward, compute)
                replaced.append((module, compute))
        counts = [sum(1 for _, used in replaced if used is compute) for compute in (_norm, _gated, _lora)]
        yield FusedLayers(*counts)
    finally:
        for module, _ in replaced:
            del module.forward


def _chosen(module: nn.Module, original: Compute, compute: Compute) -> Compute:
    """Return a `forward` that computes by the replacement where the probe's conditions hold, else as before."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = hidden.dtype == torch.float32 and hidden.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if args or kwargs or not plain or not torch.is_grad_enabled():
            return original(hidden, *args, **kwargs)
        return compute(module, hidden)

    return forward


def _replacement(module: nn.Module) -> Compute | None:
    """Return the replacement for which a module has the right parts."""
    if isinstance(module, LoraLinear):
        return _lora if _is_plain_lora(module) else None
    children = {name for name, _ in module.named_children()}
    if children == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return _gated if isinstance(module.act_fn, _SILU) else None
    names = [name for name, _ in module.named_parameters()]
    is_norm = not children and names == ["weight"] and _epsilon(module) is not None
    return _norm if is_norm and module.weight.ndim == 1 else None  # pyright: ignore[reportCallIssue]


_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _is_plain_lora(module: LoraLinear) -> bool:
    base, names = module.get_base_layer(), list(module.active_adapters)
    if (
        type(module) is not LoraLinear
        or type(base) is not nn.Linear
        or len(names) != 1
        or names[0] not in module.lora_A
    ):
        return False
    down, up = module.lora_A[names[0]], module.lora_B[names[0]]
    plain = type(down) is nn.Linear and type(up) is nn.Linear and down.bias is None and up.bias is None
    exact = plain and names[0] not in module.lora_variant and isinstance(module.lora_dropout[names[0]], nn.Identity)
    return exact and not any(parameter.requires_grad for parameter in base.parameters())


def _width(module: Any) -> int:
    if isinstance(module, LoraLinear):
        return module.get_base_layer().in_features  # pyright: ignore[reportReturnType]
    return module.weight.shape[0] if hasattr(module, "weight") else module.gate_proj.in_features


def _agrees(module: nn.Module, compute: Compute) -> bool:
    """Tell whether a replacement gives the module's output and gradients for random rows, in evaluation mode."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in module.parameters()):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((1, 5, _width(module)), generator=generator)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    outcomes = []
    try:
        for function in (module.forward, functools.partial(compute, module)):
            with torch.enable_grad():
                hidden = rows.clone().requires_grad_()
                out = function(hidden)
                grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
                grads = torch.autograd.grad(out, [hidden, *parameters], grad)
            outcomes.append((out.detach(), *grads))
    finally:
        for part, training in modes.items():
            part.training = training
    return all(
        float((ours - theirs).abs().max()) <= _TOLERANCE * max(float(theirs.abs().max()), 1e-6)
        for theirs, ours in zip(*outcomes, strict=True)
    )


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden, module.weight, _epsilon(module))


def _gated(module: Any, hidden: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(hidden), module.up_proj(hidden), module.down_proj
    if type(down) is nn.Linear and down.bias is None and not down._forward_hooks and not down._forward_pre_hooks:
        return _GatedDown.apply(gate, up, down.weight)
    return down(_GatedProduct.apply(gate, up))


def _lora(module: Any, hidden: Tensor) -> Tensor:
    (name,), base = module.active_adapters, module.get_base_layer()
    if module.merged or module.disable_adapters:
        return F.linear(hidden, base.weight, base.bias)
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return _LoraLinear.apply(hidden, base.weight, base.bias, down, up, module.scaling[name])


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
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # With s = scale: d s / d x = -s³ x / D, so  d x = s·g·w - x · (s³ / D) · sum(g·w·x)  and  d w = sum(g·x·s).
        x, weight_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        x_RD, grad_RD, scale_R1 = x.reshape(-1, width), grads[0].reshape(-1, width), scale.reshape(-1, 1)
        product_RD = torch.mul(grad_RD, x_RD)
        grad_weight_D = torch.mv(product_RD.t(), scale_R1[:, 0]) if ctx.needs_input_grad[1] else None
        factor_R1 = torch.mv(product_RD, weight_D)[:, None].mul_(scale_R1.pow(3)).div_(width)
        grad_x_RD = torch.mul(grad_RD, weight_D, out=product_RD).mul_(scale_R1).addcmul_(x_RD, factor_R1, value=-1)
        return grad_x_RD.view_as(x), grad_weight_D, None


class _LoraLinear(torch.autograd.Function):
    """x @ weight.T + bias + factor · (x @ down.T) @ up.T, with weight and bias frozen."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight_OD, bias_O, down_KD, up_OK, factor = inputs
        ctx.save_for_backward(x, weight_OD, down_KD, up_OK)
        ctx.factor = factor
        out = F.linear(x, weight_OD, bias_O)
        out.flatten(0, -2).addmm_(F.linear(x.flatten(0, -2), down_KD), up_OK.t(), alpha=factor)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OD, down_KD, up_OK = ctx.saved_tensors
        x_RD, grad_RO = x.flatten(0, -2), grads[0].flatten(0, -2)
        grad_inner_RK = torch.mm(grad_RO, up_OK).mul_(ctx.factor)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_RO, weight_OD).addmm_(grad_inner_RK, down_KD).view_as(x)
        grad_down_KD = torch.mm(grad_inner_RK.t(), x_RD)
        grad_up_OK = torch.mm(grad_RO.t(), F.linear(x_RD, down_KD)).mul_(ctx.factor)
        return grad_x, None, None, grad_down_KD, grad_up_OK, None


class _GatedProduct(torch.autograd.Function):
    """silu(gate) · up, keeping the two operands only."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        gate, up = inputs
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
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
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
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
