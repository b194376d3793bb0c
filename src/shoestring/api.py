"""`shoestring.run`: a recipe from Python, as the command line runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.road import command_line, resolve_recipe, run_recipe

if TYPE_CHECKING:
    from shoestring.road import RoadResult


def run(
    recipe: Any,
    *,
    sets: Sequence[str] = (),
    runs_dir: str | Path = "runs",
    again: bool = False,
    quiet: bool = False,
) -> RoadResult:
    """Run a recipe: a name, the path of a recipe file (.py, .json, .yaml), or a Recipe made in Python.

    Finished stages are taken as they are and unfinished ones resumed; `again` makes finished ones anew beside the
    old. Raises UserError for a mistake in the recipe, before any work is done.
    """
    command = ""
    if isinstance(recipe, str | Path):
        command = command_line(str(recipe), sets)
        recipe = resolve_recipe(str(recipe), list(sets))
    else:
        recipe = recipe.with_sets(sets)
    return run_recipe(recipe, Path(runs_dir), again=again, quiet=quiet, command=command)
