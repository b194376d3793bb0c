"""Predictions for every row of a table of runs, each with that row left out of the fit, and their scores.

Beside ours stand two plain methods computed on the same rows: a constant utilisation of 0.375 (Epoch AI's default)
and the median utilisation of the row's class, the row itself left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb, exp, log, sqrt
from statistics import median
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.predict import Physical, physical, slowness
from shoestring.cost.residual import Interval, Observation, Residual, features_of, fit, interval
from shoestring.cost.rows import Run, read_run
from shoestring.cost.tables import shipped_rows

CONSTANT_MFU = 0.375
ALPHA = 0.2


@dataclass(frozen=True, slots=True)
class Case:
    """A row that could be read: the run, the step model's answer and, when the truth is known, its slowness."""

    run: Run
    physical: Physical
    study: str

    def observation(self) -> Observation:
        run = self.run
        return Observation(run.id, run.model, self.study, features_of(run, self.physical.mfu), run.steady,
                           slowness(run, self.physical.value), self.physical.spread)  # fmt: skip


def study_of(source: str) -> str:
    """Rows from one paper share software and accounting: its arXiv number, else the whole source."""
    found = re.search(r"\d{4}\.\d{4,5}", source)
    return found.group(0) if found else source


def read_cases(rows: Iterable[Mapping[str, str]]) -> tuple[list[Case], list[dict[str, str]]]:
    """(cases, skipped with the reason)."""
    cases, skipped = [], []
    for row in rows:
        try:
            run = read_run(row)
            cases.append(Case(run, physical(run), study_of(row.get("source") or run.id)))
        except UserError as error:
            skipped.append({"id": row.get("id") or "?", "reason": str(error)})
    return cases, skipped


@cache
def shipped_cases() -> tuple[Case, ...]:
    """The published runs that ship with the package."""
    return tuple(read_cases(shipped_rows("published_runs"))[0])


def residual_without(leave_out: Callable[[Case], bool] = lambda case: False) -> Residual:
    """The constants fitted to the shipped runs, some left out."""
    return fit(case.observation() for case in shipped_cases() if case.run.truth and not leave_out(case))


def predict(case: Case, residual: Residual) -> Interval:
    """Low, mid and high of the run's quantity."""
    run = case.run
    spread = sqrt(case.physical.spread**2 + guess_variance(run))
    centre, sd = residual.at(features_of(run, case.physical.mfu), steady=run.steady, spread=spread)
    return interval(case.physical.value, centre, sd, inverse=run.quantity in ("tok_s_chip", "tflops_chip"))


# Standard deviation of the log that an inferred cell adds: estimates, from varying the cell over its usual range.
GUESS_SD = {
    "seq_len": 0.10, "n_chips": 0.05, "global_batch": 0.05, "parallelism": 0.06, "precision": 0.05, "vocab": 0.02,
    "n_layers and d_model": 0.10, "latent sizes": 0.05, "ffn_dim": 0.05, "moe_dim": 0.10,
}  # fmt: skip


def guess_variance(run: Run) -> float:
    """Variance of the log from inferred cells."""
    return sum(GUESS_SD.get(g, 0.05) ** 2 for g in run.guesses)


def leave_one_out(cases: Sequence[Case], *, by_study: bool = False) -> list[Interval]:
    """Each case predicted with constants fitted to the shipped runs without its row (or its whole study)."""
    answers = []
    for case in cases:

        def left_out(other: Case, case: Case = case) -> bool:
            return other.run.id == case.run.id or (by_study and other.study == case.study)

        answers.append(predict(case, residual_without(left_out)))
    return answers


# ---- plain methods
def _mfu_of(case: Case) -> float:
    """Effective causal utilisation that the row's truth implies."""
    slow = slowness(case.run, case.physical.value)
    return case.physical.mfu * exp(-slow)


def class_of(run: Run) -> str:
    """Family of chip, precision, dense or experts, run or rate."""
    kind = "experts" if run.moe else "dense"
    return f"{run.cluster.chip.family} {run.fixed.get('precision', 'bf16')} {kind} {'rate' if run.steady else 'run'}"


def by_utilisation(case: Case, mfu: float, sd: float) -> Interval:
    """The row's quantity if its utilisation were `mfu`."""
    factor = log(case.physical.mfu / mfu)
    return interval(case.physical.value, factor, sd, inverse=case.run.quantity in ("tok_s_chip", "tflops_chip"))


def constant_method(cases: Sequence[Case]) -> list[Interval]:
    """Utilisation 0.375 everywhere, with the spread of all other rows around it."""
    away = [log(_mfu_of(c) / CONSTANT_MFU) for c in cases]
    return [by_utilisation(c, CONSTANT_MFU, _spread(away[:i] + away[i + 1 :])) for i, c in enumerate(cases)]


def class_method(cases: Sequence[Case]) -> list[Interval]:
    """Median utilisation of the row's class without the row; of all rows where the class has no other."""
    known = [c for c in (*shipped_cases(), *cases) if c.run.truth]
    unique = list({c.run.id: c for c in known}.values())
    answers = []
    for case in cases:
        others = [o for o in unique if o.run.id != case.run.id]
        same = [_mfu_of(o) for o in others if class_of(o.run) == class_of(case.run)] or [_mfu_of(o) for o in others]
        sd = _spread([log(_mfu_of(o) / median(_class_values(o, others) or same)) for o in others])
        answers.append(by_utilisation(case, median(same), sd))
    return answers


def _class_values(case: Case, others: Sequence[Case]) -> list[float]:
    return [_mfu_of(o) for o in others if o is not case and class_of(o.run) == class_of(case.run)]


def _spread(logs: Sequence[float]) -> float:
    return sqrt(sum(x * x for x in logs) / max(1, len(logs))) if logs else 0.3


# ---- scores
def relative_error(interval_: Interval, truth: float) -> float:
    """Of the middle value."""
    return interval_.mid / truth - 1


def winkler(interval_: Interval, truth: float) -> float:
    """Interval score on the log scale: width plus 2/alpha of how far the truth lies outside. Lower is better."""
    low, high, x = log(interval_.low), log(interval_.high), log(truth)
    return high - low + 2 / ALPHA * (max(0.0, low - x) + max(0.0, x - high))


def binomial_p(inside: int, n: int, p: float = 1 - ALPHA) -> float:
    """Exact two-sided test: probability of a count no likelier than the one seen."""
    weights = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    return min(1.0, sum(w for w in weights if w <= weights[inside] * (1 + 1e-9)))


def summary(answers: Sequence[Interval], truths: Sequence[float]) -> dict[str, Any]:
    """Median error, coverage with its exact test, mean Winkler score."""
    if not truths:
        return {"n": 0, "median_error": None, "coverage": None}
    errors = [abs(relative_error(a, t)) for a, t in zip(answers, truths, strict=True)]
    inside = sum(a.low <= t <= a.high for a, t in zip(answers, truths, strict=True))
    return {
        "n": len(truths), "median_error": median(errors), "max_error": max(errors),
        "coverage": inside / len(truths), "coverage_p": binomial_p(inside, len(truths)),
        "winkler": sum(map(winkler, answers, truths)) / len(truths),
    }  # fmt: skip


def predict_table(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """The document of `shoestring plan table`: rows, summary, skipped rows with reasons."""
    cases, skipped = read_cases(rows)
    answers = leave_one_out(cases)
    lines = []
    for case, answer in zip(cases, answers, strict=True):
        truth = case.run.truth
        lines.append({
            "id": case.run.id, "quantity": case.run.quantity, "truth": truth, **answer.to_dict(),
            "error": relative_error(answer, truth) if truth else None,
            "inside": answer.low <= truth <= answer.high if truth else None,
            "layout": case.physical.found.layout.short(), "guesses": list(case.run.guesses),
        })  # fmt: skip
    known = [(a, c.run.truth) for a, c in zip(answers, cases, strict=True) if c.run.truth]
    return {"rows": lines, "summary": summary([a for a, _ in known], [t for _, t in known]), "skipped": skipped}
