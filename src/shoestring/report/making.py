"""How the numbers on the page were made: machine, versions, code, seeds, run directories, the command to run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shoestring.core.run import Run
from shoestring.report import words
from shoestring.report.spec import ReportSpec
from shoestring.train.configs import Recipe


def making_html(recipe: Recipe, command: str, spec: ReportSpec, runs: Mapping[str, Run]) -> str:
    """A list of facts, the command that makes the page again among them, and a table of the run directories to open."""
    facts = [f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _facts(recipe, command, spec, runs) if value]
    body = "".join(_run_row(run) for run in runs.values())
    return (
        f'<dl class="facts">{"".join(facts)}</dl>'
        f'<details class="runs"><summary>The {len(runs)} run directories</summary><div class="scroll">'
        '<table class="plain">'
        "<thead><tr><th>Directory</th><th>Status</th><th>Attempts</th><th>Seed</th><th>Kernels</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _facts(recipe: Recipe, command: str, spec: ReportSpec, runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    made = [run.manifest for run in runs.values()]
    seeds = sorted({stage.seed for stage in recipe.stages} | {entry.seed for entry in spec.evals})
    peaks = [(m["cost"] or {}).get("peak_flops") for m in made]
    rate = f"{words.usd(recipe.usd_per_hour)} an hour"
    return [
        ("Command", f"<code>{words.text(command)}</code>" if command else ""),
        ("Recipe", f"{words.text(recipe.name)}, config digest <code>{recipe.digest()}</code>"),
        ("Finished", words.text(max((m["ended"] or "" for m in made), default="")[:16].replace("T", " ") + " UTC")),
        ("Machine", _each(_machine(m["host"]) for m in made)),
        ("Measured peak", _each(f"{words.flops(p)}/s, best dense product (fp32 or bf16)" for p in peaks if p)),
        ("Accelerator", _each(str(m["chip"]) for m in made if m["chip"] and not _is_processor(m))),
        ("Versions", _each(", ".join(f"{k} {v}" for k, v in m["versions"].items()) for m in made)),
        ("Code", _each(_code(m) for m in made)),
        ("Programs ran in", _each(str(m["sandbox"] or m["facts"].get("sandbox") or "") for m in made)),
        ("Seeds", words.text(", ".join(map(str, seeds)))),
        ("Rate", words.text(rate)),
    ]


def _each(values: Iterable[str]) -> str:
    """The distinct values, escaped: several where a road was made on several machines or by several versions."""
    return "<br>".join(words.text(value) for value in dict.fromkeys(values) if value)


def _machine(host: Mapping[str, Any]) -> str:
    return f"{host.get('cpu')}, {host.get('cores')} cores, {host.get('memory_gb')} GB, {host.get('os')}"


def _is_processor(manifest: Mapping[str, Any]) -> bool:
    return str(manifest["chip"]).startswith(str(manifest["host"].get("cpu")))


def _code(manifest: Mapping[str, Any]) -> str:
    sha, changed = manifest["git_sha"], manifest["git_diff_hash"]
    commit = f"commit {sha[:9]}{' with changes ' + changed if changed else ''}, " if sha else ""
    return f"{commit}sources {manifest['code']}"


def _run_row(run: Run) -> str:
    made = run.manifest
    return (
        f"<tr><td><code>{words.text(run.name)}</code></td><td>{words.text(made['status'])}</td><td>{made['attempts']}</td>"
        f"<td>{made['seed']}</td><td>{words.text(made['facts'].get('kernels', ''))}</td></tr>"
    )
