"""`list` and `check-part`: what can be named, and whether a file of one's own may stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoestring.cli_options import PARTS, Json, console, described, emit_json


def register(app: typer.Typer) -> None:
    """Add `list` and `check-part`."""
    text = described(
        "List the recipes, tasks, rewards, losses, models ... that can be named.",
        "shoestring list",
        "shoestring list rewards --json",
    )
    app.command("list", help=text, rich_help_panel=PARTS)(list_)
    text = described(
        "Run the contract tests of a part on a file of yours.",
        "shoestring check-part my_rewards/brevity.py --kind rewards",
        "shoestring check-part tasks/puzzle.py --json",
    )
    app.command("check-part", help=text, rich_help_panel=PARTS)(check_part)


def list_(
    kind: Annotated[str | None, typer.Argument(help="One kind only, e.g. rewards.")] = None,
    json: Json = False,
) -> None:
    """Names and first docstring lines, by kind."""
    from shoestring.core.registry import KINDS, list_parts

    parts = {name: list_parts(name) for name in ([kind] if kind else KINDS)}
    if json:
        emit_json(parts)
        return
    out = console()
    for name, found in parts.items():
        if found:
            out.print(f"[bold]{name}[/]")
            width = max(len(part) for part in found)
            for part, line in found.items():
                out.print(f"  {part:<{width}}  {line}", markup=False)


def check_part(
    file: Annotated[Path, typer.Argument(help="The part: a .py file.")],
    kind: Annotated[str | None, typer.Option(help="Its kind, when the folder's name does not say it.")] = None,
    json: Json = False,
) -> None:
    """Exit 0 when the part keeps its contract, 1 with every breach of it otherwise."""
    from shoestring.core.parts import check, kind_of

    kind = kind or kind_of(file)
    failures = check(kind, file)
    if json:
        emit_json({"file": str(file), "kind": kind, "ok": not failures, "failures": failures})
    else:
        for failure in failures:
            print(f"- {failure}")
        print(
            f"{file} breaks the contract of {kind} {len(failures)}×."
            if failures
            else f"{file} keeps the contract of {kind}."
        )
    if failures:
        raise typer.Exit(1)
