"""Which chips, and how many: the cheapest or fastest plan under a deadline, a budget and an export rule.

Every chip and size is priced roughly first (few schedules, no search for the last percent); only those that could still
be the best are planned in full. So a search over all chips takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster
from shoestring.cost.models import resolve_shape
from shoestring.cost.plan import Plan, allowed_chips, plan, price_of, slowed
from shoestring.cost.rows import guess_batch
from shoestring.cost.search import Found, search
from shoestring.cost.shape import ModelShape
from shoestring.cost.units import parse_count, show, usd

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PATIENCE_DAYS = 90.0  # a plan without a deadline should still end: an arbitrary limit, printed
BEST_MFU = 0.7  # of the 16-bit peak: no cluster is tried that would need more to keep to the limits
ROUGH = 1.12  # how far a full plan may lie from the rough one; 9% is the most that was seen, 1% is usual
CLOSE = 1.06  # rough plans within this of the best are planned in full
ROUGHLY = ("zbv", "dualpipev", "dualpipe")


@dataclass(frozen=True, slots=True)
class Rough:
    """A cluster and about what the run takes on it."""

    cluster: Cluster
    days: float
    usd: float
    precision: str


def best_plan(
    model: str | ModelShape, tokens: float | str, chips: list[Chip], *, by: str = "cost",
    deadline_hours: float | None = None, budget: float | None = None, rule: tuple[date, str] | None = None,
    sizes: tuple[int, ...] = SIZES, frontier: bool = False, **options: Any,
) -> Plan:  # fmt: skip
    """The plan with the lowest middle dollars (or days) that keeps to the limits. Raises UserError when none does."""
    limit = (deadline_hours or PATIENCE_DAYS * 24) / 24
    shape = resolve_shape(model) if isinstance(model, str) else model
    count = parse_count(tokens, "tokens")
    rough: list[Rough] = []
    for chip in chips or allowed_chips(rule):
        if options.get("precision") == "fp8" and not chip.has_fp8:
            continue
        rough += _for_chip(shape, count, chip, by, limit, budget, sizes, options)
    if not rough:
        raise UserError(f"the model fits on no allowed cluster of up to {max(sizes):,} chips that could end in "
                        f"{show(limit)} days; relax --rule or --deadline, or give --on.")  # fmt: skip

    def exact(p: Rough) -> Plan:
        return plan(model, count, p.cluster, rule=rule, **options | {"precision": p.precision})

    rough.sort(key=lambda p: _key(p, by))
    found = _first(rough, exact, by, limit, budget)
    if found is None:
        raise UserError(_why_not(rough, exact, limit))
    return plan(model, count, found.cluster, rule=rule, frontier=frontier, **options)


def _key(p: Rough, by: str) -> tuple[float, float]:
    return (p.usd, p.days) if by == "cost" else (p.days, p.usd)


def _first(
    rough: list[Rough], exact: Callable[[Rough], Plan], by: str, limit: float, budget: float | None
) -> Rough | None:
    """The best within the limits when planned in full; `rough` is in order, and ends where none can be better."""
    best: Rough | None = None
    for p in rough:
        if best and _key(p, by)[0] > CLOSE * _key(best, by)[0]:
            break
        if p.days > ROUGH * limit or (budget is not None and p.usd > ROUGH * budget):
            continue
        answer = exact(p)
        now = Rough(p.cluster, answer.days.mid, answer.usd.mid, p.precision)
        kept = now.days <= limit and (budget is None or now.usd <= budget)
        if kept and (best is None or _key(now, by) < _key(best, by)):
            best = now
    return best


def _why_not(rough: list[Rough], exact: Callable[[Rough], Plan], limit: float) -> str:
    """Which limit cannot be kept, and what comes nearest."""
    in_time = [p for p in rough if p.days <= limit]
    if not in_time:
        near = exact(min(rough, key=lambda p: p.days))
        return (f"no plan ends in {show(limit)} days: the fastest takes {show(near.days.mid)} on {near.cluster.label}; "
                "give a longer --deadline.")  # fmt: skip
    near = exact(min(in_time, key=lambda p: p.usd))
    return (f"no plan keeps to the budget: the cheapest that ends in {show(limit)} days costs {usd(near.usd.mid)} on "
            f"{near.cluster.label}; give a larger --budget or a longer --deadline.")  # fmt: skip


def _for_chip(
    shape: ModelShape, tokens: float, chip: Chip, by: str, limit: float, budget: float | None, sizes: Iterable[int],
    options: dict[str, Any],
) -> list[Rough]:  # fmt: skip
    """By cost from the smallest cluster that could end in time to the first that ends and is dearer than a smaller one;
    by time from the largest to the first that is paid for."""
    seq_len = int(options.get("seq_len") or 4096)
    hours = shape.flops_per_token(seq_len) * tokens / (BEST_MFU * chip.bf16) / 3600  # at the very least
    rent = price_of(chip, options.get("usd_per_hour"))[0].mid
    found = []
    for n in sorted(sizes, reverse=by == "time"):
        if hours / n / 24 > limit:
            continue
        answer = _rough(shape, tokens, Cluster(chip, n), seq_len, rent, options)
        if answer is None:
            continue
        found.append(answer)
        if by == "time" and (budget is None or answer.usd * ROUGH <= budget):
            break
        cheapest = min((p.usd for p in found if p.days * ROUGH <= limit), default=answer.usd)
        if by == "cost" and answer.usd > ROUGH * cheapest:
            break
    return found


def _rough(
    shape: ModelShape, tokens: float, cluster: Cluster, seq_len: int, rent: float, options: dict[str, Any]
) -> Rough | None:
    batch = options.get("global_batch") or guess_batch(shape, seq_len, cluster.n, tokens)
    layouts = list(_few_layouts(shape, cluster, seq_len, batch, options.get("precision")))
    if not layouts:
        return None
    best = min(layouts, key=lambda f: f.step.seconds / f.step.tokens)
    rate = best.step.tokens_per_chip(cluster.n)
    hours = slowed(shape, cluster, best, tokens / rate / 3600, rate, seq_len, 0).mid
    return Rough(cluster, hours / cluster.n / 24, hours * rent, best.layout.precision)


def _few_layouts(
    shape: ModelShape, cluster: Cluster, seq_len: int, batch: float, precision: str | None
) -> Iterator[Found]:
    """The best of few schedules for each precision and way of recomputing, where one fits."""
    for kind in (precision,) if precision else ("fp8",) if cluster.chip.has_fp8 else ("bf16",):
        for recompute in ("selective", "full"):
            fixed = {"precision": kind, "recompute": recompute}
            try:
                yield search(shape, cluster, seq_len, batch, fixed=fixed, schedules=ROUGHLY, keep=1)[0]
            except UserError:
                continue
            break
