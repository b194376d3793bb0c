"""`report`: write the HTML report of a folder of runs once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoestring.cli_options import RESULTS, RUNS, Json, RunsDir, Sets, described, emit_json


def register(app: typer.Typer) -> None:
    """Add `report`."""
    text = described(
        "Write the HTML report of a recipe's runs once more, from what they left.",
        "shoestring report quickstart",
        "shoestring report quickstart --runs elsewhere/runs --json",
    )
    app.command("report", help=text, rich_help_panel=RESULTS)(report)


def report(
    recipe: Annotated[str, typer.Argument(help="A name, or a path to a .py, .json or .yaml file.")],
    sets: Sets = None,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Report on finished runs; nothing is trained."""
    from shoestring.road import command_line, report_recipe, resolve_recipe

    command = command_line(recipe, sets or [])
    path: Path = report_recipe(resolve_recipe(recipe, sets or []), runs, command=command)
    if json:
        emit_json({"report": str(path)})
    else:
        print(path)
