"""Block-wise FP8 as in DeepSeek's checkpoints and training (V3 section 3.3): e4m3, one fp32 scale per block.

`weight_scale_inv` MULTIPLIES: weight = fp8 · scale_inv. Weights have one scale per 128x128 block (ragged edges are
padded with zeros, and the padding is dropped), activations one per token and 128 channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
BLOCK = 128


def dequantize(weight: Tensor, scale_inv: Tensor, block: int = BLOCK) -> Tensor:
    """fp32 weight of an fp8 weight [out, in] and its scales [ceil(out/block), ceil(in/block)]."""
    out, width = weight.shape
    scale = scale_inv.float().repeat_interleave(block, 0)[:out].repeat_interleave(block, 1)[:, :width]
    return weight.float() * scale


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    scale = amax.clamp(min=1e-4) / E4M3_MAX
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


def _round(scaled: Tensor) -> Tensor:
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)  # casts differ beyond the range: clamp first


def quantize_weight(weight: Tensor, block: int = BLOCK, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """fp8 weight and its `weight_scale_inv`; `power_of_two` is the ue8m0 format of V3.1."""
    out, width = weight.shape
    padded = F.pad(weight.float(), (0, -width % block, 0, -out % block))
    tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))  # [out/block, block, in/block, block]
    scale = _scale(tiles.abs().amax((1, 3)), power_of_two)
    return _round((tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:out, :width]), scale


def quantize_activation(x: Tensor, block: int = BLOCK, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """fp8 x [..., D] and scales [..., D/block]: one per token and block of channels."""
    if x.shape[-1] % block:
        raise ValueError(f"the last dimension ({x.shape[-1]}) must be a multiple of {block}")
    tiles = x.float().unflatten(-1, (-1, block))
    scale = _scale(tiles.abs().amax(-1), power_of_two)
    return _round(tiles / scale[..., None]).flatten(-2), scale
