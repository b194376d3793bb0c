"""The model card of an export, built from the run tree: parents, data and teachers, evaluation, the bill, limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoestring.core import ledger
from shoestring.core.run import Run, runs_tree
from shoestring.report.provenance import Source, hindrances, tree


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Finished evaluations of this run's model beside it: name, value, standard error, problems."""
    rows = []
    for other in runs_tree(run.path.parent):
        made = other.manifest
        if not other.finished or made["parents"].get("model", {}).get("digest") != run.digest:
            continue
        if (metric := made["headline_metric"]) and other.config.get("stage") == "eval":
            tasks = ", ".join(str(entry["task"]) for entry in other.config["mix"])
            rows.append({"run": other.name, "tasks": tasks, **metric})
    return rows


def bill(run: Run) -> dict[str, dict[str, float]]:
    """The two totals of the model's own tree: the final runs, and every attempt at any of them, evaluations too."""
    family = tree(run)
    names = {member.name for member in family} | {row["run"] for row in evaluations(run)}
    final = [member.manifest["cost"] for member in family if member.manifest["headline"] and member.finished]
    spent = [entry for entry in ledger.read(run.path.parent) if entry.run in names]
    return {
        "headline": ledger.total_of(final),
        "everything": ledger.total_of([{key: getattr(e, key) for key in ("seconds", "tokens", "flops", "usd")}
                                       for e in spent]),
    }  # fmt: skip


def card(run: Run, found: Sequence[Source], *, name: str, licence: str, permission: bool) -> str:
    """README.md in Hugging Face's form."""
    base = sorted({s.name for s in found if s.kind == "model"})
    front = ["---", f"license: {licence}", "library_name: transformers", "tags: [shoestring, distillation]"]
    front += [f"base_model: {base[0]}"] if base else []
    steps = "\n".join(_step(member) for member in tree(run))
    told = (f"| {s.kind} | {s.name} | {s.licence} | {s.terms} | {s.detail} |" for s in found)
    rows = list(dict.fromkeys(told)) or ["| - | - | - | - | - |"]  # once, however many stages learnt from it
    return "\n".join([
        *front, "---", "", f"# {name}", "",
        f"Made by shoestring, run `{run.name}`. Load it with `transformers`, vLLM, or `shoestring.load`.", "",
        "## How it was made", "", steps, "",
        "## Teachers, data and base models", "", "| kind | name | licence | training others on it | detail |",
        "|---|---|---|---|---|", *rows, "", *_warnings(found, permission),
        "## Evaluation", "", *_evaluation(run), "",
        "## What it cost", "", *_bill(run), "",
        "## Limits", "",
        "Evaluated on nothing but what stands above. It repeats mistakes and biases of its teachers and data, has had",
        "no safety training of its own, and answers outside its training tasks are not to be relied on.", "",
    ])  # fmt: skip


def _step(run: Run) -> str:
    made = run.manifest
    metric = made["headline_metric"]
    told = "" if not metric or metric["value"] is None else f"; {metric['name']}: {_measured(metric)}"
    parents = ", ".join(f"{role} {p['name'] or p['digest']}" for role, p in made["parents"].items())
    return f"- `{run.name}` (seed {made['seed']}, code {made['code']}){' from ' + parents if parents else ''}{told}"


def _measured(metric: dict[str, Any]) -> str:
    error = metric.get("stderr")
    return f"{metric['value']:.4g}" + ("" if error is None else f" ± {error:.2g} (s.e.)")


def _warnings(found: Sequence[Source], permission: bool) -> list[str]:
    said = hindrances(found)
    if not said:
        return []
    stated = "Whoever exported it states to have permission." if permission else ""
    return [f"**Before you use it**: {'; '.join(said)}. {stated}".strip(), ""]


def _evaluation(run: Run) -> list[str]:
    rows = evaluations(run)
    if not rows:
        return ["None was run."]
    lines = [f"| {row['tasks']} | {row['name']} | {_measured(row)} | `{row['run']}` |" for row in rows]
    return ["| tasks | measure | value | run |", "|---|---|---|---|", *lines]


def _bill(run: Run) -> list[str]:
    lines = [
        f"| {name} | {row['tokens']:,.0f} | {row['flops']:.3g} | {row['seconds'] / 3600:,.3f} | {row['usd']:.4f} |"
        for name, row in bill(run).items()
    ]
    return [
        "| | tokens | FLOPs | hours | dollars |", "|---|---|---|---|---|", *lines, "",
        "Headline: the final runs. Everything: every attempt at them, failed ones and evaluations too.",
    ]  # fmt: skip
