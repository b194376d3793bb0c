"""From a run to its physical time: the step model on the layout that is known, or averaged over what is not.

Where a run does not say whether activations were recomputed, and both ways fit, the time is the geometric mean of
the two and their distance widens the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

from shoestring.core.errors import UserError
from shoestring.cost.rows import Run
from shoestring.cost.search import PRACTICE, Found, search

UNNAMED = ("1f1b",)  # a stated pipeline without a named schedule: whoever interleaves says so
KEEP = 3  # layouts of a search that are played stage by stage


@dataclass(frozen=True, slots=True)
class Physical:
    """Predicted value of the run's quantity by the step model alone, and how far the open choices lie apart."""

    value: float
    spread: float  # standard deviation of the log from open choices
    found: Found
    tokens_per_chip: float
    mfu: float  # causal, against the 16-bit peak


def _cheapest(run: Run, choices: tuple[str, ...]) -> Found | None:
    best: Found | None = None
    for recompute in choices:
        try:
            fixed = run.fixed | {"recompute": recompute}
            found = search(run.shape, run.cluster, run.seq_len, run.global_batch, fixed=fixed, flash=run.flash,
                           schedules=UNNAMED if "pp" in run.fixed else PRACTICE, keep=KEEP)[0]  # fmt: skip
        except UserError:
            continue
        if best is None or found.step.seconds / found.step.tokens < best.step.seconds / best.step.tokens:
            best = found
    return best


def _alternatives(run: Run) -> list[Found]:
    """One layout for every answer to the open question of recomputation."""
    if "recompute" in run.fixed:
        sets: list[tuple[str, ...]] = [(run.fixed["recompute"],)]
    elif not run.flash:  # before selective recomputation and fused attention: whole layers
        sets = [("full",)]
    elif {"tp", "pp"} <= set(run.fixed) and run.fixed.get("zero") != 3:
        sets = [("none", "selective")]
    else:
        sets = [("none", "selective"), ("full",)]
    found = [f for f in (_cheapest(run, s) for s in sets) if f]
    if not found:  # what is usual does not fit: anything that does
        found = [f for f in (_cheapest(run, ("none", "selective", "full")),) if f]
    if not found:
        loose = {k: v for k, v in run.fixed.items() if k == "precision"}
        found = search(run.shape, run.cluster, run.seq_len, run.global_batch, fixed=loose, flash=run.flash)[:1]
    return found


def physical(run: Run) -> Physical:
    """The step model's answer. Raises UserError when no layout fits."""
    found = _alternatives(run)
    seconds = [f.step.seconds / f.step.tokens for f in found]
    per_token = exp(sum(map(log, seconds)) / len(seconds))
    spread = abs(log(seconds[0] / seconds[-1])) / 2 if len(seconds) > 1 else 0.0
    rate = 1 / per_token / run.cluster.n
    flops = run.shape.flops_per_token(run.seq_len)
    ratio = found[0].step.hardware_ratio if run.hardware_flops else 1.0
    value = {
        "gpu_hours": (run.tokens or 0.0) / rate / 3600,
        "step_s": per_token * run.global_batch * run.seq_len,
        "tok_s_chip": rate,
        "tflops_chip": rate * flops * ratio / 1e12,
    }[run.quantity]
    return Physical(value, spread, found[0], rate, rate * flops / run.cluster.chip.bf16)


def slowness(run: Run, value: float) -> float:
    """log(real time / predicted time) of a run whose truth is known."""
    if run.truth is None:
        raise ValueError(f"row {run.id} has no truth")
    away = log(run.truth / value)
    return away if run.quantity in ("gpu_hours", "step_s") else -away
