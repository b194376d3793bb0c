"""`run RECIPE`, and one verb for each stage of the road."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    readable,
)
from shoestring.core.errors import UserError

if TYPE_CHECKING:
    from shoestring.train.configs import Recipe

# verb -> what it does, and two examples
STAGES = {
    "tokenizer": (
        "Train a tokenizer (byte-level BPE) on the corpus to come.",
        "shoestring tokenizer --set vocab_size=512",
        'shoestring tokenizer --set \'corpus={"files": ["some/text.jsonl"]}\'',
    ),
    "pretrain": (
        "Train a model from nothing on text: next-token prediction.",
        "shoestring pretrain --from tokenizer=runs/tokenizer-mine-0123 --set steps=500 --dry-run",
        "shoestring pretrain --from tokenizer=runs/tokenizer-mine-0123 --set optim.lr=1e-3",
    ),
    "sft": (
        "Fine-tune on answers: loss on the completion only.",
        "shoestring sft --from model=runs/pretrain-mine-0123",
        "shoestring sft --from model=some/hf-folder --from traces=runs/ask-mine-0123 --set steps=200",
    ),
    "rl": (
        "Reinforcement learning on verifiable problems (GRPO).",
        "shoestring rl --from model=runs/sft-mine-0123 --set steps=100",
        "shoestring rl --from model=runs/sft-mine-0123 --set group_size=16 --dry-run",
    ),
    "reject": (
        "Rejection sampling: keep the model's own verified answers as traces.",
        "shoestring reject --from model=runs/rl-mine-0123",
        "shoestring reject --from model=runs/rl-mine-0123 --set problems=500 --json",
    ),
    "ask": (
        "Ask a teacher new problems and keep what it answers as traces.",
        "shoestring ask --from teacher=runs/rl-mine-0123",
        "shoestring ask --from teacher=runs/rl-mine-0123 --set problems=2000 --dry-run",
    ),
    "capture": (
        "Keep what a teacher says at every token of its traces: a store of logits.",
        "shoestring capture --from teacher=runs/rl-mine-0123 --from traces=runs/ask-mine-0123",
        "shoestring capture --from teacher=some/hf-folder --from traces=runs/ask-mine-0123 --set kind=hidden",
    ),
    "prune": ("Make a smaller model of a larger one.", ""),  # its options: cli_prune.py
    "distill": ("Train a student on a teacher.", ""),  # its options: cli_distill.py
    "eval": (
        "Measure a model on unseen problems: pass@1, pass@k, cons@k with standard errors.",
        "shoestring eval --from model=runs/rl-mine-0123",
        "shoestring eval --from model=some/hf-folder --set problems=300 --json",
    ),
}

Inputs = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="ROLE=RUN", help="An input: a run directory, or a model folder or id."),
]


def register(app: typer.Typer) -> None:
    """Add `run` and the stage verbs."""
    from shoestring import (  # here, for they use this file's options
        cli_ask,
        cli_curate,
        cli_distill,
        cli_prune,
        cli_synthesize,
    )

    own = {"ask": cli_ask, "prune": cli_prune, "distill": cli_distill}
    text = described(
        "Run a recipe: the whole road, or any part of it. Killed, the same command goes on.",
        "shoestring run quickstart",
        "shoestring run quickstart --set size=smoke --dry-run",
    )
    app.command("run", help=text, rich_help_panel=ROAD)(run)
    for kind, (summary, *examples) in STAGES.items():
        if kind in own:  # verbs with options of their own
            own[kind].register(app)
            if kind == "ask":
                cli_synthesize.register(app)
                cli_curate.register(app)
            continue
        app.command(kind, help=described(summary, *examples), rich_help_panel=ROAD)(stage_verb(kind))


def run(
    recipe: Annotated[str, typer.Argument(help="A name, or a path to a .py, .json or .yaml file.")],
    sets: Sets = None,
    runs: RunsDir = RUNS,
    dry_run: DryRun = False,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Resolve a recipe by name or path and run it."""
    from shoestring.road import command_line, resolve_recipe

    command = command_line(recipe, sets or [])
    go(resolve_recipe(recipe, sets or []), runs, dry_run, again, json, quiet, command)


def stage_verb(kind: str) -> Callable[..., None]:
    """The function behind the verb of a stage."""

    def verb(
        inputs: Inputs = None,
        sets: Sets = None,
        runs: RunsDir = RUNS,
        dry_run: DryRun = False,
        again: Again = False,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        from shoestring.road import stage_recipe

        go(stage_recipe(kind, sets or [], roles(inputs or [])), runs, dry_run, again, json, quiet)

    verb.__doc__ = STAGES[kind][0]
    return verb


def roles(inputs: list[str]) -> dict[str, str]:
    """["model=runs/x"] as {"model": "runs/x"}."""
    roles: dict[str, str] = {}
    for text in inputs:
        role, given, value = text.partition("=")
        if not (role and given and value):
            raise UserError(f'--from "{text}" is not of the form ROLE=RUN, as in --from model=runs/sft-mine-0123.')
        if role in roles:
            raise UserError(f'--from gives "{role}" twice; give it once.')
        roles[role] = value
    return roles


def inputs_of(inputs: list[str] | None, named: dict[str, str | None]) -> dict[str, str]:
    """What --from gives, and the inputs with options of their own (None: not given)."""
    given = roles(inputs or [])
    for role, value in named.items():
        if value is not None and role in given:
            raise UserError(f'the input "{role}" is given twice; give it once.')
        if value is not None:
            given[role] = value
    return given


def go(
    recipe: Recipe, runs: Path, dry_run: bool, again: bool, json: bool, quiet: bool, command: str = ""
) -> None:  # fmt: skip
    """Print the plan of a recipe, or run it and print what came of it."""
    from shoestring.road import plan_rows, run_recipe
    from shoestring.train.estimate import plan_totals

    if dry_run:
        rows = plan_rows(recipe, runs)
        totals = plan_totals(rows)
        shown = [{"stage": name, "kind": "total", **total} for name, total in totals.items()] if len(rows) > 1 else []
        _report({"schema": 1, "recipe": recipe.name, "plan": rows, "totals": totals}, [*rows, *shown], json)
        return
    result = run_recipe(recipe, runs, again=again, quiet=quiet, command=command)
    _report(result.to_json(), [] if result.tables else result.rows, json)
    if json or result.report_path is None:
        return
    for title, rows in result.tables.items():
        print_table([readable(row) for row in rows], title=title)
    print(f"report: {result.report_path}")


def _report(document: Any, rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        emit_json(document)
    else:
        print_table(rows)
