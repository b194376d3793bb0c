"""The evaluations behind a report: read from finished runs, grouped into rows, averaged over seeds.

Nothing here raises for a run that is missing, unfinished or damaged: it has no result, and `why_missing` says why.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.core.run import Run
from shoestring.report.spec import EvalEntry, ReportSpec
from shoestring.train.configs import Recipe

Result = dict[str, Any]  # EvalResult.to_dict()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result table: an (of, label) with its evaluations, one a seed."""

    of: str
    label: str
    control: bool
    entries: tuple[EvalEntry, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error (None: unknown), over `seeds` seeds."""

    value: float
    stderr: float | None
    seeds: int


def rows_of(spec: ReportSpec) -> list[Row]:
    """The table's rows in the order in which the recipe names them."""
    grouped: dict[tuple[str, str], list[EvalEntry]] = {}
    for entry in spec.evals:
        grouped.setdefault((entry.of, entry.label), []).append(entry)
    return [Row(of, label, entries[0].control, tuple(entries)) for (of, label), entries in grouped.items()]


def read_result(runs: Mapping[str, Run], stage: str) -> Result | None:
    """The result of a finished evaluation, or None."""
    run = runs.get(stage)
    if run is None or not run.finished:
        return None
    try:
        result: Result = json.loads((run.path / "result.json").read_text(encoding="utf-8"))
        if not result["overall"]["problems"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result


def read_answers(runs: Mapping[str, Run], stage: str | None) -> dict[str, dict[str, Any]]:
    """The answers of an evaluation by problem id, in order; empty when there are none to read."""
    run = runs.get(stage) if stage else None
    if run is None:
        return {}
    try:
        lines = (run.path / "samples" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        return {row["problem_id"]: row for row in rows if row["texts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def why_missing(runs: Mapping[str, Run], stage: str) -> str | None:
    """Why a stage has nothing to show yet; None when it is finished."""
    run = runs.get(stage)
    if run is None:
        return "not begun"
    if run.finished:
        return None
    status = run.manifest["status"]
    return {"started": "unfinished", "interrupted": "interrupted", "failed": "failed"}.get(status, status)


def results_of(row: Row, runs: Mapping[str, Run]) -> dict[int, Result]:
    """The results of a row's seeds that are there."""
    found = {entry.seed: read_result(runs, entry.stage) for entry in row.entries}
    return {seed: result for seed, result in found.items() if result is not None}


def over_seeds(values: Sequence[float], own: float | None) -> Estimate:
    """Mean over seeds; its standard error over seeds from two seeds on, else the one evaluation's `own`."""
    if len(values) == 1:
        return Estimate(values[0], own, 1)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5, len(values))


def summary_estimate(results: Sequence[Result], metric: str, task: str | None = None) -> Estimate | None:
    """A summary's metric (overall, or of one task) over seeds."""
    summaries = [result["overall"] if task is None else result["by_task"].get(task, {}) for result in results]
    values = [float(s[metric]) for s in summaries if s.get(metric) is not None]
    if not values:
        return None
    own = length_stderr(results[0], task) if metric == "mean_tokens" else summaries[0].get(f"{metric}_stderr")
    return over_seeds(values, own)


def per_problem(result: Result, metric: str, task: str | None = None) -> dict[str, float]:
    """The metric of each problem, by id: share of right samples, or mean tokens of an answer."""
    rows = [row for row in result["rows"] if task is None or row["task"] == task]
    if metric == "mean_tokens":
        return {row["problem_id"]: statistics.fmean(row["tokens"]) for row in rows}
    return {row["problem_id"]: row["correct"] / row["samples"] for row in rows}


def length_stderr(result: Result, task: str | None = None) -> float | None:
    """Standard error of the mean answer length over problems."""
    values = list(per_problem(result, "mean_tokens", task).values())
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def model_stage(entry: EvalEntry, recipe: Recipe) -> str | None:
    """The stage that made the weights an entry evaluates."""
    if entry.model is not None:
        return entry.model
    return next((stage.inputs.get("model") for stage in recipe.stages if stage.name == entry.stage), None)


def lineage(name: str | None, recipe: Recipe) -> list[str]:
    """The stages whose training FLOPs are in a model: its own, those it was continued from, and the asking or
    sampling that made the traces it learnt from (not the training of who was asked)."""
    stages = {stage.name: stage for stage in recipe.stages}
    chain: list[str] = []
    while name in stages:
        stage = stages[name]
        chain += [name, *(stage.inputs[role] for role in ("traces",) if stage.inputs.get(role) in stages)]
        name = stage.inputs.get("model", "") if stage.stage not in ("ask", "reject", "eval") else ""
    return chain


def train_flops(entry: EvalEntry, recipe: Recipe, runs: Mapping[str, Run]) -> float | None:
    """Training FLOPs behind the evaluated model, or None when a stage of its line is not finished."""
    total = 0.0
    for name in lineage(model_stage(entry, recipe), recipe):
        cost = runs[name].manifest["cost"] if name in runs else None
        if cost is None:
            return None
        total += float(cost.get("train_flops") or 0.0)
    return total or None
