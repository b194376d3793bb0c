"""Claims against numbers: each is reached, missed, or not decided yet.

One seed: both models answered the same problems, so the standard error is that of the paired difference (bootstrap
over problems, `evals.paired`; the delta method for a ratio). Two seeds or more: the value of each seed, and the
standard error over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from shoestring.core.run import Run
from shoestring.evals.paired import paired_bootstrap
from shoestring.report.results import Estimate, Result, over_seeds, per_problem, results_of, rows_of
from shoestring.report.spec import Claim, Point, ReportSpec, read_spec
from shoestring.train.configs import Recipe

RESAMPLES = 2000
Signed = list[tuple[dict[str, float], int]]  # values by problem id, and the sign they enter with


def claims(recipe: Recipe, runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A row a claim: text, value, stderr, target, sense (">=" or "<="), reached (None: not decided yet), seeds, unit.

    `unit`: points (a share; 0.15 is 15 points), share (a ratio of pass@1), tokens, times (a ratio of lengths).
    Raises UserError for a report that names what does not exist.
    """
    spec = read_spec(recipe)
    return [_judge(claim, spec, runs) for claim in spec.claims]


def _judge(claim: Claim, spec: ReportSpec, runs: Mapping[str, Run]) -> dict[str, Any]:
    found = _estimate(claim, spec, runs)
    target = claim.at_least if claim.at_least is not None else claim.at_most
    assert target is not None
    reached = None
    if found is not None:
        reached = found.value >= target if claim.at_least is not None else found.value <= target
    return {
        "text": claim.text,
        "value": None if found is None else found.value,
        "stderr": None if found is None else found.stderr,
        "target": target,
        "sense": ">=" if claim.at_least is not None else "<=",
        "reached": reached,
        "seeds": 0 if found is None else found.seeds,
        "unit": _unit(claim),
    }


def _unit(claim: Claim) -> str:
    if claim.metric == "mean_tokens":
        return "times" if claim.kind == "ratio" else "tokens"
    return "share" if claim.kind == "ratio" else "points"


def _estimate(claim: Claim, spec: ReportSpec, runs: Mapping[str, Run]) -> Estimate | None:
    """The claim's number over the seeds in which every point of it has been evaluated."""
    by_point = [(_results(point, spec, runs), sign) for point, sign in claim.points]
    common = set.intersection(*(set(results) for results, _ in by_point))
    values, own = [], None
    for seed in sorted(common):
        terms: Signed = [(per_problem(results[seed], claim.metric, claim.task), sign) for results, sign in by_point]
        if not all(values for values, _ in terms):
            continue
        value, own = _ratio(terms) if claim.kind == "ratio" else _difference(terms)
        if value is not None:
            values.append(value)
    return over_seeds(values, own) if values else None


def _results(point: Point, spec: ReportSpec, runs: Mapping[str, Run]) -> dict[int, Result]:
    row = next(row for row in rows_of(spec) if (row.of, row.label) == (point.of, point.label))
    return results_of(row, runs)


def _difference(terms: Signed) -> tuple[float, float | None]:
    """Σ sign · mean, and its standard error: paired where all answered the same problems."""
    value = sum(sign * statistics.fmean(values.values()) for values, sign in terms)
    ids = sorted(terms[0][0])
    if len(ids) > 1 and all(sorted(values) == ids for values, _ in terms):
        plus = [sum(values[i] for values, sign in terms if sign > 0) for i in ids]
        minus = [sum(values[i] for values, sign in terms if sign < 0) for i in ids]
        return value, paired_bootstrap(plus, minus, resamples=RESAMPLES).stderr
    errors = [_stderr(list(values.values())) for values, _ in terms]
    known = [error for error in errors if error is not None]
    return value, sum(error**2 for error in known) ** 0.5 if len(known) == len(errors) else None


def _ratio(terms: Signed) -> tuple[float | None, float | None]:
    """mean(a) / mean(b) with the delta method: the spread of (a - r b) / mean(b) over problems."""
    (over, _), (under, _) = terms
    base = statistics.fmean(under.values())
    if base == 0:
        return None, None
    ratio = statistics.fmean(over.values()) / base
    if over.keys() == under.keys():
        return ratio, _stderr([(over[i] - ratio * under[i]) / base for i in over])
    parts = [_stderr(list(over.values())), _stderr(list(under.values()))]
    if None in parts:
        return ratio, None
    return ratio, ((parts[0] or 0.0) ** 2 + (ratio * (parts[1] or 0.0)) ** 2) ** 0.5 / base


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
