"""The verbs `plan` and `check`: what would it cost, and does their figure hold?

`register(app)` adds them to the command line. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli_options import described, emit_json
from shoestring.core.atomic import check_place, write_text
from shoestring.core.errors import UserError

if TYPE_CHECKING:
    from shoestring.cost.shape import ModelShape

PANEL = "What it would cost"
PLAN_HELP = described(
    "Price a training run before it is run.",
    "shoestring plan deepseek-v3 --tokens 14.8T --on 2048xH800 --usd-per-hour 2",
    "shoestring plan config.json --tokens 2T --on any --rule 2023-06-01:China --deadline 60d",
    "shoestring plan quickstart --on 1xH100",
)
TABLE_HELP = described(
    "Predict every row of a table of runs, each row left out of the fit.",
    "shoestring plan table published_runs.csv",
    "shoestring plan table mine.csv --json",
)
STAGE_HELP = described(
    "Price one stage other than pretraining.",
    "shoestring plan stage distill qwen2.5-7b --tokens 4.3B --epochs 2.5 --on 64xH100",
    "shoestring plan stage rl deepseek-v3 --samples 5.3M --length 8000 --on 512xH800",
)
ASK_HELP = described(
    "Price asking a teacher: its API against chips of one's own.",
    'shoestring plan ask "deepseek-reasoner (R1)" --questions 1M --tokens-out 5355',
    "shoestring plan ask gpt-5-mini --questions 200K --acceptance 0.5",
)
CHECK_HELP = described(
    "What a claim about a run implies, and whether it holds.",
    "shoestring check '2048 H800, 2.788M hours, $5.576M, 14.8T tokens, deepseek-v3'",  # a shell would read "$5"
    "shoestring check --news --out claims.md",
)


VALIDATE_HELP = described(
    "The planner against what was published: V3 in four rows, R1 by stage, every published run.",
    "shoestring plan validate",
    "shoestring plan validate --out plan-validation.md",
)
CALIBRATE_HELP = described(
    "Measure this machine's parts of a training step and its messages, so that plans for it are narrow.",
    "shoestring plan calibrate",
    "shoestring plan calibrate --device cuda --dtype bfloat16 --out gpu.json",
)


class _PlanGroup(typer.core.TyperGroup):
    """`plan MODEL …` is `plan run MODEL …`: a first word that is no sub-command is a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _plan_run(
    model: Annotated[str, typer.Argument(help="a model's name, a config.json, a folder with one, or a recipe")],
    tokens: Annotated[str, typer.Option(help="training tokens, like 14.8T (a recipe brings its own)")] = "",
    on: Annotated[
        str, typer.Option(help='chips, like 2048xH800; "any" searches all; with --calibration how many of its devices')
    ] = "any",
    seq_len: Annotated[int, typer.Option(help="tokens a sequence")] = 4096,
    batch: Annotated[float | None, typer.Option(help="sequences a step")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp8; the faster one if left out")] = None,
    layout: Annotated[str, typer.Option(help="like pp=16,ep=64,schedule=dualpipe; searched where left open")] = "",
    usd_per_hour: Annotated[float | None, typer.Option(help="rent of one chip-hour")] = None,
    by: Annotated[str, typer.Option(help="cost or time, where chips are searched")] = "cost",
    budget: Annotated[str | None, typer.Option(help="like $500K")] = None,
    deadline: Annotated[str | None, typer.Option(help="like 60d")] = None,
    rule: Annotated[str | None, typer.Option(help="export rule as DATE:DESTINATION")] = None,
    calibration: Annotated[Path | None, typer.Option(help="file made by `plan calibrate`")] = None,
    bill: Annotated[bool, typer.Option("--bill", help="add what a headline leaves out")] = False,
    report: Annotated[Path | None, typer.Option(help="write a self-contained HTML report here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on standard output")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="the table only")] = False,
) -> None:
    from shoestring.cost import show_plan
    from shoestring.cost.bill import ledger, to_rows

    if _is_recipe(model):
        given = {"tokens": tokens, "batch": batch, "precision": precision, "layout": layout, "budget": budget,
                 "deadline": deadline, "rule": rule, "calibration": calibration, "report": report, "bill": bill,
                 "seq-len": seq_len != 4096, "by": by != "cost"}  # fmt: skip
        _refuse([name for name, value in given.items() if value])
        return _plan_recipe(model, on, usd_per_hour, as_json)
    if not tokens:
        raise UserError("give the training tokens: --tokens, like 14.8T.")
    if report is not None:
        check_place(report)

    options: dict[str, Any] = {"seq_len": seq_len, "global_batch": batch, "usd_per_hour": usd_per_hour}
    answer = show_plan.make(
        model, tokens, on, precision=precision, layout=layout, by=by, budget=budget, deadline=deadline, rule=rule,
        calibration=calibration, **options,
    )  # fmt: skip
    if report is not None:
        from shoestring.cost.page import write_report

        write_report(answer, report)
        if not quiet:
            print(f"report: {report}", file=sys.stderr)
    if as_json:
        emit_json(answer.to_dict() | ({"bill": to_rows(ledger(answer.usd))} if bill else {}))
    else:
        print(show_plan.text(answer) + (show_plan.bill_text(answer) if bill else ""))


def _is_recipe(name: str) -> bool:
    from shoestring.core.registry import list_parts

    return name.endswith((".py", ".yaml", ".yml")) or (name in list_parts("recipes") and name != "stage")


def _refuse(options: list[str]) -> None:
    if options:
        raise UserError(f"a recipe brings its own tokens and sizes: --{options[0]} does not apply to it, leave it out.")


def _plan_recipe(name: str, on: str, usd_per_hour: float | None, as_json: bool) -> None:
    """Every stage of a road, on rented chips."""
    from shoestring.cost.chips import parse_cluster
    from shoestring.road import resolve_recipe
    from shoestring.train import price

    if on == "any":
        raise UserError("a recipe is priced on chips of your choice: give --on, like 8xH100.")
    document = price.price(resolve_recipe(name, []), parse_cluster(on), usd_per_hour=usd_per_hour)
    emit_json(document) if as_json else print(price.text(document))


def _plan_table(
    file: Annotated[Path, typer.Argument(help="CSV in the format of published_runs.csv")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on standard output")] = False,
) -> None:
    from shoestring.cost.rows import NEEDED
    from shoestring.cost.show_plan import table_text
    from shoestring.cost.table import predict_table
    from shoestring.cost.tables import read_rows

    document = predict_table(read_rows(file, NEEDED))
    emit_json(document) if as_json else print(table_text(document))


def _plan_validate(
    out: Annotated[Path | None, typer.Option(help="write the page here, not to standard output")] = None,
) -> None:
    from shoestring.cost.validation import page

    if out is None:
        print(page(), end="")
        return
    write_text(check_place(out), page())
    print(f"wrote {out}", file=sys.stderr)


def _plan_calibrate(
    out: Annotated[Path, typer.Option(help="where to keep the measurements")] = Path("calibration.json"),
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's default")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="format of products: float32 or bfloat16")] = "float32",
    steps: Annotated[bool, typer.Option(help="also take real training steps, which narrow the interval")] = True,
    messages: Annotated[bool, typer.Option(help="also measure all-to-all between this machine's devices")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on standard output")] = False,
) -> None:
    from shoestring import cli_measure

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f'--dtype is "{dtype}"; it is float32 or bfloat16.')
    check_place(out)
    if threads < 0:
        raise UserError(f"--threads is {threads}; give a number from 1 up, or 0 for torch's default.")
    measured = cli_measure.measure(threads, steps=steps, device=device, dtype=dtype, messages=messages)
    measured.save(out)
    print(f"wrote {out}", file=sys.stderr)
    emit_json(measured.to_dict()) if as_json else print(measured.text())


def _plan_stage(
    kind: Annotated[str, typer.Argument(help="sft, distill, logits, on-policy, rl, generate, eval or extend")],
    model: Annotated[str, typer.Argument(help="a model's name or config.json")],
    on: Annotated[str, typer.Option(help="chips, like 8xH100")] = "H100",
    tokens: Annotated[str, typer.Option(help="training tokens (sft, distill, logits, on-policy)")] = "",
    samples: Annotated[str, typer.Option(help="rollouts or answers (rl, generate, eval)")] = "",
    length: Annotated[int, typer.Option(help="tokens a sequence or answer")] = 4000,
    teacher: Annotated[str, typer.Option(help="the teacher's shape (logits, on-policy)")] = "",
    epochs: Annotated[float, typer.Option(help="passes over the data")] = 1.0,
    acceptance: Annotated[float, typer.Option(help="share of answers that is kept")] = 1.0,
    usd_per_hour: Annotated[float | None, typer.Option(help="rent of one chip-hour")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on standard output")] = False,
) -> None:
    from shoestring.cost.show_stage import stage, stage_text

    answer = stage(kind, model, on, tokens=tokens, samples=samples, length=length, teacher=teacher, epochs=epochs,
                   acceptance=acceptance, usd_per_hour=usd_per_hour, counted=_read_or_count)  # fmt: skip
    emit_json(answer) if as_json else print(stage_text(answer))


def _read_or_count(model: str) -> ModelShape:
    """A shape by the formulas; of a config that they do not know, counted from transformers' modules."""
    from shoestring.cost.models import resolve_shape

    try:
        return resolve_shape(model)
    except UserError:
        if not Path(model).exists():
            raise
    from shoestring.models._counted import config_shape  # loads torch

    return config_shape(Path(model))


def _plan_ask(
    teacher: Annotated[str, typer.Argument(help="a model of the price list")],
    questions: Annotated[str, typer.Option(help="how many, like 1M")] = "1M",
    tokens_in: Annotated[int, typer.Option(help="tokens a question")] = 200,
    tokens_out: Annotated[int, typer.Option(help="tokens an answer, reasoning included")] = 1000,
    acceptance: Annotated[float, typer.Option(help="share of answers that is kept")] = 1.0,
    cached: Annotated[float, typer.Option(help="share of the input that is cached")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on standard output")] = False,
) -> None:
    from shoestring.cost.show_stage import ask, ask_text

    answer = ask(teacher, questions, tokens_in, tokens_out, acceptance=acceptance, cached=cached)
    emit_json(answer) if as_json else print(ask_text(answer))


def _check(
    claim: Annotated[str, typer.Argument(help="the claim in words, numbers with units")] = "",
    news: Annotated[bool, typer.Option("--news", help="work through the claims of the news")] = False,
    out: Annotated[Path | None, typer.Option(help="write the page here (with --news)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on standard output")] = False,
) -> None:
    import shoestring.cost.claims as claims
    import shoestring.cost.news as news_pages

    if out is not None and not news:
        raise UserError("--out belongs to --news; leave it out.")
    if news:
        document = news_pages.answers()
        if out is not None:
            write_text(check_place(out), news_pages.page(document))
            print(f"wrote {out}", file=sys.stderr)
        emit_json(document) if as_json else print(news_pages.page(document))
        return
    if not claim.strip():
        raise UserError("give a claim in quotes, like '2048 H800, 2.788M hours, $5.576M, 14.8T tokens, deepseek-v3'.")
    verdict = claims.check(claim)
    emit_json(verdict.to_dict()) if as_json else print(verdict.text())


def register(app: typer.Typer) -> None:
    """Add `plan` (with table, validate, calibrate) and `check` to the command line."""
    group = typer.Typer(cls=_PlanGroup, help=PLAN_HELP, no_args_is_help=True, add_completion=False)
    group.command("run", help=PLAN_HELP)(_plan_run)
    group.command("table", help=TABLE_HELP)(_plan_table)
    group.command("stage", help=STAGE_HELP)(_plan_stage)
    group.command("ask", help=ASK_HELP)(_plan_ask)
    group.command("validate", help=VALIDATE_HELP)(_plan_validate)
    group.command("calibrate", help=CALIBRATE_HELP)(_plan_calibrate)
    app.add_typer(group, name="plan", rich_help_panel=PANEL)
    app.command("check", help=CHECK_HELP, rich_help_panel=PANEL)(_check)
