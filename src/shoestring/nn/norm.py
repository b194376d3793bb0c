"""RMSNorm: x / sqrt(mean(x²) + eps) * weight, statistics in fp32 (V3 technical report, section 2).

Written by hand because on a CPU every element-wise pass is a trip through memory, and torch has no fused RMSNorm
there: nine passes backward where autograd makes more than twice as many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 all the way, one rounding at the end (transformers rounds once more, before the weight)."""
    x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Backward, with x̂ = x r and g = dy ∘ weight:  dx = r (g - x̂ mean(g x̂)),  dweight = Σ_rows dy ∘ x̂."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        accurate = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(accurate)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight.to(accurate)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        D = x.shape[-1]
        w = weight.to(r.dtype)
        x_hat = (x.to(r.dtype) * r).reshape(-1, D)
        g = dy.to(r.dtype, copy=True).reshape(-1, D)
        product = g * x_hat
        dweight = product.t() @ product.new_ones(len(product)) if ctx.needs_input_grad[1] else None
        c = (product @ w).div_(-D).unsqueeze(1)
        dx = g.mul_(w).addcmul_(x_hat, c).mul_(r.view(-1, 1))
        return dx.to(x.dtype).view(x.shape), None if dweight is None else dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The fast twin of `rms_norm_plain`."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class RMSNorm(nn.Module):
    """With its own weight; statistics over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6, *, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
