"""Work of one layer on one micro-batch: products, attention, element-wise traffic, messages, in seconds.

Each part is bound by arithmetic or by memory, whichever is slower; `shoestring.cost.step` puts chunks into a
schedule and decides what is hidden. Sources of the terms: arXiv 2104.04473 (tensor and
pipeline parallelism), 2205.05198 (recomputation), 2412.19437 sections 3.1-3.2 (experts, DualPipe); shares of peak
are in data/families.csv. Nothing here is fitted to a training run. Left out: host stalls, data loading, stragglers
(they are in the residual of `shoestring.cost.residual`), network topology beyond one rate a chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, comb

from shoestring.cost.chips import Chip
from shoestring.cost.layout import Layout
from shoestring.cost.shape import ModelShape

ELEMENTWISE = 0.70  # share of memory bandwidth that chains of small kernels reach: an estimate
LINK = 0.80  # share of a link's rate that collectives reach: 160 of 200 GB/s in deepseek-ai/DeepEP on H800
NETWORK = 0.80  # the same between nodes; 40-45 of 50 GB/s in nccl-tests on 400 Gbit/s
MISS = 0.10  # part of the shorter of two overlapped activities that still shows: an estimate
LAUNCH = 4e-6  # seconds a kernel launch costs when it is not hidden
KERNELS = 20  # kernels of one layer, forward
CORES = {"volta": 80, "ampere": 108, "hopper": 132, "blackwell": 148, "ada": 128, "cdna3": 304}
TILE_M, TILE_N = 128, 128
SHORT_K = 128  # a product's inner length at which filling and draining the pipe costs half


@dataclass(frozen=True, slots=True)
class Gemm:
    """`count` products of [m, k] x [k, n]; grouped ones share a launch."""

    m: float
    n: float
    k: float
    count: float = 1
    grouped: bool = False
    low: bool = True  # runs in FP8 when the layout does


@dataclass(slots=True)
class Chunk:
    """Seconds of one stage on one micro-batch: forward, input gradient, weight gradient, and messages each way."""

    forward: float = 0.0
    backward_input: float = 0.0
    weight: float = 0.0
    message_forward: float = 0.0  # expert all-to-all
    message_backward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # forward + backward, by kind of work

    @property
    def backward(self) -> float:
        return self.backward_input + self.weight

    def add(self, kind: str, forward: float, backward_input: float, weight: float = 0.0) -> None:
        self.forward += forward
        self.backward_input += backward_input
        self.weight += weight
        self.parts[kind] = self.parts.get(kind, 0.0) + forward + backward_input + weight


def layer_gemms(shape: ModelShape, tokens: float, t: int, ep: int, moe: bool) -> Iterator[Gemm]:
    """Products of one layer, forward, one rank, for `tokens` tokens of its micro-batch."""
    d, h = shape.d_model, shape.heads
    if shape.kind == "mla":
        if shape.q_lora:
            yield Gemm(tokens, shape.q_lora + shape.kv_lora + shape.qk_rope, d)
            yield Gemm(tokens, h * shape.qk_dim / t, shape.q_lora)
        else:
            yield Gemm(tokens, h * shape.qk_dim / t, d)
            yield Gemm(tokens, shape.kv_lora + shape.qk_rope, d)
        yield Gemm(tokens, h * (shape.qk_nope + shape.v_dim) / t, shape.kv_lora)
    else:
        yield Gemm(tokens, (h + 2 * shape.kv_heads) * shape.head_dim / t, d)
    yield Gemm(tokens, d, h * shape.value_dim / t)
    up = shape.ffn_mats - 1
    if not moe or shape.dense_residual:
        yield Gemm(tokens, up * shape.ffn / t, d)
        yield Gemm(tokens, d, shape.ffn / t)
    if moe:
        local = max(1.0, shape.n_routed / ep)
        rows = tokens * shape.n_active / local
        width = shape.expert_ffn / (t if ep == 1 else 1)
        yield Gemm(rows, up * width, d, local, grouped=True)
        yield Gemm(rows, d, width, local, grouped=True)
        yield Gemm(tokens, shape.n_routed, d, low=False)
        if shape.n_shared:
            yield Gemm(tokens, up * shape.shared_width / t, d)
            yield Gemm(tokens, d, shape.shared_width / t)


def gemm_seconds(gemm: Gemm, chip: Chip, precision: str) -> float:
    """The slower of arithmetic (tiles, waves, inner length, share of peak) and memory."""
    eff = chip.efficiency
    fp8 = precision == "fp8" and gemm.low and chip.has_fp8
    share = eff.gemm_fp8 if fp8 else eff.gemm_bf16
    if gemm.grouped:
        share *= eff.grouped / eff.gemm_bf16
    flops = 2 * gemm.m * gemm.n * gemm.k * gemm.count
    use = gemm.k / (gemm.k + SHORT_K) if not chip.calibrated else 1.0
    cores = CORES.get(chip.family)
    if cores:
        tiles = ceil(gemm.m / TILE_M) * ceil(gemm.n / TILE_N) * gemm.count
        padded = gemm.m * gemm.n * gemm.count / (tiles * TILE_M * TILE_N)
        use *= max(padded, 0.1) * tiles / (ceil(tiles / cores) * cores)
    peak = chip.fp8 if fp8 else chip.bf16
    size = 1 if fp8 else 2
    traffic = gemm.count * (size * (gemm.m * gemm.k + gemm.k * gemm.n) + 2 * gemm.m * gemm.n)
    return max(flops / (peak * share * use), traffic / (chip.memory_bw * eff.memory))


def _attention(shape: ModelShape, chip: Chip, tokens: float, seq_len: int, t: int, flash: bool) -> tuple[float, float]:
    """(forward, backward) seconds of the attention core of a mean layer."""
    flops = tokens * shape.attention_flops(seq_len) / shape.layers / t
    eff = chip.efficiency
    if flash:
        return flops / (eff.attn_fwd * chip.bf16), 2.5 * flops / (eff.attn_bwd * chip.bf16)
    # scores in memory: the whole square is computed, and read and written about 13 and 20 bytes an entry
    square = 2 * flops / (0.6 * eff.gemm_bf16 * chip.bf16)
    entry = tokens * seq_len * shape.heads / t / (chip.memory_bw * eff.memory)
    return square + 13 * entry, 2 * square + 20 * entry


def _traffic(shape: ModelShape, precision: str, t: int, moe: bool, sharded_norms: bool) -> tuple[float, float]:
    """(forward, backward) bytes a token and layer outside products: norms, residuals, rope, activation, casts."""
    d, h = shape.d_model, shape.heads
    heads = h * shape.qk_dim + shape.kv_heads * (shape.qk_dim + shape.value_dim)
    width = 0 if moe and not shape.dense_residual else shape.ffn
    if moe:
        width += shape.n_active * shape.expert_ffn + shape.shared_width
    size = 4 if precision == "fp32" else 2
    whole = 10 * d * size
    split = (2 * heads + shape.ffn_mats * width) * size + (4 * shape.n_active * d * size if moe else 0)
    forward = whole / (t if sharded_norms else 1) + split / t
    if precision == "fp8":  # each operand is read and written in both orientations: 4 bytes
        operands = 2 * d + h * shape.value_dim + width + (shape.n_active * d if moe else 0)
        gradients = heads + 2 * d + (shape.ffn_mats - 1) * width + (shape.n_active * d if moe else 0)
        return forward + 4 * operands / t, 2 * forward + 4 * gradients / t
    return forward, 2 * forward


def all_to_all_seconds(shape: ModelShape, chip: Chip, tokens: float, ep: int, size: float) -> float:
    """One direction of the expert exchange: once per destination node between nodes, then over the fast link."""
    if ep <= 1:
        return 0.0
    g = min(chip.node_size, ep)
    nodes = ceil(ep / chip.node_size)
    inside = tokens * shape.d_model * size * shape.n_active * (1 - 1 / g) / (chip.link_bw * LINK)
    if nodes <= 1:
        return inside
    return max(tokens * shape.d_model * size * nodes_reached(shape, nodes) / (chip.net_bw * NETWORK), inside)


def nodes_reached(shape: ModelShape, nodes: int) -> float:
    """Other nodes a token is sent to on average; node-limited routing caps them (topk_group of n_group)."""
    e, k = shape.n_routed, shape.n_active
    expected = nodes * (1 - comb(e - e // nodes, k) / comb(e, k))
    limited = min(expected, shape.topk_group * nodes / shape.n_group) if shape.n_group > 1 else expected
    return min(limited, shape.topk_group if shape.n_group > 1 else nodes) * (1 - 1 / nodes)


def layer_chunk(
    shape: ModelShape,
    chip: Chip,
    layout: Layout,
    seq_len: int,
    *,
    moe: bool,
    flash: bool = True,
    imbalance: float = 1.0,
) -> Chunk:
    """One layer on one micro-batch."""
    tokens, t = layout.micro_batch * seq_len / layout.cp, layout.tp
    chunk = Chunk()
    for gemm in layer_gemms(shape, tokens, t, layout.ep, moe):
        scale = imbalance if gemm.grouped else 1.0
        once = gemm_seconds(gemm, chip, layout.precision) * scale
        turned = gemm_seconds(Gemm(gemm.m, gemm.k, gemm.n, gemm.count, gemm.grouped, gemm.low), chip, layout.precision)
        weight = gemm_seconds(Gemm(gemm.k, gemm.n, gemm.m, gemm.count, gemm.grouped, gemm.low), chip, layout.precision)
        chunk.add("products", once, turned * scale, weight * scale)
    chunk.add("attention", *_attention(shape, chip, tokens, seq_len, t, flash))
    bandwidth = chip.memory_bw * ELEMENTWISE
    bytes_forward, bytes_backward = _traffic(shape, layout.precision, t, moe, flash or layout.recompute == "selective")
    chunk.add("element-wise", tokens * bytes_forward / bandwidth, tokens * bytes_backward / bandwidth)
    if not chip.calibrated:
        chunk.add("launches", KERNELS * LAUNCH * 0.25, KERNELS * LAUNCH * 0.5)
    _recompute(chunk, shape, chip, layout, seq_len, flash)
    if t > 1:
        _tensor_messages(chunk, shape, chip, layout, tokens)
    if layout.cp > 1:
        _context_messages(chunk, shape, chip, layout, seq_len)
    if moe and layout.ep > 1:
        size = 1.03 if layout.precision == "fp8" else 2.0
        out, back = (all_to_all_seconds(shape, chip, tokens, layout.ep, s) for s in (size, 2.0))
        chunk.message_forward = chunk.message_backward = out + back
    return chunk


def _recompute(chunk: Chunk, shape: ModelShape, chip: Chip, layout: Layout, seq_len: int, flash: bool) -> None:
    if layout.recompute == "full":
        chunk.add("recomputation", 0.0, chunk.forward)
    elif layout.recompute == "selective":
        tokens = layout.micro_batch * seq_len / layout.cp
        if flash:
            extra = tokens * 4 * shape.d_model * 2 / (chip.memory_bw * ELEMENTWISE) / layout.tp
        else:
            extra = _attention(shape, chip, tokens, seq_len, layout.tp, flash)[0]
        chunk.add("recomputation", 0.0, extra)


def _tensor_messages(chunk: Chunk, shape: ModelShape, chip: Chip, layout: Layout, tokens: float) -> None:
    """Two all-reduces (or their two halves) a layer and direction; none of it hidden."""
    t = layout.tp
    rate = chip.link_bw * LINK if t <= chip.node_size else chip.net_bw * NETWORK
    one = 2 * tokens * shape.d_model * 2 * (t - 1) / t / rate
    again = 2 * one if layout.recompute == "full" else 0.0
    chunk.add("tensor-parallel messages", 2 * one, 2 * one + again)


def _context_messages(chunk: Chunk, shape: ModelShape, chip: Chip, layout: Layout, seq_len: int) -> None:
    """Keys and values (MLA: latents) go round a ring behind attention, and come back with gradients (2310.01889)."""
    rate = chip.link_bw * LINK if layout.cp * layout.tp <= chip.node_size else chip.net_bw * NETWORK
    others = layout.micro_batch * seq_len * (1 - 1 / layout.cp)
    once = others * shape.kv_numbers_per_token() / shape.layers * 2 / layout.tp / rate
    attention = chunk.parts["attention"]  # forward and backward, 1 to 2.5 and more

    def shown(messages: float, work: float) -> float:
        return max(0.0, messages - work) + MISS * min(messages, work)

    chunk.add("context messages", shown(once, attention / 3.5), shown(2 * once, attention * 2.5 / 3.5))


def head_chunk(shape: ModelShape, chip: Chip, layout: Layout, seq_len: int) -> Chunk:
    """Output head and loss on one micro-batch."""
    tokens = layout.micro_batch * seq_len / layout.cp
    n = shape.vocab / layout.tp
    chunk = Chunk()
    gemm = (Gemm(tokens, n, shape.d_model, low=False), Gemm(tokens, shape.d_model, n, low=False),
            Gemm(shape.d_model, n, tokens, low=False))  # fmt: skip
    chunk.add("head", *(gemm_seconds(g, chip, layout.precision) for g in gemm))
    soft = tokens * n * 4 / (chip.memory_bw * ELEMENTWISE)
    chunk.add("head", 2 * soft, 2 * soft)
    return chunk


def embedding_chunk(shape: ModelShape, chip: Chip, layout: Layout, seq_len: int) -> Chunk:
    """Rows of the table read and written, and their gradients added to it in 32 bits."""
    tokens = layout.micro_batch * seq_len / layout.cp
    chunk = Chunk()
    row = tokens * shape.d_model / layout.tp / (chip.memory_bw * ELEMENTWISE)
    chunk.add("embedding", 4 * row, 0.0, 10 * row)
    return chunk


def projection_chunk(shape: ModelShape, chip: Chip, layout: Layout, seq_len: int) -> Chunk:
    """What an MTP module adds to a layer and a head: a product with [2d, d] (arXiv 2412.19437 section 2.2)."""
    tokens, d = layout.micro_batch * seq_len / layout.cp, shape.d_model
    sides = ((tokens, d / layout.tp, 2 * d), (tokens, 2 * d / layout.tp, d), (2 * d, d / layout.tp, tokens))
    chunk = Chunk()
    chunk.add("products", *(gemm_seconds(Gemm(m, n, k), chip, layout.precision) for m, n, k in sides))
    return chunk
