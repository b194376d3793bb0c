"""The tables of a report as plain rows: for the page, `RoadResult` and the docs.

`Recipe.report` is a mapping (validated by `report/spec.py`; every key is optional):

    title    str
    finding  one sentence; "{teacher/after RL}" is replaced by that row's pass@1, "{teacher/after RL:mean_tokens}" by
             its mean answer length
    note     the honest note: how the textbook is constructed
    evals    [{"of": "teacher", "label": "after RL", "stage": the eval stage, "model": the stage that made the weights
             (default: the eval stage's input "model"), "control": false, "seed": 0}, ...]
             in the order of the table; entries of one (of, label) are seeds of one row
    claims   [{"text": str, "metric": "pass@1" (default) | "mean_tokens", "task": one family (default: all),
               one of   "minuend": P, "subtrahend": P                a - b
                        "difference_of": [P, P], "minus": [P, P]     (a - b) - (c - d)
                        "ratio_of": P, "to": P                       a / b
               one of   "at_least": number, "at_most": number}]      with P = {"of": ..., "label": ...}
             pass@1 counts in shares: 15 points are 0.15; mean_tokens in tokens
    samples  {"before": eval stage, "after": eval stage, "teacher": eval stage, "student": eval stage}
    curves   {"teacher RL": training stage, ...}
    frontier [{"way": "on policy", "budget": 250, "stage": eval stage, "model": the stage that learnt, "seed": 0}, ...]
             accuracy against dollars and tokens, a line a way; what the stages in `given` cost is nobody's
    given    [stage, ...]
    command  how to run it again (default: shoestring run NAME)

Example of a claim that RL adds 10 points more than its control does:

    {"text": "...", "difference_of": [T("after RL"), T("after SFT")], "minus": [T("control"), T("after SFT")],
     "at_least": 0.10}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoestring.core import ledger
from shoestring.core.run import Run, totals
from shoestring.report.findings import claims as claims  # one of the three tables, from here too
from shoestring.report.results import Row, results_of, rows_of, summary_estimate, train_flops, why_missing
from shoestring.report.spec import read_spec
from shoestring.train.configs import Recipe

TASK = "task: "  # how the columns of the task families begin


def result_table(recipe: Recipe, runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A row an (of, label): accuracy by family, overall pass@1, pass@k, cons@k, mean tokens, each with "X stderr".

    Every row has the same columns; what is not there yet is None, and "missing" says why. `seeds` counts the
    evaluations averaged; `train flops` are the FLOPs behind the model, rollouts and the asking of its traces included.
    """
    rows = rows_of(read_spec(recipe))
    found = {(row.of, row.label): list(results_of(row, runs).values()) for row in rows}
    everything = [result for results in found.values() for result in results]
    tasks = sorted({task for result in everything for task in result["by_task"]})
    k = max((result["overall"]["samples"] for result in everything), default=1)
    metrics = ["pass@1", *([f"pass@{k}", f"cons@{k}"] if k > 1 else []), "mean_tokens"]
    table = []
    for row in rows:
        results = found[row.of, row.label]
        line: dict[str, Any] = {"of": row.of, "label": row.label, "control": row.control, "seeds": len(results)}
        for task in tasks:
            _put(line, f"{TASK}{task}", summary_estimate(results, "pass@1", task))
        for metric in metrics:
            _put(line, metric, summary_estimate(results, metric))
        line["train flops"] = _mean([train_flops(entry, recipe, runs) for entry in row.entries])
        line["missing"] = _missing(row, runs)
        table.append(line)
    return table


def _put(line: dict[str, Any], name: str, estimate: Any) -> None:
    line[name] = None if estimate is None else estimate.value
    line[f"{name} stderr"] = None if estimate is None else estimate.stderr


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _missing(row: Row, runs: Mapping[str, Run]) -> str | None:
    """Which evaluations of a row are not there, and why."""
    there = results_of(row, runs)
    absent = [entry for entry in row.entries if entry.seed not in there]
    if not absent:
        return None
    return "; ".join(f"{entry.stage}: {why_missing(runs, entry.stage) or 'result.json unreadable'}" for entry in absent)


def bill_table(recipe: Recipe, runs: Mapping[str, Run], root: Path) -> list[dict[str, Any]]:
    """A row a stage, then the totals (`kind` "total"): seconds, tokens (all that were trained on, read and written),
    sampled_tokens (those of them that sampling read and wrote), flops, peak_share, usd, headline, status.

    headline: the finished headline stages. everything: every attempt at these stages, failed ones too, controls and
    evaluations. A third total, of all that was ever tried under `root`, where that is more.
    """
    lines = []
    for stage in recipe.stages:
        run = runs.get(stage.name)
        cost = (run.manifest["cost"] if run else None) or {}
        lines.append(
            {"kind": stage.stage, "stage": stage.name, "status": "not begun" if run is None else run.manifest["status"]}
            | {key: cost.get(key) for key in ("seconds", "tokens", "sampled_tokens", "flops", "peak_share", "usd")}
            | {"headline": stage.headline}
        )
    final = [line for line in lines if line["headline"] and line["status"] == "finished"]
    names = {run.name for run in runs.values()}
    attempts = [asdict(entry) for entry in ledger.read(root) if entry.run in names]
    peak = max((_peak(run) for run in runs.values()), default=0.0)
    lines.append(_total("headline", ledger.total_of(final), peak))
    lines.append(_total("everything", ledger.total_of(attempts), peak))
    whole = totals(root)["everything"]
    if whole["seconds"] > 1.01 * lines[-1]["seconds"]:
        lines.append(_total("all that was tried in this folder", whole, peak))
    return lines


def _peak(run: Run) -> float:
    return float((run.manifest["cost"] or {}).get("peak_flops") or 0.0)


def _total(name: str, spent: Mapping[str, float], peak: float) -> dict[str, Any]:
    share = spent["flops"] / spent["seconds"] / peak if peak and spent["seconds"] else None
    return {
        "kind": "total", "stage": name, "status": "",
        **{key: spent[key] for key in ("seconds", "tokens", "sampled_tokens", "flops")},
        "peak_share": share, "usd": spent["usd"], "headline": name == "headline",
    }  # fmt: skip
