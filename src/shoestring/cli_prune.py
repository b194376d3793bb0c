"""`prune`: a smaller model out of a larger one, and what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.cli_options import (
    ROAD,
    RUNS,
    Again,
    DryRun,
    Json,
    Quiet,
    RunsDir,
    Sets,
    described,
    emit_json,
    print_table,
)
from shoestring.core.errors import UserError

Keep = Annotated[int | None, typer.Option(min=1, help="How many to keep; all when not given.")]


def register(app: typer.Typer) -> None:
    """Add `prune`."""
    text = described(
        "Make a smaller model of the layers, hidden channels, neurons, experts, heads that matter most on some text.",
        "shoestring prune --model some/hf-folder --text some/corpus.jsonl --layers 16 --ffn 4096 --dry-run",
        "shoestring prune --model runs/rl-mine-0123 --traces runs/ask-mine-0123 --experts 4 --hidden 64",
        "shoestring run distill-pruned --set teacher=runs/rl-mine-0123 --set traces=runs/ask-mine-0123 --set layers=2",
    )
    app.command("prune", help=text, rich_help_panel=ROAD)(prune)


def prune(
    model: Annotated[
        str | None, typer.Option(metavar="RUN", help="A run directory, or a model folder or hub id.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help='Text to measure on: .txt, or .jsonl with "text".')
    ] = None,
    traces: Annotated[str | None, typer.Option(metavar="RUN", help="Or a run of `ask`, or a store of traces.")] = None,
    layers: Keep = None,
    hidden: Keep = None,
    ffn: Keep = None,
    experts: Keep = None,
    heads: Keep = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--from", metavar="ROLE=RUN", help="The same inputs by role (model=, traces=).")
    ] = None,
    sets: Sets = None,
    runs: RunsDir = RUNS,
    dry_run: DryRun = False,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Parameters and held-out loss, before and after."""
    from shoestring.cli_road import inputs_of
    from shoestring.train.configs import PruneStage, Recipe, TextFiles

    given = inputs_of(inputs, {"model": model, "traces": traces})
    if layers is hidden is ffn is experts is heads is None:
        raise UserError("say what to keep: --layers N, --hidden N, --ffn N, --experts N or --heads N.")
    if "model" not in given:
        raise UserError("say what to prune: --model RUN, a run directory, a model folder or a hub id.")
    if bool(text) == ("traces" in given):
        raise UserError("give one kind of text to measure importance on: --text FILE, or --traces RUN.")
    corpus = TextFiles(files=tuple(map(str, text))) if text else None
    stage = PruneStage(name="prune", inputs=given, corpus=corpus, layers=layers, hidden=hidden, ffn=ffn,
                       experts=experts, heads=heads)  # fmt: skip
    recipe = Recipe(name="mine", stages=(stage,)).with_sets(f"stages.prune.{change}" for change in sets or [])
    _go(recipe, runs, dry_run, again, json, quiet)


def _go(recipe: Any, runs: Path, dry_run: bool, again: bool, json: bool, quiet: bool) -> None:
    """The plan with the parameters that would be left, or the run with what was measured."""
    from shoestring.road import parameters_of, plan_rows, run_recipe

    (stage,) = recipe.stages
    if dry_run:
        counts = parameters_of(recipe, runs)
        (row,) = plan_rows(recipe, runs)
        row |= {"parameters_before": counts[stage.inputs["model"]], "about_parameters": counts[stage.name]}
        if json:
            emit_json({"schema": 1, "recipe": recipe.name, "plan": [row]})
        else:
            print_table([row])
        return
    result = run_recipe(recipe, runs, again=again, quiet=quiet)
    made = result.runs[stage.name]
    facts = made.manifest["facts"]
    if json:
        emit_json(result.to_json() | {"pruned": facts})
        return
    print_table([
        {"": "parameters", "before": facts["parameters_before"], "after": facts["parameters"],
         "change": f"{facts['parameters'] / facts['parameters_before'] - 1:+.1%}"},
        {"": f"held-out loss, nats a token ({facts['held_out']} pieces)", "before": _told(facts["loss_before"]),
         "after": _told(facts["loss"]), "change": _told(facts["rise"], sign="+")},
    ])  # fmt: skip
    print(f"layers kept: {' '.join(map(str, facts['layers_kept']))}")
    print(f"{made.path}: distil it from the unpruned model next (`shoestring distill --way forward_kl`).")


def _told(measured: dict[str, float], sign: str = "") -> str:
    return f"{measured['value']:{sign}.4f} ± {measured['stderr']:.4f}"
