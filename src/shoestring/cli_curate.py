"""`curate`: the sieve behind `ask`. Filters mark and never delete; what is left is exported."""

# ruff: noqa: E501 (options, one a line)
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli_options import ROAD, Json, Quiet, described, emit_json, print_table
from shoestring.core.errors import UserError

if TYPE_CHECKING:
    from shoestring.curate._sieve import Filter

USUAL = ("finished", "refused", "repeated", "one_language", "dedup", "near_duplicates")


def register(app: typer.Typer) -> None:
    """Add `curate`."""
    text = described(
        "Sieve the answers of a store: each filter marks what it drops and why. Nothing is deleted.",
        "shoestring curate traces/ --dry-run",
        "shoestring curate traces/ --against gsm8k_test.jsonl --filters correct,decontaminate,dedup,length "
        "--option length.policy=short --export kept.chat.jsonl",
    )
    app.command("curate", help=text, rich_help_panel=ROAD)(curate)


def curate(
    store: Annotated[str, typer.Argument(help="The folder (or the postgresql://… address) that `ask --out` filled.")],
    filters: Annotated[str | None, typer.Option(help=f"In order, separated by commas; usually: {','.join(USUAL)}.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Evaluation sets to keep out (adds decontaminate).")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="FILTER.OPTION=VALUE", help="An option of a filter.")
    ] = None,
    export: Annotated[list[Path] | None, typer.Option(help="Write what is kept: .jsonl, .chat.jsonl or .parquet.")] = None,
    card: Annotated[Path | None, typer.Option(help="Write a data card (.md, its plots beside it) of what is kept.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page with samples kept and dropped by each filter.")] = None,
    no_grading: Annotated[bool, typer.Option("--no-grading", help="Do not run the tasks' graders first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the funnel; export nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Run the chain of filters over a store."""
    from shoestring.core.atomic import check_place
    from shoestring.core.progress import Progress
    from shoestring.curate._sieve import run
    from shoestring.data.card import write_card
    from shoestring.data.export import check_name
    from shoestring.data.export import export as write
    from shoestring.data.places import open_store

    chain = chain_of((filters or ",".join(USUAL)).split(","), against or [], option or [])
    for path in export or []:
        check_name(path)
    for path in filter(None, (card, page)):
        check_place(path)
    opened = open_store(store)
    try:
        (whole,) = opened.sql.execute("SELECT count(*) FROM answers").fetchone()
        with Progress(whole, title="curate", unit="traces", quiet=quiet) as bar:
            steps, view = run(opened, chain, grade=not no_grading, progress=lambda name, done: bar.update(done))
        funnel = [step.to_json() for step in steps]
        kept = funnel[-1]["kept"] if funnel else whole
        written = {}
        if not dry_run:
            written = {str(path): write(view, path) for path in export or []}
            if card is not None:
                write_card(view, card, funnel=funnel, title=f"Traces kept of {opened.title}")
        if page is not None:
            from shoestring.report.sieve import write_sieve

            write_sieve(page, opened.title, whole, steps, view)
    finally:
        opened.close()
    _show(whole, kept, funnel, written, json)


def chain_of(names: list[str], against: list[Path], options: list[str]) -> list[Filter]:
    """The filters with their options. Raises UserError for what is not of the form FILTER.OPTION=VALUE."""
    from shoestring.curate._sieve import Filter

    given: dict[str, dict[str, Any]] = {name.strip().replace("-", "_"): {} for name in names if name.strip()}
    if against:
        given.setdefault("decontaminate", {})["against"] = [str(path) for path in against]
    for text in options:
        name, dot, rest = text.partition(".")
        key, equals, value = rest.partition("=")
        if not (dot and equals and key):
            raise UserError(f'--option "{text}" is not of the form FILTER.OPTION=VALUE, as in length.policy=short.')
        if name.replace("-", "_") not in given:
            raise UserError(f'--option "{text}": the filter "{name}" is not among those to run ({", ".join(given)}).')
        given[name.replace("-", "_")][key] = _value(value)
    if not given:
        raise UserError("--filters names none; leave it out for the usual ones.")
    if "decontaminate" in given and "against" not in given["decontaminate"]:
        raise UserError("decontaminate needs evaluation sets to keep out: --against FILE.")
    return [Filter(name, values) for name, values in given.items()]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _show(whole: int, kept: int, funnel: list[dict[str, Any]], written: dict[str, int], json: bool) -> None:
    if json:
        emit_json({"schema": 1, "answers": whole, "kept": kept, "funnel": funnel, "exported": written})
        return
    rows = [
        {
            "filter": step["filter"], "seen": step["seen"], "kept": step["kept"],
            "dropped because": ", ".join(f"{why} {number:,}" for why, number in step["dropped"].items()) or None,
        }
        for step in funnel
    ]  # fmt: skip
    print_table(rows, title=f"{whole:,} answers")
    share = f" ({100 * kept / whole:.1f} %)" if whole else ""
    print(f"kept: {kept:,}{share}")
    for path, count in written.items():
        print(f"{path}: {count:,} traces")
