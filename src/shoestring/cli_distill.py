"""`distill`: a student, a teacher, traces, in one command without a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from shoestring.cli_options import ROAD, RUNS, Again, DryRun, Json, Quiet, RunsDir, Sets, described

Of = Annotated[str | None, typer.Option(metavar="RUN", help="A run directory, or a model folder or hub id.")]


def register(app: typer.Typer) -> None:
    """Add `distill`."""
    text = described(
        "Train a student on a teacher: its answers, its logits, or the student's own text judged by it.",
        "shoestring distill --student some/hf-folder --traces runs/ask-mine-0123 --set steps=300",
        "shoestring distill --teacher runs/rl-mine-0123 --student runs/sft-student-0123 --traces runs/ask-mine-0123 "
        "--way reverse_kl",
        "shoestring distill --teacher some/maths --teacher some/code --student mine --traces runs/ask-mine-0123 "
        "--set 'teacher_weights=[0.7, 0.3]'",
    )
    app.command("distill", help=text, rich_help_panel=ROAD)(distill)


def distill(
    student: Of = None,
    teacher: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="The same; given again for several teachers at once.")
    ] = None,
    traces: Annotated[str | None, typer.Option(metavar="RUN", help="A run of `ask`, or a store of traces.")] = None,
    logits: Annotated[str | None, typer.Option(metavar="RUN", help="A run of `capture`, or a store of logits.")] = None,
    way: Annotated[
        str | None, typer.Option(help="text, offline, on_policy, or a divergence: forward_kl, reverse_kl, jsd, ...")
    ] = None,
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
    """Without --way, what the inputs suggest: stored logits, else the teacher beside the student, else text."""
    from shoestring.cli_road import go, inputs_of
    from shoestring.road import stage_recipe

    named = {"model": student, "traces": traces, "logits": logits}
    named |= {f"teacher{n if n > 1 else ''}": value for n, value in enumerate(teacher or [], 1)}
    given = inputs_of(inputs, named)
    chosen = [f"way={way}"] if way else []
    go(stage_recipe("distill", [*chosen, *(sets or [])], given), runs, dry_run, again, json, quiet)
