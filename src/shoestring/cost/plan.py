"""A plan: hours, days, dollars and memory of training a shape on chips, each with an 80% interval.

    plan("deepseek-v3", tokens=14.8e12, on="2048xH800")

What is not given (batch, precision, layout, rent) is chosen and listed under `guesses`. The middle value is the
step model slowed by what published runs lost beside it (`shoestring.cost.residual`); `steady` is without that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from math import log, sqrt
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster, all_chips, parse_cluster
from shoestring.cost.export import export_status
from shoestring.cost.layout import Layout, check_layout, complete, even_chunks, parse_layout
from shoestring.cost.memory import check_fits, memory_per_rank
from shoestring.cost.models import resolve_shape
from shoestring.cost.residual import Interval, Residual, features, interval
from shoestring.cost.rows import guess_batch
from shoestring.cost.search import EVERY, Found, search
from shoestring.cost.shape import ModelShape
from shoestring.cost.step import StepTime, check_batch, step_time
from shoestring.cost.tables import shipped_json
from shoestring.cost.units import parse_count, show

MOST_TOKENS = 1e18  # a thousand times what was ever written: beyond it a unit was mistyped
USD_PER_PFLOP_HOUR = 2.6  # a rent where none is known: the middle H100 rate over its 0.989 PFLOP/s; a guess


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. `to_dict()` is the JSON document of the command line."""

    model: str
    shape: ModelShape
    cluster: Cluster
    tokens: float
    seq_len: int
    global_batch: float
    layout: Layout
    step: StepTime
    memory: dict[str, float]
    gpu_hours: Interval
    days: Interval
    usd: Interval
    usd_per_hour: Interval
    guesses: tuple[str, ...]
    frontier: tuple[dict[str, Any], ...] = ()

    @property
    def steady_hours(self) -> float:
        return self.tokens / self.step.tokens * self.step.seconds * self.cluster.n / 3600

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.tokens / self.gpu_hours.mid / 3600

    def mfu(self, *, causal: bool = True) -> float:
        """Effective utilisation of the 16-bit peak over the whole run."""
        flops = self.shape.flops_per_token(self.seq_len, causal=causal)
        return flops * self.tokens_per_second_per_chip / self.cluster.chip.bf16

    def to_dict(self) -> dict[str, Any]:
        """Numbers, intervals and choices, JSON values only."""
        count = self.shape.params()
        return {
            "model": self.model, "tokens": self.tokens, "on": self.cluster.label, "seq_len": self.seq_len,
            "global_batch": self.global_batch, "gpu_hours": self.gpu_hours.to_dict(), "days": self.days.to_dict(),
            "usd": self.usd.to_dict(), "usd_per_hour": self.usd_per_hour.to_dict(),
            "tokens_per_second_per_chip": self.tokens_per_second_per_chip, "mfu_causal": self.mfu(),
            "mfu_noncausal": self.mfu(causal=False), "memory_gb_per_rank": sum(self.memory.values()) / 1e9,
            "memory_gb": {k: v / 1e9 for k, v in self.memory.items()},
            "params": count.total, "active_params": count.active,
            "flops": self.shape.flops_per_token(self.seq_len) * self.tokens,
            "layout": self.layout.to_dict(), "layout_text": self.layout.short(),
            "step_s": self.step.seconds, "step_phases_s": self.step.phases, "micro_batches": self.step.micro_batches,
            "steady_gpu_hours": self.steady_hours, "guesses": list(self.guesses), "frontier": list(self.frontier),
        }  # fmt: skip


@lru_cache(maxsize=1)
def fitted_residual() -> Residual:
    """The constants fitted to all shipped runs but DeepSeek-V3, as stored; a test fits them again and compares."""
    stored = shipped_json("residual")
    return Residual(tuple(stored["mean"]), tuple(map(tuple, stored["covariance"])), stored["rows"])


def price_of(chip: Chip, usd_per_hour: float | None) -> tuple[Interval, list[str]]:
    """Dollars a chip-hour, low to high, and what was guessed."""
    if usd_per_hour is not None:
        return Interval(usd_per_hour, usd_per_hour, usd_per_hour), []
    if chip.rent_mid is None:
        mid = USD_PER_PFLOP_HOUR * chip.bf16 / 1e15
        return Interval(mid / 2, mid, mid * 2), [f"rent of {chip.name}: none published, taken from its peak rate"]
    return Interval(chip.rent_low or chip.rent_mid, chip.rent_mid, chip.rent_high or chip.rent_mid), []


def plan(
    model: str | ModelShape,
    tokens: float | str,
    on: str | Cluster,
    *,
    seq_len: int = 4096,
    precision: str | None = None,
    layout: str | Mapping[str, Any] | None = None,
    global_batch: float | None = None,
    usd_per_hour: float | None = None,
    rule: tuple[date, str] | None = None,
    frontier: bool = False,
    calibration: Any = None,
) -> Plan:
    """Plan one training run. Raises UserError for what cannot be: no memory, no layout, a chip the rule forbids."""
    shape = resolve_shape(model) if isinstance(model, str) else model
    shape.check_parts()
    name = model if isinstance(model, str) else "model"
    tokens = parse_count(tokens, "tokens", most=MOST_TOKENS)
    cluster = parse_cluster(on) if isinstance(on, str) else on
    if rule:
        check_rule(cluster.chip.name, *rule)
    if not 1 <= seq_len <= 100_000_000:
        raise UserError(f"sequence length is {seq_len}; it must be from 1 to a hundred million.")
    if tokens < seq_len:
        raise UserError(
            f"{show(tokens)} tokens are less than one sequence of {seq_len}; write them like 500B or 14.8T."
        )
    guesses: list[str] = [*cluster.chip.guesses, *([shape.note] if shape.note else [])]
    if global_batch is None:
        global_batch = guess_batch(shape, seq_len, cluster.n, tokens)
        guesses.append(f"global batch: {global_batch:.0f} sequences from the compute of the run (arXiv 2401.02954)")
    fixed = dict(parse_layout(layout) if isinstance(layout, str) else layout or {})
    if precision:
        fixed["precision"] = precision
    if fixed.get("precision") == "fp8" and not cluster.chip.has_fp8:
        raise UserError(f"{cluster.chip.name} has no FP8 products; use --precision bf16, or another chip.")
    if calibration is not None:
        best = calibration.found(shape, seq_len, global_batch, cluster.n)
        check_fits(best.memory, cluster.chip, f"{name} on {cluster.chip.name}")
    else:
        best = choose(shape, cluster, seq_len, global_batch, fixed, guesses)
    return _answer(name, shape, cluster, tokens, seq_len, global_batch, best, guesses, usd_per_hour,
                   with_frontier=frontier, calibration=calibration)  # fmt: skip


def _answer(
    name: str, shape: ModelShape, cluster: Cluster, tokens: float, seq_len: int, batch: float, best: Found,
    guesses: list[str], usd_per_hour: float | None, *, with_frontier: bool, calibration: Any,
) -> Plan:  # fmt: skip
    rate = best.step.tokens_per_chip(cluster.n)
    steady = tokens / rate / 3600
    hours = slowed(shape, cluster, best, steady, rate, seq_len, len(guesses), calibration)
    rent, more = price_of(cluster.chip, usd_per_hour)
    guesses += more
    usd = _product(hours, rent)
    line = (
        tuple(_frontier(shape, cluster, tokens, seq_len, batch, best, rent, hours.mid / steady))
        if with_frontier
        else ()
    )
    return Plan(name, shape, cluster, tokens, seq_len, batch, best.layout, best.step, best.memory, hours,
                hours.scaled(1 / cluster.n / 24), usd, rent, tuple(guesses), line)  # fmt: skip


def slowed(
    shape: ModelShape, cluster: Cluster, found: Found, steady: float, rate: float, seq_len: int, guesses: int,
    calibration: Any = None,
) -> Interval:  # fmt: skip
    """Steady hours with what real runs lose, and its interval; narrower on chips that were measured."""
    spread = sqrt(guesses) * 0.05
    if calibration is not None and cluster.chip.calibrated:
        return interval(steady, log(calibration.step_ratio), sqrt(calibration.spread**2 + spread**2))
    mfu = rate * shape.flops_per_token(seq_len) / cluster.chip.bf16
    slow_experts = bool(shape.n_routed) and found.layout.precision != "fp8"
    centre, sd = fitted_residual().at(features(False, True, slow_experts, False, mfu), steady=False, spread=spread)
    return interval(steady, centre, sd)


def _product(hours: Interval, rent: Interval) -> Interval:
    """Product of two intervals whose logs are independent."""
    mid = hours.mid * rent.mid

    def end(side: str, sign: int) -> float:
        a, b = (abs(log(getattr(x, side) / x.mid)) for x in (hours, rent))
        return mid * 2.718281828459045 ** (sign * sqrt(a * a + b * b))

    return Interval(end("low", -1), mid, end("high", 1))


def choose(
    shape: ModelShape, cluster: Cluster, seq_len: int, batch: float, fixed: dict[str, Any], guesses: list[str]
) -> Found:  # fmt: skip
    """The fastest layout that fits; what `fixed` leaves open is searched."""
    if fixed.get("schedule") == "interleaved" and "pp" in fixed:
        fixed.setdefault("virtual", even_chunks(shape.layers, fixed["pp"]))
    if {"tp", "pp", "dp"} <= set(fixed):
        whole = complete(fixed, cluster.n)
        check_layout(shape, whole, cluster.n)
        check_batch(whole, batch)
    if {"pp", "micro_batch", "recompute", "precision", "ep", "tp", "schedule"} <= set(fixed):
        return one_layout(shape, cluster, seq_len, batch, complete(fixed, cluster.n))
    if not fixed.keys() - {"precision"}:
        guesses.append("layout: the fastest that fits")
    options = [fixed["precision"]] if "precision" in fixed else ["bf16", "fp8"] if cluster.chip.has_fp8 else ["bf16"]
    if "precision" not in fixed and cluster.chip.has_fp8:
        guesses.append("precision: FP8 products where they are faster")
    found, failure = [], None
    for precision in options:
        try:
            found += search(shape, cluster, seq_len, batch, fixed=fixed | {"precision": precision}, schedules=EVERY)
        except UserError as error:
            failure = error
    if not found:
        raise failure or UserError("no layout fits.")
    return min(found, key=lambda f: f.step.seconds / f.step.tokens)


def one_layout(shape: ModelShape, cluster: Cluster, seq_len: int, batch: float, layout: Layout) -> Found:
    """A layout given in full: checked, then priced. Raises UserError naming the largest memory term."""
    check_layout(shape, layout, cluster.n)
    check_batch(layout, batch)
    micro = max(1, round(batch / (layout.dp * layout.micro_batch)))
    memory = memory_per_rank(shape, layout, seq_len, micro)
    check_fits(memory, cluster.chip, layout.short())
    return Found(layout, step_time(shape, cluster, layout, seq_len, batch), memory)


def check_rule(chip: str, day: date, destination: str) -> None:
    """Raises UserError when the chip needed a licence to go there on that day."""
    verdict = export_status(chip, day, destination)
    if not verdict.free and verdict.status != "not-us":
        raise UserError(f"the rule forbids it: {verdict.sentence} Choose a free chip with --on any.")


def _frontier(
    shape: ModelShape, cluster: Cluster, tokens: float, seq_len: int, batch: float, best: Found, rent: Interval,
    slow: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Dollars against days over cluster sizes, with the best layout's schedule and precision kept."""
    keep = ("schedule", "precision", "zero") if best.layout.pp > 1 else ("precision",)
    kept = {k: getattr(best.layout, k) for k in keep}
    points: list[dict[str, Any]] = []
    for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4):
        n = round(cluster.n * factor)
        if n < 1:
            continue
        try:
            found = search(shape, Cluster(cluster.chip, n), seq_len, batch, fixed=kept, schedules=EVERY)[0]
        except UserError:
            continue
        hours = tokens / found.step.tokens * found.step.seconds * n / 3600 * slow
        points.append({"chips": n, "chip": cluster.chip.name, "days": hours / n / 24, "gpu_hours": hours,
                       "usd": hours * rent.mid, "layout": found.layout.short()})  # fmt: skip
    return [p for p in points if not any(q["days"] <= p["days"] and q["usd"] < p["usd"] for q in points)]


def allowed_chips(rule: tuple[date, str] | None) -> list[Chip]:
    """Chips that can be planned on and rented; under a rule, only those free to go there on that day."""
    chips = [c for c in all_chips().values() if c.family != "tpu" or rule is None]
    return [c for c in chips if c.datacenter and (rule is None or export_status(c.name, *rule).free)]
