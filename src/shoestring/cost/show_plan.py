"""A plan as the command line asks for it, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.bill import checkpoint_every, kilowatts, ledger, total, views
from shoestring.cost.chips import find_chip
from shoestring.cost.choose import best_plan
from shoestring.cost.export import parse_rule
from shoestring.cost.layout import PRECISIONS
from shoestring.cost.plan import Plan, check_rule, plan
from shoestring.cost.residual import Interval
from shoestring.cost.units import parse_count, parse_hours, parse_usd, show, usd

MOST_RENT = 10_000.0  # dollars a chip-hour: beyond it a unit was mistyped
SAVE_SECONDS = 60.0  # to write a checkpoint: a guess


def make(
    model: str, tokens: str, on: str, *, precision: str | None, layout: str, by: str, budget: str | None,
    deadline: str | None, rule: str | None, calibration: Path | None, **options: Any,
) -> Plan:  # fmt: skip
    """The plan for the words of the command line. Raises UserError for any that cannot be."""
    if by not in ("cost", "time"):
        raise UserError(f'--by is "{by}"; it is cost or time.')
    if precision not in (None, *PRECISIONS):
        raise UserError(f'--precision is "{precision}"; it is one of {", ".join(PRECISIONS)}.')
    if options.get("usd_per_hour") is not None:
        parse_count(options["usd_per_hour"], "usd per hour", "2.5", MOST_RENT)
    if options.get("global_batch") is not None:
        parse_count(options["global_batch"], "batch", "15360", 1e9)
    where = parse_rule(rule) if rule else None
    options |= {"precision": precision}
    if calibration is not None:
        from shoestring.cost.calibrate import Calibration

        measured = Calibration.load(calibration)
        devices = 1 if on == "any" else parse_count(on, "--on, with a calibration a number of devices,")
        if devices != int(devices):
            raise UserError(f"--on is {on}; with a calibration it is a whole number of this machine's devices.")
        if layout or where:
            raise UserError("a measured machine is planned as it is: leave --layout and --rule out with --calibration.")
        answer = plan(model, tokens, measured.cluster(int(devices)), calibration=measured, **options)
        _within(answer, deadline, budget)
        return answer
    if on.strip()[:1] in "+-.0123456789":
        answer = plan(model, tokens, on, layout=layout, rule=where, frontier=True, **options)
        _within(answer, deadline, budget)
        return answer
    if layout:
        raise UserError("a layout needs a number of chips; write --on like 2048xH800.")
    chips = [] if on == "any" else [find_chip(on)]
    if where:
        for chip in chips:
            check_rule(chip.name, *where)
    return best_plan(
        model, tokens, chips, by=by, rule=where, frontier=True, budget=parse_usd(budget, "budget") if budget else None,
        deadline_hours=parse_hours(deadline, "deadline") if deadline else None, **options,
    )  # fmt: skip


def _within(answer: Plan, deadline: str | None, budget: str | None) -> None:
    if deadline and answer.days.mid * 24 > parse_hours(deadline, "deadline"):
        raise UserError(f"it takes {show(answer.days.mid)} days, past the deadline of {deadline}; give more chips.")
    if budget and answer.usd.mid > parse_usd(budget, "budget"):
        raise UserError(f"it costs {usd(answer.usd.mid)}, above the budget of {budget}.")


def span(value: Interval, money: bool = False) -> str:
    """'2.66M (2.1M to 3.4M)'."""
    write = usd if money else show
    return f"{write(value.mid)} ({write(value.low)} to {write(value.high)})"


def text(answer: Plan) -> str:
    """The plan as a table of lines; intervals are 80%."""
    count = answer.shape.params()
    layout, step = answer.layout, answer.step
    lines = [
        ("model", f"{answer.model}: {show(count.total)} parameters, {show(count.active)} active"),
        ("tokens", f"{show(answer.tokens)} in sequences of {answer.seq_len}, {answer.global_batch:g} sequences a step"),
        ("chips", answer.cluster.label),
        ("layout", layout.short()),
        ("chip-hours", span(answer.gpu_hours)),
        ("days", span(answer.days)),
        ("dollars", f"{span(answer.usd, money=True)} at {usd(answer.usd_per_hour.mid)} an hour"),
        ("speed", f"{answer.tokens_per_second_per_chip:,.0f} tokens/s a chip; utilisation {answer.mfu():.1%} causal, "
                  f"{answer.mfu(causal=False):.1%} full"),
        ("one step", f"{step.seconds:.3g} s steady: "
                     + ", ".join(f"{k} {v:.3g}" for k, v in step.phases.items() if v > 0)),
        ("memory", f"{sum(answer.memory.values()) / 1e9:.1f} of {answer.cluster.chip.memory_bytes / 1e9:.0f} GB: "
                   + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in answer.memory.items())),
    ]  # fmt: skip
    wide = max(len(k) for k, _ in lines)
    out = [f"{k:<{wide}}  {v}" for k, v in lines]
    out += [f"{'guessed':<{wide}}  {g}" for g in answer.guesses]
    if len(answer.frontier) > 1:
        out += ["", "dollars against days (middle values):"]
        out += [
            f"  {p['chips']:>6} chips  {show(p['days']):>6} days  {usd(p['usd']):>8}  {p['layout']}"
            for p in answer.frontier
        ]
    out += [
        "",
        "Intervals are 80%. This is the rent of the final run; --bill adds what a headline leaves out.",
    ]
    return "\n".join(out)


def table_text(document: Mapping[str, Any]) -> str:
    """Rows and scores of `plan table`."""
    out = [f"{'row':<26}{'quantity':<12}{'truth':>10}{'low':>10}{'mid':>10}{'high':>10}{'error':>8}  inside"]
    for row in document["rows"]:
        truth = show(row["truth"]) if row["truth"] else "-"
        error = f"{row['error']:+.0%}" if row["error"] is not None else "-"
        inside = {True: "yes", False: "no", None: "-"}[row["inside"]]
        out.append(f"{row['id'][:25]:<26}{row['quantity']:<12}{truth:>10}{show(row['low']):>10}{show(row['mid']):>10}"
                   f"{show(row['high']):>10}{error:>8}  {inside}")  # fmt: skip
    score = document["summary"]
    if score["n"]:
        out.append(f"{score['n']} rows: median error {score['median_error']:.1%}, {score['coverage']:.0%} inside")
    out += [f"skipped {s['id']}: {s['reason']}" for s in document["skipped"]]
    return "\n".join(out)


def bill_text(answer: Plan) -> str:
    """Counted and not counted lines, and the run in three views."""
    lines = ledger(answer.usd)
    out = ["", "the whole bill (low to high; 'no' = not in a headline):"]
    for line in lines:
        out.append(f"  {'yes' if line.counted else 'no ':<4}{line.name:<32}{span(line.usd, money=True):<36}{line.why}")
    out.append(f"      {'everything':<32}{span(total(lines), money=True)}")
    three = views(answer.gpu_hours, answer.cluster.chip, answer.usd_per_hour.mid, answer.cluster.n)
    out += ["", "three views of it:", *(f"      {name:<32}{span(value, money=True)}" for name, value in three.items())]
    every, lost = checkpoint_every(SAVE_SECONDS, answer.cluster.n)
    energy = answer.gpu_hours.mid * kilowatts(answer.cluster.chip) / 1000
    out += ["", f"energy {show(energy)} MWh; checkpoint every {every / 60:.0f} min, {lost:.1%} of time lost to it"]
    return "\n".join(out)
