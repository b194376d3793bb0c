"""Time of one optimizer step: chunks of work put into a pipeline schedule, with what overlaps and what does not.

Sources: arXiv 2104.04473 (1F1B, interleaving), 2401.10241 (zero bubble), 2412.19437 (DualPipe), 1910.02054 and
2304.11277 (ZeRO, FSDP). Rings between nodes use every network port of a node, so a data-parallel group with g
ranks in a node moves at g times one port's rate. Nothing here is fitted to a training run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster
from shoestring.cost.layout import Layout
from shoestring.cost.memory import stage_params
from shoestring.cost.pipeline import bubble, dualpipe_calls
from shoestring.cost.shape import ModelShape
from shoestring.cost.work import ELEMENTWISE, LINK, NETWORK, Chunk, head_chunk, layer_chunk

MISS = 0.10  # part of the shorter of two overlapped activities that still shows: an estimate
COMM_CORES = 20 / 132  # cores lent to communication while it overlaps (arXiv 2412.19437 section 3.2.2)
OPTIMIZER_BYTES = 30  # read and written a parameter by AdamW with FP32 master, moments and gradient


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step, by phase (they add up), and the slowest rank's micro-batch by kind of work."""

    seconds: float
    phases: dict[str, float]
    kinds: dict[str, float]  # one micro-batch, forward and backward
    micro_batches: int
    hardware_ratio: float  # hardware FLOPs over model FLOPs: about 4/3 with full recomputation
    tokens: float
    chunk: dict[str, float] = field(default_factory=dict)  # one micro-batch on a stage: F, B, W, and FB together

    def tokens_per_chip(self, chips: int) -> float:
        return self.tokens / self.seconds / chips


@dataclass(frozen=True, slots=True)
class Stage:
    """The slowest stage: seconds of one micro-batch."""

    forward: float
    backward_input: float
    weight: float
    message_forward: float
    message_backward: float
    kinds: dict[str, float]

    @property
    def backward(self) -> float:
        return self.backward_input + self.weight


class Chunks:
    """Work of a mean layer and of the last stage's extras, kept by what they depend on."""

    def __init__(
        self, shape: ModelShape, chip: Chip, seq_len: int, *, flash: bool = True, imbalance: float = 1.0
    ) -> None:
        self.shape, self.chip, self.seq_len = shape, chip, seq_len
        self.options: dict[str, Any] = {"flash": flash, "imbalance": imbalance}
        self.kept: dict[tuple[object, ...], tuple[Chunk, Chunk]] = {}

    def of(self, layout: Layout) -> tuple[Chunk, Chunk]:
        """(mean layer, head with MTP modules) on one micro-batch."""
        key = (layout.tp, layout.ep, layout.cp, layout.micro_batch, layout.recompute, layout.precision)
        if key not in self.kept:
            self.kept[key] = self._made(layout)
        return self.kept[key]

    def _made(self, layout: Layout) -> tuple[Chunk, Chunk]:
        shape, chip, seq_len = self.shape, self.chip, self.seq_len
        moe = layer_chunk(shape, chip, layout, seq_len, moe=True, **self.options) if shape.n_routed else None
        dense_count = shape.layers - shape.moe_layers
        dense = layer_chunk(shape, chip, layout, seq_len, moe=False, **self.options) if dense_count else None
        mean = _mixed([(c, n / shape.layers) for c, n in ((moe, shape.moe_layers), (dense, dense_count)) if c and n])
        last = [(head_chunk(shape, chip, layout, seq_len), 1.0 + shape.mtp_layers)]
        if shape.mtp_layers:
            last.append((moe or dense or mean, float(shape.mtp_layers)))
        return mean, _mixed(last)

    def stage(self, layout: Layout) -> Stage:
        """The slowest stage: layers shared out as evenly as they go, the head (and MTP) on the last one."""
        mean, tail = self.of(layout)
        layers = _heaviest(self.shape.layers, layout, (tail.forward + tail.backward) / (mean.forward + mean.backward))
        parts = [(mean, layers)] if layout.pp > 1 else [(mean, float(self.shape.layers)), (tail, 1.0)]
        whole = _mixed(parts)
        return Stage(whole.forward, whole.backward_input, whole.weight, whole.message_forward, whole.message_backward,
                     whole.parts)  # fmt: skip


def _mixed(parts: list[tuple[Chunk, float]]) -> Chunk:
    total = Chunk()
    for chunk, n in parts:
        total.forward += n * chunk.forward
        total.backward_input += n * chunk.backward_input
        total.weight += n * chunk.weight
        total.message_forward += n * chunk.message_forward
        total.message_backward += n * chunk.message_backward
        for kind, seconds in chunk.parts.items():
            total.parts[kind] = total.parts.get(kind, 0.0) + n * seconds
    return total


def _heaviest(layers: int, layout: Layout, tail: float) -> float:
    """Layer equivalents on the slowest stage when the last one also carries `tail` of them."""
    pp = layout.pp
    if pp == 1:
        return layers + tail
    best = float("inf")
    for on_last in range(ceil(layers / pp) + 1):
        others = ceil((layers - on_last) / (pp - 1))
        # DualPipe keeps the first and the last stage on one rank, so their mean counts
        end = (others + on_last + tail) / 2 if layout.bidirectional else on_last + tail
        best = min(best, max(others, end))
    return best


def step_time(
    shape: ModelShape, cluster: Cluster, layout: Layout, seq_len: int, global_batch: float, *, flash: bool = True,
    imbalance: float = 1.0, chunks: Chunks | None = None,
) -> StepTime:  # fmt: skip
    """One optimizer step over `global_batch` sequences of `seq_len` tokens."""
    chip = cluster.chip
    micro = max(1, round(global_batch / (layout.dp * layout.micro_batch)))
    stage = (chunks or Chunks(shape, chip, seq_len, flash=flash, imbalance=imbalance)).stage(layout)
    phases = _two_way(stage, layout, micro) if layout.schedule in ("dualpipe", "dualpipev") and layout.pp > 1 else (
        _one_way(stage, shape, chip, layout, micro, seq_len))  # fmt: skip
    held = stage_params(shape, layout)
    if layout.zero == 3 and layout.dp > 1:
        _gathering(phases, held, chip, layout, micro)
    else:
        _gradient_exchange(phases, stage, held, chip, layout)
    experts, other = held
    share = layout.dp if layout.zero else 1
    phases["optimizer"] = OPTIMIZER_BYTES * (experts + other) / share / (chip.memory_bw * ELEMENTWISE)
    tokens = micro * layout.micro_batch * layout.dp * seq_len
    ratio = _hardware_ratio(shape, seq_len, layout, flash)
    return StepTime(sum(phases.values()), phases, stage.kinds, micro, ratio, tokens, _chunk_seconds(stage))


def _chunk_seconds(stage: Stage) -> dict[str, float]:
    F, B = stage.forward + stage.message_forward, stage.backward + stage.message_backward
    return {"F": F, "B": B, "W": stage.weight, "FB": pair_seconds(stage)}


def _hardware_ratio(shape: ModelShape, seq_len: int, layout: Layout, flash: bool) -> float:
    if layout.recompute == "none":
        return 1.0
    if layout.recompute == "selective":
        core = shape.attention_flops(seq_len)
        return 1.0 + (0.0 if flash else core / shape.flops_per_token(seq_len))
    head = 2 * shape.vocab * shape.d_model
    return 1.0 + (shape.flops_per_token(seq_len, backward=False) - head) / shape.flops_per_token(seq_len)


def _one_way(stage: Stage, shape: ModelShape, chip: Chip, layout: Layout, m: int, seq_len: int) -> dict[str, float]:
    """1F1B and its kin: expert messages are in the open, stage boundaries too."""
    F, B = stage.forward + stage.message_forward, stage.backward + stage.message_backward
    phases = {"forward": m * stage.forward, "backward": m * stage.backward}
    if stage.message_forward:
        phases["expert messages"] = m * (stage.message_forward + stage.message_backward)
    if layout.pp > 1:
        rate = chip.net_bw * NETWORK if layout.chips > chip.node_size else chip.link_bw * LINK
        boundary = layout.micro_batch * seq_len / layout.cp * shape.d_model * 2 / layout.tp / rate
        phases["stage messages"] = 2 * m * boundary * layout.virtual
        phases["bubble"] = bubble(layout.schedule, layout.pp, F, B, stage.weight, v=layout.virtual)
    return phases


def pair_seconds(stage: Stage) -> float:
    """A forward and a backward run together, messages behind arithmetic, which lends them cores."""
    work = (stage.forward + stage.backward) / (1 - COMM_CORES if stage.message_forward else 1.0)
    messages = stage.message_forward + stage.message_backward
    return max(work, messages) + MISS * min(work, messages)


def _two_way(stage: Stage, layout: Layout, m: int) -> dict[str, float]:
    """DualPipe: phases named as in arXiv 2505.09343 Table 4."""
    p = layout.pp if layout.schedule == "dualpipe" else 2 * layout.pp
    m = max(m, p + p % 2)
    calls = dualpipe_calls(p, m)
    pair = pair_seconds(stage)
    F = stage.forward + stage.message_forward
    B = stage.backward + stage.message_backward
    return {
        "1F": calls.forward * F,
        "1B": calls.backward_full * B + calls.backward_input * (B - stage.weight),
        "1W": calls.weight * stage.weight,
        "1F1B": calls.pairs * pair,
        "bubble": bubble("dualpipe", p, F, B, stage.weight, pair),
    }


def ring_rate(chip: Chip, ranks: int, tp: int) -> float:
    """Bytes a second of a ring over `ranks` data-parallel ranks whose neighbours are `tp` chips apart."""
    inside = chip.link_bw * LINK
    if ranks * tp <= chip.node_size:
        return inside
    ports = max(1, chip.node_size // tp)
    return min(inside, chip.net_bw * NETWORK * ports) if chip.node_size > 1 else chip.net_bw * NETWORK


Held = tuple[float, float]  # (expert, other) parameters of a rank


def _shares(held: Held, chip: Chip, layout: Layout) -> list[tuple[float, int, float]]:
    """(parameters, replicas, ring rate) of what is exchanged over data-parallel groups."""
    experts, other = held
    group = layout.dp * layout.cp
    if layout.ep == 1 or not experts:
        return [(experts + other, group, ring_rate(chip, group, layout.tp))]
    replicas = max(1, group * layout.tp // layout.ep)
    return [(other, group, ring_rate(chip, group, layout.tp)),
            (experts, replicas, ring_rate(chip, replicas, max(1, layout.ep)))]  # fmt: skip


def _gradient_exchange(phases: dict[str, float], stage: Stage, held: Held, chip: Chip, layout: Layout) -> None:
    """Reduce-scatter of FP32 gradients behind the last backward, gather of 16-bit weights behind the next forward."""
    reduce = gather = 0.0
    for params, n, rate in _shares(held, chip, layout):
        if n > 1:
            reduce += 4 * params * (n - 1) / n / rate
            gather += (2 if layout.zero else 4) * params * (n - 1) / n / rate
    if reduce:
        hidden = max(0.0, reduce - stage.backward) + max(0.0, gather - stage.forward)
        phases["gradient exchange"] = hidden + MISS * (min(reduce, stage.backward) + min(gather, stage.forward))


def _gathering(phases: dict[str, float], held: Held, chip: Chip, layout: Layout, m: int) -> None:
    """FSDP: weights gathered twice and gradients scattered once a micro-batch, overlapped with the work."""
    work = sum(phases.values())
    messages = sum(m * 6 * p * (n - 1) / n / rate for p, n, rate in _shares(held, chip, layout) if n > 1)
    phases["gathering weights"] = max(work, messages) + MISS * min(work, messages) - work


def check_batch(layout: Layout, global_batch: float) -> None:
    """Raises UserError when a step cannot feed every replica."""
    if global_batch < layout.dp * layout.micro_batch:
        raise UserError(
            f"a batch of {global_batch:g} sequences cannot feed dp={layout.dp} replicas of micro_batch "
            f"{layout.micro_batch}; raise --batch or lower dp."
        )
