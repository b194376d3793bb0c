"""Linear layers whose weights stay in master precision and whose product runs in the input's dtype; SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.nn import elements, multiply


class Linear(nn.Module):
    """y = x Wᵀ (+ b). `weight` [out, in] keeps its own dtype (fp32 when training); x decides the compute dtype."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def forward(self, x: Tensor, native: bool = False) -> Tensor:
        return together(x, (self,), native)


def together(x: Tensor, layers: Sequence[Linear], native: bool = False) -> Tensor:
    """Several linears of one input as one product: the outputs side by side in the last dimension."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [x.new_zeros(weight.shape[0]) for weight in weights]
        pairs = zip(layers, zeros, strict=True)
        bias = torch.cat([zero if layer.bias is None else layer.bias.to(x.dtype) for layer, zero in pairs])
    if multiply.usable(native, x, weights):
        y = multiply.linear(x, weights)
        return y if bias is None else y + bias
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return F.linear(x, weight.to(x.dtype), bias)


def swiglu_plain(h: Tensor) -> Tensor:
    """silu(gate) · up for h = [gate | up] in the last dimension."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dh, and silu(gate) · up again, which costs one more product. `dy` is overwritten."""
    gate, up = h.chunk(2, dim=-1)
    dh = torch.empty_like(h)
    dgate, dup = dh.chunk(2, dim=-1)
    s = F.silu(gate)
    torch.mul(dy, s, out=dup)
    torch.ops.aten.silu_backward.grad_input(dy.mul_(up), gate, grad_input=dgate)
    return dh, s.mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return swiglu_backward(dy.clone(), ctx.saved_tensors[0])[0]


class _NativeSwiGLU(torch.autograd.Function):
    """The same in C: one pass forward, one backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        F = h.shape[-1] // 2
        a = torch.empty(*h.shape[:-1], F, dtype=h.dtype)
        elements.call("swiglu_forward", h.dtype, h, a.numel() // max(F, 1), F, a)
        return a

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        dh, F = torch.empty_like(h), dy.shape[-1]
        elements.call(
            "swiglu_backward", h.dtype, dy.contiguous(), h, None, dy.numel() // max(F, 1), F, dh, None, None
        )  # fmt: skip
        return dh


def swiglu(h: Tensor, *, native: bool = False) -> Tensor:
    """The fast twins of `swiglu_plain`: they keep only h for the backward, and write dh in one piece."""
    y: Tensor = (_NativeSwiGLU if elements.usable(native, h) else _SwiGLU).apply(h)
    return y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward block, and the shared expert."""

    def __init__(self, d_model: int, width: int, *, bias: bool = False, device: torch.device | None = None):
        super().__init__()
        self.gate_proj = Linear(d_model, width, bias=bias, device=device)
        self.up_proj = Linear(d_model, width, bias=bias, device=device)
        self.down_proj = Linear(width, d_model, bias=bias, device=device)

    def forward(self, x_BTD: Tensor, native: bool = False) -> Tensor:
        return self.down_proj(swiglu(together(x_BTD, (self.gate_proj, self.up_proj), native), native=native), native)
