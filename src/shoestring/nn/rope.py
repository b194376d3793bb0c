"""Rotary position embedding and its extensions: YaRN (V3 section 4.3) and Llama 3.1's frequency scaling.

Interleaved checkpoints (DeepSeek) pair dimensions (0,1), (2,3), ...; Llama-style ones pair (0, R/2), (1, R/2+1), ....
Both are rotated here into the half-split order. The same permutation falls on queries and keys, so scores are those
of the original; raw rotated vectors and caches differ from DeepSeek's own code by that permutation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from shoestring.core.config import Config


class RopeScaling(Config):
    """How a trained context is stretched; Hugging Face's names. Fields that only the other type uses are ignored."""

    rope_type: Literal["yarn", "llama3"]
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1: the growth of attention logits that a stretched context asks for."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(freq_R: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Fast dimensions keep their frequency, slow ones are divided by `factor`, a linear ramp in between."""
    dim = 2 * len(freq_R)

    def dimension_turning(n: float) -> float:  # the dimension that turns n times in the original context
        return dim * math.log(scaling.original_max_position_embeddings / (n * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp_R = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq_R / scaling.factor * ramp_R + freq_R * (1 - ramp_R)


def _llama3(freq_R: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths beyond the original context are stretched by `factor`, short ones kept, smooth in between."""
    turns_R = scaling.original_max_position_embeddings * freq_R / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth_R = ((turns_R - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_R) * freq_R / scaling.factor + smooth_R * freq_R


class Rope:
    """The frequencies of one model, and the factor on cos and sin (YaRN's; 1 otherwise). Holds no parameters."""

    def __init__(self, dim: int, base: float, scaling: RopeScaling | None = None):
        self.freq_R = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        self.factor = 1.0
        if scaling is not None and scaling.rope_type == "llama3":
            self.freq_R = _llama3(self.freq_R, scaling)
        if scaling is not None and scaling.rope_type == "yarn":
            self.freq_R = _yarn(self.freq_R, base, scaling)
            self.factor = _yarn_attention_factor(scaling)

    def table(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, fp32, [..., T, R/2] for positions of shape [..., T]."""
        angle = positions_BT[..., None].float() * self.freq_R.to(positions_BT.device)
        return angle.cos() * self.factor, angle.sin() * self.factor


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the last dimension of x [B, T, H, R] by cos and sin [(B,) T, R/2]; the result is half-split."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
