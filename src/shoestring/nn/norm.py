"""RMSNorm: x / sqrt(mean(x²) + eps) * weight, statistics in fp32 (V3 technical report, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 all the way, one rounding at the end (transformers rounds once more, before the weight)."""
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """With its own weight; statistics over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6, *, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_plain(x, self.weight, self.eps)
