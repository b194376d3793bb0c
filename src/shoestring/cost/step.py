"""Time of one optimizer step: chunks of work put into a pipeline schedule, with what overlaps and what does not.

Sources: arXiv 2104.04473 (1F1B, interleaving), 2401.10241 (zero bubble), 2412.19437 (DualPipe), 1910.02054 and
2304.11277 (ZeRO, FSDP). Rings between nodes use every network port of a node, so a data-parallel group with g
ranks in a node moves at g times one port's rate. Nothing here is fitted to a training run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster
from shoestring.cost.chunks import Chunks, Stage
from shoestring.cost.layout import Layout
from shoestring.cost.memory import stage_params
from shoestring.cost.orders import fewest
from shoestring.cost.pipeline import bubble, dualpipe_calls
from shoestring.cost.shape import ModelShape
from shoestring.cost.timetable import Span, StageSeconds, span
from shoestring.cost.work import ELEMENTWISE, LINK, MISS, NETWORK, Chunk

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


def step_time(
    shape: ModelShape, cluster: Cluster, layout: Layout, seq_len: int, global_batch: float, *, flash: bool = True,
    imbalance: float = 1.0, chunks: Chunks | None = None, played: bool = True,
) -> StepTime:  # fmt: skip
    """One optimizer step over `global_batch` sequences of `seq_len` tokens.

    A pipeline is played stage by stage; with `played` off it is taken as even stages as slow as the slowest, and its
    bubble by formula, which is an upper bound and enough to rank layouts.
    """
    chip = cluster.chip
    micro = max(1, round(global_batch / (layout.dp * layout.micro_batch)))
    chunks = chunks or Chunks(shape, chip, seq_len, flash=flash, imbalance=imbalance)
    stage = chunks.stage(layout)
    if layout.pp == 1:
        phases = _alone(stage, micro)
    else:
        phases = _played(chunks.stages(layout), layout, micro) if played else _by_formula(stage, layout, micro)
        if not layout.schedule.startswith("dual"):
            phases["stage messages"] = _stage_messages(shape, chip, layout, micro, seq_len)
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
    return {"F": F, "B": B, "W": stage.weight, "FB": together(stage, stage)}


def _hardware_ratio(shape: ModelShape, seq_len: int, layout: Layout, flash: bool) -> float:
    if layout.recompute == "none":
        return 1.0
    if layout.recompute == "selective":
        core = shape.attention_flops(seq_len)
        return 1.0 + (0.0 if flash else core / shape.flops_per_token(seq_len))
    head = 2 * shape.vocab * shape.d_model
    return 1.0 + (shape.flops_per_token(seq_len, backward=False) - head) / shape.flops_per_token(seq_len)


def _alone(stage: Stage, m: int) -> dict[str, float]:
    """No pipeline: expert messages are in the open."""
    phases = {"forward": m * stage.forward, "backward": m * stage.backward}
    if stage.message_forward:
        phases["expert messages"] = m * (stage.message_forward + stage.message_backward)
    return phases


def _stage_messages(shape: ModelShape, chip: Chip, layout: Layout, m: int, seq_len: int) -> float:
    """Seconds at stage boundaries; DualPipe hides them behind its pairs."""
    rate = chip.net_bw * NETWORK if layout.chips > chip.node_size else chip.link_bw * LINK
    boundary = layout.micro_batch * seq_len / layout.cp * shape.d_model * 2 / layout.tp / rate
    return 2 * m * boundary * layout.virtual


def feedable(layout: Layout, m: int) -> int:
    """Micro-batches that the schedule can run with, at least m: whole groups when interleaved, enough to fill it."""
    if layout.schedule == "interleaved":
        return -(-m // layout.pp) * layout.pp
    if layout.schedule in ("zbv", "dualpipe", "dualpipev"):
        return max(m, fewest(layout.schedule, layout.pp))
    return m


def _played(stages: list[Chunk], layout: Layout, m: int) -> dict[str, float]:
    """Mean over ranks; waiting for slower stages is in the bubble."""
    p, two_way = layout.pp, layout.schedule.startswith("dual")
    m = feedable(layout, m)
    seconds = [StageSeconds(s.forward + s.message_forward, s.backward + s.message_backward, s.weight) for s in stages]

    def pair(forward: int, backward: int) -> float:
        return together(stages[forward], stages[backward])

    whole: Span = span(layout.schedule, p, m, seconds, pair if two_way else None, layout.virtual)
    busy = whole.busy
    if two_way:
        return {"1F": busy["F"], "1B": busy.get("B", 0.0) + busy.get("I", 0.0), "1W": busy.get("W", 0.0),
                "1F1B": busy["FB"], "bubble": whole.idle}  # fmt: skip
    out, back = (m * sum(getattr(s, f"message_{way}") for s in stages) / p for way in ("forward", "backward"))
    phases = {"forward": busy["F"] - out, "backward": sum(busy.get(k, 0.0) for k in "BIW") - back}
    if out:
        phases["expert messages"] = out + back
    return phases | {"bubble": whole.idle}


def _by_formula(stage: Stage, layout: Layout, m: int) -> dict[str, float]:
    """Even stages, each as slow as the slowest."""
    m = feedable(layout, m)
    if layout.schedule.startswith("dual"):
        return _two_way(stage, layout, m)
    F, B = stage.forward + stage.message_forward, stage.backward + stage.message_backward
    return _alone(stage, m) | {"bubble": bubble(layout.schedule, layout.pp, F, B, stage.weight, v=layout.virtual)}


def together(forward: Stage | Chunk, backward: Stage | Chunk) -> float:
    """A forward and a backward run together, messages behind arithmetic, which lends them cores."""
    lent = COMM_CORES if forward.message_forward or backward.message_backward else 0.0
    work = (forward.forward + backward.backward) / (1 - lent)
    messages = forward.message_forward + backward.message_backward
    return max(work, messages) + MISS * min(work, messages)


def _two_way(stage: Stage, layout: Layout, m: int) -> dict[str, float]:
    """DualPipe: phases named as in arXiv 2505.09343 Table 4. DualPipeV is twice the stages, each half as long."""
    folded = layout.schedule == "dualpipev"
    p, m, part = (2 * layout.pp, 2 * m, 0.5) if folded else (layout.pp, m, 1.0)
    calls = dualpipe_calls(p, m)
    pair = part * together(stage, stage)
    F = part * (stage.forward + stage.message_forward)
    B = part * (stage.backward + stage.message_backward)
    W = part * stage.weight
    return {
        "1F": calls.forward * F,
        "1B": calls.backward_full * B + calls.backward_input * (B - W),
        "1W": calls.weight * W,
        "1F1B": calls.pairs * pair,
        "bubble": bubble("dualpipe", p, F, B, W, pair),
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
