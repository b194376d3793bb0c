"""Linear layers whose weights stay in master precision and whose product runs in the input's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ (+ b). `weight` [out, in] keeps its own dtype (fp32 when training); x decides the compute dtype."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def together(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """Several linears of one input as one product: the outputs side by side in the last dimension."""
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = (x.new_zeros(layer.weight.shape[0]) for layer in layers)
        bias = torch.cat(
            [z if layer.bias is None else layer.bias.to(x.dtype) for z, layer in zip(zeros, layers, strict=True)]
        )
    return F.linear(x, weight, bias)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward block, and the shared expert."""

    def __init__(self, d_model: int, width: int, *, bias: bool = False, device: torch.device | None = None):
        super().__init__()
        self.gate_proj = Linear(d_model, width, bias=bias, device=device)
        self.up_proj = Linear(d_model, width, bias=bias, device=device)
        self.down_proj = Linear(width, d_model, bias=bias, device=device)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = together(x_BTD, (self.gate_proj, self.up_proj)).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)
