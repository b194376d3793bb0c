"""Pipeline schedules: bubbles, activations in flight, and the calls of DualPipe.

Sources: 1F1B and interleaving, arXiv 2104.04473; zero bubble, arXiv 2401.10241; DualPipe and DualPipeV, arXiv
2412.19437 Table 2 and deepseek-ai/DualPipe. F, B, W: time of a forward, a full backward and a weight-gradient
chunk; FB: a forward and a backward run together. All stages are even here; `shoestring.cost.timetable` plays uneven
ones. ZBV's paper gives no formula for unequal times: the one here was read off played schedules and is within a tenth
of them where weight gradients take no longer than input gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.core.errors import UserError


def bubble(schedule: str, p: int, F: float, B: float, W: float, FB: float | None = None, v: int = 1) -> float:
    """Idle time of a step, in the unit of F, B, W."""
    if p <= 1:
        return 0.0
    together = F + B if FB is None else FB
    match schedule:
        case "gpipe" | "1f1b":
            return (p - 1) * (F + B)
        case "interleaved":
            return (p - 1) * (F + B) / max(1, v)
        case "zb1p":
            return max(0.0, (p - 1) * (F + B - 2 * W))
        case "zbv":
            I = B - W  # noqa: E741 (the paper's letter)
            return (p - 1) * max(I / 2, I - W, F - I / 2, F - W)
        case "dualpipe" | "dualpipev":
            return max(0.0, (p / 2 - 1) * (together + B - 3 * W))
    raise UserError(f'unknown pipeline schedule "{schedule}".')


def in_flight(schedule: str, p: int, micro_batches: int, v: int = 1) -> float:
    """Stage-activations held at once by the fullest rank."""
    if p <= 1:
        return 1.0
    held = {
        "gpipe": float(micro_batches), "1f1b": float(p), "zb1p": float(p), "zbv": float(p),
        "interleaved": p * (1 + (p - 1) / (p * max(1, v))), "dualpipe": p + 1.0, "dualpipev": p + 1.0,
    }[schedule]  # fmt: skip
    return min(held, float(micro_batches))


@dataclass(frozen=True, slots=True)
class DualPipeCalls:
    """Mean calls a rank: forward-only, backward-only (full, input-gradient only), pairs, weight-gradient only."""

    forward: float
    backward_full: float
    backward_input: float
    pairs: float
    weight: float


def dualpipe_calls(p: int, m: int) -> DualPipeCalls:
    """Averaged over ranks, for m micro-batches. Each of forward and backward adds up to m with the pairs."""
    half, c = p // 2, m / 2
    ranks = range(half)
    forward = sum(p + (half - 1 - r) for r in ranks) / half
    pairs = sum(2 * (c - p + r + 1) + (half - 1 - r) for r in ranks) / half
    weight = sum((half - r - 1) + (r + 1) for r in ranks) / half + sum(half - 1 - r for r in ranks) / half
    # input-gradient-only backwards leave exactly the weight gradients that are run alone
    return DualPipeCalls(forward, m - pairs - weight, weight, pairs, weight)
