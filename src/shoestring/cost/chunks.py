"""What each stage of a pipeline does with one micro-batch: layers shared out, embedding, output head, MTP modules.

The mean layer and the slowest stage rank layouts in a search; the stages one by one, first dense layers and the head
on the last one included, are what `shoestring.cost.timetable` plays. Nothing here is fitted to a training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from shoestring.cost.chips import Chip
from shoestring.cost.layout import Layout
from shoestring.cost.orders import place, stages_of
from shoestring.cost.shape import ModelShape
from shoestring.cost.work import Chunk, embedding_chunk, head_chunk, layer_chunk, projection_chunk


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


class Parts(NamedTuple):
    """Chunks of one micro-batch: a layer without and with experts (None where there is none), both ends, the mean."""

    dense: Chunk | None
    experts: Chunk | None
    embedding: Chunk
    tail: Chunk  # head and MTP modules
    mean: Chunk

    def layers(self, tail: Chunk) -> float:
        """How many mean layers a chunk is worth."""
        return (tail.forward + tail.backward) / (self.mean.forward + self.mean.backward)


class Chunks:
    """Work of the layers and of both ends, kept by what they depend on."""

    def __init__(
        self, shape: ModelShape, chip: Chip, seq_len: int, *, flash: bool = True, imbalance: float = 1.0
    ) -> None:
        self.shape, self.chip, self.seq_len = shape, chip, seq_len
        self.options: dict[str, Any] = {"flash": flash, "imbalance": imbalance}
        self.kept: dict[tuple[object, ...], Parts] = {}

    def of(self, layout: Layout) -> Parts:
        """The parts of one micro-batch."""
        key = (layout.tp, layout.ep, layout.cp, layout.micro_batch, layout.recompute, layout.precision)
        if key not in self.kept:
            self.kept[key] = self._made(layout)
        return self.kept[key]

    def _made(self, layout: Layout) -> Parts:
        shape, chip, seq_len = self.shape, self.chip, self.seq_len
        moe = layer_chunk(shape, chip, layout, seq_len, moe=True, **self.options) if shape.n_routed else None
        dense_count = shape.layers - shape.moe_layers
        dense = layer_chunk(shape, chip, layout, seq_len, moe=False, **self.options) if dense_count else None
        mean = mixed([(c, n / shape.layers) for c, n in ((moe, shape.moe_layers), (dense, dense_count)) if c and n])
        last = [(head_chunk(shape, chip, layout, seq_len), 1.0 + shape.mtp_layers)]
        if shape.mtp_layers:
            more = float(shape.mtp_layers)
            last += [(moe or dense or mean, more), (projection_chunk(shape, chip, layout, seq_len), more)]
        return Parts(dense, moe, embedding_chunk(shape, chip, layout, seq_len), mixed(last), mean)

    def stage(self, layout: Layout) -> Stage:
        """The slowest stage: layers shared out as evenly as they go, the head (and MTP) on the last one."""
        parts = self.of(layout)
        layers = _heaviest(self.shape.layers, layout, parts.layers(parts.tail))
        both = [(parts.mean, layers)] if layout.pp > 1 else [(parts.mean, float(self.shape.layers)), (parts.tail, 1.0)]
        whole = mixed(both)
        return Stage(whole.forward, whole.backward_input, whole.weight, whole.message_forward, whole.message_backward,
                     whole.parts)  # fmt: skip

    def stages(self, layout: Layout) -> list[Chunk]:
        """Every stage in the order of the layers; the first ones are dense where the model says so."""
        parts, shape = self.of(layout), self.shape
        counts = share_out(shape.layers, layout, parts.layers(parts.tail))
        out, done = [], 0
        for i, count in enumerate(counts):
            dense = max(0, min(shape.layers - shape.moe_layers, done + count) - done)
            done += count
            held = [(c, float(n)) for c, n in ((parts.dense, dense), (parts.experts, count - dense)) if c and n]
            held += [(parts.embedding, 1.0)] * (i == 0) + [(parts.tail, 1.0)] * (i == len(counts) - 1)
            out.append(mixed(held))
        return out


def mixed(parts: Sequence[tuple[Chunk, float]]) -> Chunk:
    """So many of each chunk, one after the other."""
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


def share_out(layers: int, layout: Layout, tail: float) -> list[int]:
    """Layers of each stage: fewer on the last one, which also carries `tail` layers' worth of work, and where they do
    not divide, fewer on the first; so that the busiest rank has as little as can be."""
    n = stages_of(layout.schedule, layout.pp, layout.virtual)
    ways = 2 if layout.bidirectional else n // layout.pp
    ranks = [[place(layout.schedule, layout.pp, r, way)[1] for way in range(ways)] for r in range(layout.pp)]

    def split(on_last: int) -> list[int]:
        each, extra = divmod(layers - on_last, n - 1)
        return [each] * (n - 1 - extra) + [each + 1] * extra + [on_last]

    def load(counts: list[int]) -> tuple[float, float]:
        held = [sum(counts[s] + tail * (s == n - 1) for s in mine) for mine in ranks]
        return max(held), sum(x * x for x in held)

    return min((split(k) for k in range(ceil(layers / n) + 1)), key=load)
