"""Search over layouts: degrees, schedule, micro-batch, recomputation, under memory and divisibility.

Every layout of the grid is priced by the same step model; memory is checked first, because it is cheaper and rules
out most of them. `fixed` pins what is already known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Cluster
from shoestring.cost.layout import Layout, even_chunks
from shoestring.cost.memory import Memory, check_fits
from shoestring.cost.orders import stages_of
from shoestring.cost.shape import ModelShape
from shoestring.cost.step import Chunks, StepTime, step_time

PRACTICE = ("1f1b", "interleaved")  # what published runs use, unless they say otherwise
LONG = 32768  # tokens from which on one sequence is also split over chips: an estimate of what is usual
EVERY = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")


@dataclass(frozen=True, slots=True)
class Found:
    """A layout that fits, its step and its memory by term."""

    layout: Layout
    step: StepTime
    memory: dict[str, float]


def _degrees(limit: int, candidates: Sequence[int]) -> list[int]:
    return [d for d in candidates if d <= limit]


def candidates(
    shape: ModelShape, cluster: Cluster, seq_len: int, global_batch: float, fixed: Mapping[str, Any],
    schedules: Sequence[str],
) -> Iterator[Layout]:  # fmt: skip
    """Layouts whose degrees divide chips, heads, layers, experts and batch."""

    def options(key: str, values: Sequence[Any]) -> Sequence[Any]:
        return (fixed[key],) if key in fixed else values

    node, n = cluster.chip.node_size, cluster.n
    tps = options("tp", [t for t in _degrees(min(node, 16), (1, 2, 4, 8, 16)) if shape.heads % t == 0])
    pps = options("pp", _pipeline_degrees(shape, n))
    for tp, pp, cp in product(tps, pps, options("cp", (1, 4, 16) if seq_len >= LONG else (1,))):
        if n % (tp * pp * cp):
            continue
        dp = fixed.get("dp") or n // (tp * pp * cp)
        if dp * tp * pp * cp != n:
            continue
        plans = options("schedule", schedules if pp > 1 else ("1f1b",))
        for ep, schedule, zero, recompute in product(
            options("ep", _expert_degrees(shape, dp * tp * cp)), plans,
            options("zero", (1, 3) if pp == 1 else (1,)), options("recompute", ("none", "selective", "full")),
        ):  # fmt: skip
            virtual = fixed.get("virtual", even_chunks(shape.layers, pp)) if schedule == "interleaved" else 1
            if (schedule == "dualpipe" and pp % 2) or shape.layers < stages_of(schedule, pp, virtual):
                continue
            for mb in options("micro_batch", (1, 2, 4, 8, 16)):
                if dp * mb <= global_batch and _divides(global_batch, dp * mb):
                    if schedule == "interleaved" and "schedule" not in fixed and round(global_batch / dp / mb) % pp:
                        continue  # it goes in groups of pp micro-batches
                    yield Layout(
                        dp, tp, pp, ep, cp, zero, schedule, virtual, mb, recompute, fixed.get("precision", "bf16")
                    )


def _divides(batch: float, replicas: int) -> bool:
    """Whether whole micro-batches come within 5% of the batch."""
    return abs(round(batch / replicas) * replicas - batch) <= 0.05 * batch


def _pipeline_degrees(shape: ModelShape, n: int) -> list[int]:
    usual = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 35, 48, 64)
    return [p for p in usual if p <= min(shape.layers, n) and -(-shape.layers // p) * p <= 1.25 * shape.layers]


def _expert_degrees(shape: ModelShape, group: int) -> list[int]:
    if not shape.n_routed:
        return [1]
    found = [e for e in (1, 2, 4, 8, 16, 32, 64, 128, 256) if e <= group and shape.n_routed % e == 0 and group % e == 0]
    return found or [1]


def search(
    shape: ModelShape, cluster: Cluster, seq_len: int, global_batch: float, *, fixed: Mapping[str, Any] | None = None,
    schedules: Sequence[str] = EVERY, flash: bool = True, keep: int = 10,
) -> list[Found]:  # fmt: skip
    """The `keep` layouts that fit and are fastest by formula, then played stage by stage, fastest first.

    Raises UserError when none fits.
    """
    fixed = fixed or {}
    found: list[Found] = []
    tightest: tuple[float, Layout, dict[str, float]] | None = None
    chunks, needs = Chunks(shape, cluster.chip, seq_len, flash=flash), Memory(shape, seq_len, flash=flash)
    room = cluster.chip.memory_bytes
    for layout in candidates(shape, cluster, seq_len, global_batch, fixed, schedules):
        if tightest and sum(needs.fixed(layout)) > max(room, tightest[0]):
            continue
        micro = max(1, round(global_batch / (layout.dp * layout.micro_batch)))
        memory = needs.per_rank(layout, micro)
        total = sum(memory.values())
        if tightest is None or total < tightest[0]:
            tightest = (total, layout, memory)
        if total > room:
            continue
        step = step_time(shape, cluster, layout, seq_len, global_batch, flash=flash, chunks=chunks, played=False)
        found.append(Found(layout, step, memory))
    if not found:
        if tightest is None:
            raise UserError(
                f"no layout divides {cluster.label} and a batch of {global_batch:g} with {_said(fixed)}; "
                "change a degree, the batch or the number of chips."
            )
        check_fits(tightest[2], cluster.chip, f"even the smallest layout ({tightest[1].short()}) on {cluster.label}")
    found.sort(key=_seconds_a_token)

    def played(f: Found) -> Found:
        step = step_time(shape, cluster, f.layout, seq_len, global_batch, flash=flash, chunks=chunks)
        return Found(f.layout, step, f.memory)

    return sorted(map(played, found[:keep]), key=_seconds_a_token)


def _said(fixed: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in fixed.items()) or "the usual degrees"


def _seconds_a_token(found: Found) -> float:
    return found.step.seconds / found.step.tokens
