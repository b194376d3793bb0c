"""Weights made ready for many products with few rows: cast once, packed for the machine where that is faster.

`Product(weight, bias)` is y = x Wᵀ (+ b) (+ add). In bf16 on a CPU the weight is packed by oneDNN once: measured at
1 to 16 rows that is 1.3 to 2.5 times as fast as `F.linear`, and nowhere slower (LOG.md). In fp32 the weight is the
parameter itself, not a copy.

`tile` is for batch invariance: products run on exactly so many rows at a time, padded with zeros, so that a row's
result cannot depend on how many other rows there are (matrix libraries choose other kernels for other row counts).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN's packed products are there for this dtype and device."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # not on processors without AVX-512 or the like


def to_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Weights rounded to int8 [out, in], and a scale for each row: w = scale · int8, symmetric, largest to 127."""
    wide = weight_OI.detach().float()
    scale_O = wide.abs().amax(1).div_(127.0)
    scale_O = torch.where(scale_O > 0, scale_O, 1.0)
    return (wide / scale_O[:, None]).round_().to(torch.int8), scale_O


def through_int8(weight_OI: Tensor) -> Tensor:
    """What int8 leaves of the weights, in their dtype."""
    int8_OI, scale_O = to_int8(weight_OI)
    return (int8_OI.float() * scale_O[:, None]).to(weight_OI.dtype)


class Product:
    """y = x Wᵀ (+ b) (+ add) for x [N, in]; the result has x's dtype."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, dtype: torch.dtype, tile: int = 0):
        weight_OI = weight_OI.detach().to(dtype)
        self.bias = None if bias_O is None else bias_O.detach().to(dtype)
        self.tile = tile
        self.out_features, self.in_features = weight_OI.shape
        self.packed = can_pack(dtype, weight_OI.device)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous()) if self.packed else weight_OI

    def __call__(self, x_NI: Tensor, add_NO: Tensor | None = None) -> Tensor:
        if not self.tile:
            return self._rows(x_NI, add_NO)
        y_NO = torch.cat([self._rows(piece, None) for piece in self._tiles(x_NI)])[: len(x_NI)]
        return y_NO if add_NO is None else y_NO + add_NO

    def _tiles(self, x_NI: Tensor) -> list[Tensor]:
        pad = -len(x_NI) % self.tile
        return list(F.pad(x_NI, (0, 0, 0, pad)).view(-1, self.tile, x_NI.shape[1]).unbind())

    def _rows(self, x_NI: Tensor, add_NO: Tensor | None) -> Tensor:
        y_NO: Tensor
        if self.packed:
            linear = torch.ops.mkldnn._linear_pointwise
            if add_NO is None:
                y_NO = linear(x_NI, self.weight, self.bias, "none", [], "")
            else:
                y_NO = linear.binary(x_NI, add_NO, self.weight, self.bias, "add")
            return y_NO
        if add_NO is None:
            return F.linear(x_NI, self.weight, self.bias)
        if self.bias is None:
            return torch.addmm(add_NO, x_NI, self.weight.t())
        return F.linear(x_NI, self.weight, self.bias) + add_NO
