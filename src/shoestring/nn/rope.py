"""Rotary position embedding and its extensions: YaRN (V3 section 4.3) and Llama 3.1's frequency scaling.

Interleaved checkpoints (DeepSeek) pair dimensions (0,1), (2,3), ...; Llama-style ones pair (0, R/2), (1, R/2+1), ....
Each layout is kept, as in DeepSeek's own code (transformers writes interleaved pairs out half-split: other raw
vectors, the same scores).
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shoestring.core.config import Config
from shoestring.nn import elements


class RopeScaling(Config):
    """How a trained context is stretched; Hugging Face's names. Fields that only the other type uses are ignored."""

    rope_type: Literal["yarn", "llama3"]
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"low_freq_factor={low} must be less than high_freq_factor={high}")
        return self


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
    ramp_R = ((torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
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

    def table(self, positions_BT: Tensor) -> Tensor:
        """The complex64 cos + i sin, [..., T, 1, R/2] for positions of shape [..., T]; the 1 is for the heads."""
        angle = positions_BT[..., None].float() * self.freq_R.to(positions_BT.device)
        return torch.polar(torch.full_like(angle, self.factor), angle).unsqueeze(-2)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def _turn(x: Tensor, cis: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, in fp32 (or better), times cis."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    if interleaved:
        z = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * cis
        return torch.view_as_real(z).flatten(-2).to(x.dtype)
    z = torch.complex(*wide.chunk(2, dim=-1)) * cis
    return torch.cat([z.real, z.imag], dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cis: Tensor, interleaved: bool) -> Tensor:
        ctx.cis, ctx.interleaved = cis, interleaved
        return _turn(x, cis, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _turn(dy, ctx.cis.conj(), ctx.interleaved), None, None


class _NativeRotate(torch.autograd.Function):
    """The same in C; heads may be wider than R, their first numbers are copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cis: Tensor, interleaved: bool) -> Tensor:
        ctx.cis, ctx.interleaved = angles(cis), interleaved
        return _NativeRotate.turn(x, ctx.cis, 1.0, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _NativeRotate.turn(dy, ctx.cis, -1.0, ctx.interleaved), None, None

    @staticmethod
    def turn(x: Tensor, cis_SR: Tensor, sign: float, interleaved: bool) -> Tensor:
        x_NX, (H, K), (S, R) = elements.rows(x.flatten(-2)), x.shape[-2:], cis_SR.shape
        y = torch.empty(x.shape, dtype=x.dtype)
        elements.call(
            "rotate", x.dtype, x_NX, x_NX.stride(0), cis_SR, S, sign, len(x_NX), H, K, R, interleaved, y
        )  # fmt: skip
        return y


def angles(cis: Tensor) -> Tensor:
    """A table [(B,) T, 1, R/2] as native functions read it: cos and sin of each pair, [positions, R]."""
    return torch.view_as_real(cis).contiguous().view(-1, 2 * cis.shape[-1])


def rotate(x: Tensor, cis: Tensor, *, interleaved: bool, native: bool = False) -> Tensor:
    """Rotate the last dimension of x [..., T, H, R] by cis [..., T, 1, R/2]; the layout of the pairs stays."""
    y: Tensor = (_NativeRotate if elements.usable(native, x) else _Rotate).apply(x, cis, interleaved)
    return y


def rotate_ends(x: Tensor, cis: Tensor, *, interleaved: bool) -> Tensor:
    """`rotate` of the last R numbers of wider heads, in C."""
    y: Tensor = _NativeRotate.apply(x, cis, interleaved)
    return y


def rotate_plain(x: Tensor, cis: Tensor, *, interleaved: bool) -> Tensor:
    """The readable twin: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    y1, y2 = x1 * cis.real - x2 * cis.imag, x2 * cis.real + x1 * cis.imag
    return torch.stack([y1, y2], dim=-1).flatten(-2) if interleaved else torch.cat([y1, y2], dim=-1)
