"""`runs`: the tree of what was made from what, the two totals, one run in full, and the difference of two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli_options import RESULTS, RUNS, Json, RunsDir, console, described, emit_json, print_table, short
from shoestring.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rich.tree import Tree

    from shoestring.core.run import Run

_STYLE = {"finished": "green", "started": "yellow", "interrupted": "yellow", "failed": "red"}
_LINE = ("name", "stage", "recipe", "digest", "status", "headline", "attempts", "parents", "headline_metric", "cost")


def register(app: typer.Typer) -> None:
    """Add the `runs` group."""
    text = described(
        "The tree of runs with two totals: the headline (final runs only) and everything that was spent.",
        "shoestring runs",
        "shoestring runs --runs elsewhere/runs --json",
    )
    group = typer.Typer(invoke_without_command=True, callback=tree, help=text)
    text = described(
        "One run in full: its manifest.", "shoestring runs show sft-mine-0123", "shoestring runs show 0123 --json"
    )
    group.command("show", help=text)(show)
    text = described(
        "What differs between two runs.", "shoestring runs diff 0123 4567", "shoestring runs diff 0123 4567 --json"
    )
    group.command("diff", help=text)(diff)
    app.add_typer(group, name="runs", rich_help_panel=RESULTS)


def tree(context: typer.Context, runs: RunsDir = RUNS, json: Json = False) -> None:
    """Print every run under its first parent, then the totals."""
    if context.invoked_subcommand is not None:
        context.obj = runs
        return
    from shoestring.core.run import runs_tree, totals

    found = runs_tree(runs)
    if json:
        lines = [{key: made[key] for key in _LINE} for made in (run.manifest for run in found)]
        emit_json({"schema": 1, "runs": lines, "totals": totals(runs, found)})
        return
    if not found:
        raise UserError(f"There are no runs in {runs}; `shoestring run quickstart` makes some, --runs looks elsewhere.")
    console().print(_tree(found, runs))
    print_table([{"total": name, **values} for name, values in totals(runs, found).items()])


def _tree(found: list[Run], root: Path) -> Tree:
    """Each run stands under its first parent; its other parents are named in its line."""
    from rich.markup import escape
    from rich.tree import Tree

    top = Tree(f"[bold]{escape(str(root))}[/]")
    nodes: dict[str, Any] = {}
    for run in found:
        made = run.manifest
        parents = [parent["name"] for parent in made["parents"].values()]
        under = next((name for name in parents if name in nodes), None)
        others = [f"+ {escape(name)}" for name in parents if name != under and name]
        nodes[run.name] = (nodes[under] if under else top).add(" ".join([_line(made), *others]))
    return top


def _line(made: dict[str, Any]) -> str:
    from rich.markup import escape

    parts = [escape(made["name"]), f"[{_STYLE[made['status']]}]{made['status']}[/]"]
    if made["attempts"] > 1:
        parts.append(f"({made['attempts']} attempts)")
    if metric := made["headline_metric"]:
        error = f" ± {metric['stderr']:.3g}" if metric.get("stderr") is not None else ""
        parts.append(f"{escape(metric['name'])} [bold]{short(metric['value'])}[/]{error}")
    if cost := made["cost"]:
        parts += [short(cost[key], key) for key in ("seconds", "usd") if cost.get(key)]
    if not made["headline"]:
        parts.append("[dim](not in the headline)[/]")
    return "  ".join(parts)


Name = Annotated[str, typer.Argument(help="A run's name, its digest, or the beginning of either.")]


def show(
    context: typer.Context, name: Name, runs: Annotated[Path | None, typer.Option("--runs")] = None, json: Json = False
) -> None:
    """Print a manifest."""
    run = find(runs or context.obj, name)
    if json:
        emit_json(run.manifest)
        return
    print_table(
        [{"field": key, "value": short(value, key)} for key, value in flat(run.manifest).items()], title=run.name
    )


def diff(
    context: typer.Context,
    first: Name,
    second: Name,
    runs: Annotated[Path | None, typer.Option("--runs")] = None,
    json: Json = False,
) -> None:
    """Print every field of config and manifest in which two runs differ."""
    root = runs or context.obj
    sides = [find(root, name) for name in (first, second)]
    left, right = (flat({"config": run.config, **run.manifest}) for run in sides)
    keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    rows = [{"field": key, **{run.name: _said(side, key) for run, side in zip(sides, (left, right), strict=True)}}
            for key in keys]  # fmt: skip
    if json:
        emit_json(
            {"schema": 1, "runs": [run.name for run in sides], "differ": {k: [left.get(k), right.get(k)] for k in keys}}
        )
    elif rows:
        print_table(rows)
    else:
        print("They do not differ.")


def _said(side: dict[str, Any], key: str) -> Any:
    """A value beside another that differs from it: an empty list is not the same as nothing."""
    return "(empty)" if side.get(key) in ([], {}, "") else side.get(key)


def find(root: Path, name: str) -> Run:
    """The run whose name or digest is, or alone begins with, `name`; or the directory of that path."""
    from shoestring.core.run import Run, runs_tree

    if (Path(name) / "manifest.json").exists():
        return Run.load(Path(name))
    found = runs_tree(root)
    exact = [run for run in found if run.name == name]
    matches = exact or [run for run in found if run.name.startswith(name) or run.digest.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f'"{name}" may be any of {", ".join(run.name for run in matches)}; give more of it.')
    raise UserError(f'There is no run "{name}" in {root}.{did_you_mean(name, [run.name for run in found])}')


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} as {"a.b.0": 1}; items of a list that have a path go by its last part, not by their place."""
    items = value.items() if isinstance(value, dict) else _numbered(value)
    leaves: dict[str, Any] = {}
    for key, item in items:
        if isinstance(item, dict | list) and item:
            leaves |= flat(item, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = item
    return leaves


def _numbered(values: list[Any]) -> list[tuple[str, Any]]:
    paths = [value.get("path") if isinstance(value, dict) else None for value in values]
    names = [path.rsplit("/", 1)[-1] if isinstance(path, str) else "" for path in paths]
    alone = all(names) and len(set(names)) == len(names)
    return [(name if alone else str(i), value) for i, (name, value) in enumerate(zip(names, values, strict=True))]
