"""RMSNorm: x / sqrt(mean(x²) + eps) * weight, statistics in fp32 (V3 technical report, section 2).

Written by hand because on a CPU every element-wise pass is a trip through memory, and torch has no fused RMSNorm
there: nine passes backward, in cache, where autograd makes more than twice as many through memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shoestring.nn import elements


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 all the way, one rounding at the end (transformers rounds once more, before the weight)."""
    x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight).to(x.dtype)


CHUNK = 1 << 18  # elements worked on at a time: the fp32 intermediates stay in a core's cache


class _RMSNorm(torch.autograd.Function):
    """Backward, with x̂ = x r and g = dy ∘ weight:  dx = r (g - x̂ mean(g x̂)),  dweight = Σ_rows dy ∘ x̂."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        y_ND = torch.empty_like(x_ND)
        r_N1 = x.new_empty(len(x_ND), 1, dtype=torch.promote_types(x.dtype, torch.float32))
        w_D = weight.to(r_N1.dtype)
        for n in _chunks(x_ND):
            wide = x_ND[n].to(r_N1.dtype)
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            torch.rsqrt(norm.square_().div_(len(w_D)).add_(eps), out=r_N1[n])
            y_ND[n] = (wide * r_N1[n]).mul_(w_D)
        ctx.save_for_backward(x_ND, weight, r_N1)
        return y_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight, r_N1 = ctx.saved_tensors
        dy_ND, dx_ND = dy.reshape(x_ND.shape), torch.empty_like(x_ND)
        w_D = weight.to(r_N1.dtype)
        dw_D = torch.zeros_like(w_D)
        for n in _chunks(x_ND):
            x_hat = x_ND[n].to(r_N1.dtype) * r_N1[n]
            g = dy_ND[n].to(r_N1.dtype, copy=True)
            product = g * x_hat
            dw_D += product.sum(0)
            c_N1 = (product @ w_D).div_(-len(w_D)).unsqueeze(1)
            dx_ND[n] = g.mul_(w_D).addcmul_(x_hat, c_N1).mul_(r_N1[n])
        return dx_ND.view(dy.shape), dw_D.to(weight.dtype), None


def _chunks(x_ND: Tensor) -> list[slice]:
    rows = max(1, CHUNK // x_ND.shape[1])
    return [slice(n, n + rows) for n in range(0, len(x_ND), rows)]


class _NativeRMSNorm(torch.autograd.Function):
    """The same in C: one pass forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_ND = elements.rows(x)
        (N, D), w_D = x_ND.shape, weight.float()
        y, r_N = torch.empty(x.shape, dtype=x.dtype), torch.empty(N)
        elements.call("norm_forward", x.dtype, x_ND, x_ND.stride(0), w_D, eps, N, D, y, r_N)
        ctx.save_for_backward(x_ND, weight, r_N)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight, r_N = ctx.saved_tensors
        (N, D), w_D = x_ND.shape, weight.float()
        dx, dw_D = torch.empty(dy.shape, dtype=dy.dtype), torch.empty(D)
        elements.call(
            "norm_backward", dy.dtype, x_ND, x_ND.stride(0), w_D, r_N, dy.contiguous(), N, D, dx, dw_D
        )  # fmt: skip
        return dx, dw_D.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, native: bool = False) -> Tensor:
    """The fast twins of `rms_norm_plain`."""
    way = _NativeRMSNorm if elements.usable(native, x) else _RMSNorm
    y: Tensor = way.apply(x, weight, eps)
    return y


class RMSNorm(nn.Module):
    """With its own weight; statistics over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6, *, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device))
        self.eps = eps

    def forward(self, x: Tensor, native: bool = False) -> Tensor:
        return rms_norm(x, self.weight, self.eps, native=native)
