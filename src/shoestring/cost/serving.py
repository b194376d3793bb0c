"""Prefill and decode as a roofline, per chip: what generation costs when it is neither a batch of one nor a benchmark.

A decode step of B sequences at mean context C reads the weights once and the cache of every sequence, and computes
2 FLOPs a weight and token plus attention (absorbed MLA: 2 H (2 r_kv + d_r) a key). DeepSeek's own service (open-infra-
index, day 6: 1,850 tokens/s an H800 at 21 tokens/s a user, mean context 4,989) reached about 0.4 of this roofline over
a day; that share is the default here.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip
from shoestring.cost.shape import ModelShape

DAY_SHARE = 0.40  # of the roofline, over a whole day of live traffic (see above)
PREFILL_MFU = 0.35  # of the 16-bit peak: an estimate
ATTENTION_SHARE = 0.67  # FlashMLA reaches 660 of 989 TFLOP/s (deepseek-ai/FlashMLA)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Seconds of one decode step of one chip, by part, at full roofline."""

    weights: float
    cache: float
    products: float
    attention: float
    batch: int

    @property
    def seconds(self) -> float:
        """Reading the weights overlaps the products; reading the cache overlaps attention."""
        return max(self.weights, self.products) + max(self.cache, self.attention)

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


def held_bytes(shape: ModelShape, chips: int) -> float:
    """One-byte weights a chip holds: routed experts spread over `chips`, the rest on each."""
    count = shape.params()
    return count.total - count.experts + count.experts / min(chips, max(1, shape.n_routed or 1))


def decode_step(
    shape: ModelShape, chip: Chip, batch: int, context: int, *, chips: int = 1, cache_bytes: float = 2.0
) -> DecodeStep:
    """`batch` sequences a chip at `context` tokens. Raises UserError for sizes below 1."""
    if batch < 1 or context < 1 or chips < 1:
        raise UserError("batch, context and chips of a serving plan must be at least 1.")
    mla = shape.kind == "mla"
    width = 2 * shape.kv_lora + shape.qk_rope if mla else shape.qk_dim + shape.value_dim
    flops = batch * context * shape.layers * 2 * shape.heads * width
    return DecodeStep(
        weights=held_bytes(shape, chips) / chip.memory_bw,
        cache=batch * shape.kv_numbers(context) * cache_bytes / chip.memory_bw,
        products=2 * shape.matmul_params() * batch / (chip.efficiency.gemm_bf16 * chip.bf16),
        attention=flops / (ATTENTION_SHARE * chip.bf16),
        batch=batch,
    )


def decode_rate(shape: ModelShape, chip: Chip, context: int, *, chips: int = 1, batch: int | None = None) -> float:
    """Tokens a second and chip over a day. Without `batch`: as many sequences as the memory holds, to 256."""
    held = held_bytes(shape, chips)
    room = 0.85 * chip.memory_bytes - held
    if room <= 0:
        raise UserError(f"{held / 1e9:.0f} GB of weights do not fit into one {chip.name}; spread them over more chips.")
    fits = max(1, int(room / (shape.kv_numbers(context) * 2)))
    return DAY_SHARE * decode_step(shape, chip, batch or min(256, fits), context, chips=chips).tokens_per_second


def prefill_rate(shape: ModelShape, chip: Chip, length: int) -> float:
    """Prompt tokens a second and chip."""
    return PREFILL_MFU * chip.bf16 / shape.flops_per_token(length, backward=False)
