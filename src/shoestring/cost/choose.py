"""Which chips, and how many: the cheapest or fastest plan under a deadline, a budget and an export rule."""

from __future__ import annotations

from datetime import date
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster
from shoestring.cost.models import resolve_shape
from shoestring.cost.plan import Plan, allowed_chips, plan
from shoestring.cost.shape import ModelShape
from shoestring.cost.units import parse_count, show, usd

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PATIENCE_DAYS = 90.0  # a plan without a deadline should still end: an arbitrary limit, printed


def best_plan(
    model: str | ModelShape, tokens: float | str, chips: list[Chip], *, by: str = "cost",
    deadline_hours: float | None = None, budget: float | None = None,
    rule: tuple[date, str] | None = None, sizes: tuple[int, ...] = SIZES, **options: Any,
) -> Plan:  # fmt: skip
    """The plan with the lowest middle dollars (or days) that keeps to the limits. Raises UserError when none does."""
    limit = (deadline_hours or PATIENCE_DAYS * 24) / 24
    plans = []
    for chip in chips or allowed_chips(rule):
        plans += _for_chip(model, tokens, chip, limit, sizes, rule, options)
    if not plans:
        raise UserError("the model fits on no allowed cluster of up to 16,384 chips; relax --rule or give --on.")
    kept = [p for p in plans if p.days.mid <= limit and (budget is None or p.usd.mid <= budget)]
    if not kept:
        fastest, cheapest = min(plans, key=lambda p: p.days.mid), min(plans, key=lambda p: p.usd.mid)
        raise UserError(
            f"no plan keeps to the limits: the fastest takes {show(fastest.days.mid)} days on {fastest.cluster.label}, "
            f"the cheapest {usd(cheapest.usd.mid)} on {cheapest.cluster.label}."
        )
    return min(kept, key=lambda p: (p.usd.mid, p.days.mid) if by == "cost" else (p.days.mid, p.usd.mid))


def _for_chip(
    model: str | ModelShape, tokens: float | str, chip: Chip, limit: float, sizes: tuple[int, ...],
    rule: tuple[date, str] | None, options: dict[str, Any],
) -> list[Plan]:  # fmt: skip
    """Plans on this chip from the smallest cluster that holds the model to the first that ends in time."""
    shape = resolve_shape(model) if isinstance(model, str) else model
    work = shape.flops_per_token(int(options.get("seq_len", 4096))) * parse_count(tokens, "tokens")
    found = []
    for n in sizes:
        if work / (n * 0.7 * chip.bf16) / 86400 > limit:
            continue  # not even at 70% of the peak
        try:
            answer = plan(model, tokens, Cluster(chip, n), rule=rule, **options)
        except UserError:
            continue
        found.append(answer)
        if answer.days.mid <= limit / 2:
            break
    return found
