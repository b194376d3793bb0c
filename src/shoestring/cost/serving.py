"""Prefill and decode as a roofline, per chip: what generation costs when it is neither a batch of one nor a benchmark.

A decode step of B sequences at mean context C reads the weights once and the cache of every sequence, and computes
2 FLOPs a weight and token plus attention (absorbed MLA: 2 H (2 r_kv + d_r) a key). With experts spread over chips each
token also goes to its experts and back, in every MoE layer:

    exchange = B (k + shared) d (1 + scales + 2 bytes) / network           (ISCA, arXiv 2505.09343 section 2.3.2)

and two micro-batches hide the shorter of work and exchange behind the longer. What services reach of this: DeepSeek's
own 0.56 over a day (open-infra-index, day 6: 1,850 tokens/s an H800 at 21 tokens/s a user, mean context 4,989, 144
chips), the default here; SGLang's 0.82 in a benchmark on 72 H100 (lmsys.org, 5 May 2025: 22,300 tokens/s a node at
2,000 tokens of input; the batch of 256 is DeepEP's limit, assumed). Left out: several sizes of batch, speculation.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip
from shoestring.cost.shape import ModelShape
from shoestring.cost.work import LINK, MISS, NETWORK, all_to_all_seconds

DAY_SHARE = 0.56  # of the roofline, over a whole day of live traffic (see above)
PREFILL_MFU = 0.35  # of the 16-bit peak: an estimate, which DeepSeek's 4,026 computed prompt tokens/s a chip bear out
ATTENTION_SHARE = 0.67  # FlashMLA reaches 660 of 989 TFLOP/s (deepseek-ai/FlashMLA)
THERE, BACK = 1.03, 2.0  # bytes a number: FP8 with a scale for 128 of them, and BF16


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Seconds of one decode step of one chip, by part, at full roofline."""

    weights: float
    cache: float
    products: float
    attention: float
    batch: int
    exchange: float = 0.0  # tokens to their experts and back

    @property
    def work(self) -> float:
        """Reading the weights overlaps the products; reading the cache overlaps attention."""
        return max(self.weights, self.products) + max(self.cache, self.attention)

    @property
    def seconds(self) -> float:
        """Work and exchange of two micro-batches in turn: the longer, and what still shows of the shorter."""
        return overlapped(self.work, self.exchange)

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


def overlapped(work: float, exchange: float) -> float:
    """Seconds of two activities that hide each other but for a part."""
    return max(work, exchange) + MISS * min(work, exchange)


def decode_exchange(shape: ModelShape, chip: Chip, batch: int, chips: int, *, rate: float = 0.0) -> float:
    """Seconds of a step's messages, one chip's `batch` tokens in every MoE layer, experts over `chips`.

    Each copy of a token travels by itself (DeepEP's low-latency kernels: 39-46 of 50 GB/s at 64 to 256 chips), shared
    experts included. `rate` in bytes a second replaces what the network is taken to reach.
    """
    chips = min(chips, max(1, shape.n_routed))
    if chips <= 1 or not shape.moe_layers:
        return 0.0
    rate = rate or (chip.link_bw * LINK if chips <= chip.node_size else chip.net_bw * NETWORK)
    copies = (shape.n_active + shape.n_shared) * (1 - 1 / chips)
    return shape.moe_layers * batch * copies * shape.d_model * (THERE + BACK) / rate


def held_bytes(shape: ModelShape, chips: int) -> float:
    """One-byte weights a chip holds: routed experts spread over `chips`, the rest on each. Raises UserError for a shape
    without parts."""
    shape.check_parts()
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
        exchange=decode_exchange(shape, chip, batch, chips),
    )


def decode_rate(shape: ModelShape, chip: Chip, context: int, *, chips: int = 1, batch: int | None = None) -> float:
    """Tokens a second and chip over a day. Without `batch`: as many sequences as the memory holds, to 256."""
    held = held_bytes(shape, chips)
    room = 0.85 * chip.memory_bytes - held
    if room <= 0:
        raise UserError(f"{held / 1e9:.0f} GB of weights do not fit into one {chip.name}; spread them over more chips.")
    fits = max(1, int(room / (shape.kv_numbers(context) * 2)))
    return DAY_SHARE * decode_step(shape, chip, batch or min(256, fits), context, chips=chips).tokens_per_second


def prefill_rate(shape: ModelShape, chip: Chip, length: int, *, chips: int = 1) -> float:
    """Prompt tokens a second and chip; experts over `chips`, a token crossing to a node once."""
    work = shape.flops_per_token(length, backward=False) / (PREFILL_MFU * chip.bf16)
    spread = min(chips, max(1, shape.n_routed))
    exchange = sum(all_to_all_seconds(shape, chip, shape.moe_layers, spread, size) for size in (THERE, BACK))
    return 1 / overlapped(work, exchange if shape.moe_layers else 0.0)
