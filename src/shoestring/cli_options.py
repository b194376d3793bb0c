"""What the verbs of the command line share: options, examples, tables, and JSON for machines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

ROAD, RESULTS, PARTS = "The road, in order", "What came of it", "Parts"  # panels of --help

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. stages.sft.steps=200.")
]
RunsDir = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The folder of runs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run and what it would cost; run nothing.")]
Again = Annotated[bool, typer.Option("--again", help="Make finished stages anew, beside the old.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
RUNS = Path("runs")
NARROW = 12  # characters of a column of text at least, before a table is given up
EXAMPLE_WIDTH = 68  # so that no terminal of 80 columns breaks the line anew


def described(summary: str, *examples: str) -> str:
    """Help of a verb: what it does, and examples of its use, as they can be copied into a shell."""
    lines = "\n".join(f"  $ {_folded(example)}" for example in examples)
    return f"{summary}\n\n\b\nExamples:\n{lines}"


def _folded(command: str) -> str:
    """A long command on several lines, each but the last ended so that a shell reads on."""
    lines = [""]
    for words in re.findall(r"""(?:--\S+ (?!-))?(?:'[^']*'|"[^"]*"|[^\s'"])+""", command):  # an option and its value
        if len(lines[-1]) + len(words) > EXAMPLE_WIDTH:
            lines.append("")
        lines[-1] += f" {words}" if lines[-1] else words
    return " \\\n      ".join(lines)


def emit_json(document: Any) -> None:
    """The one JSON document of a command."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def console(*, err: bool = False) -> Console:
    """A rich console that does not fold tables into 80 columns when its output is piped."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(stderr=err, width=None if stream.isatty() else 200, highlight=False)


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Rows of equal keys as a table on standard output, numbers to the right, in short form; where the terminal is too
    narrow for it, row after row."""
    from rich import box
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    out, table = console(), Table(box=box.SIMPLE_HEAD)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    told = [[short(row.get(column), column) for column in columns] for row in rows]
    least = 1
    for column, *cells in zip(columns, *told, strict=True):
        numeric = any(_is_number(row.get(column)) for row in rows)
        longest = max(map(len, (column, *cells)))
        least += 3 + (longest if numeric else min(longest, NARROW))
        table.add_column(escape(column), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold",
                         min_width=None if numeric else min(longest, NARROW))  # fmt: skip
    for cells in told:
        table.add_row(*map(escape, cells))
    if title:  # the table's own would be folded to its width
        out.print(title, markup=False)
    if least <= out.width:
        out.print(table)
        return
    for first, *cells in told:
        facts = [f"{column} {cell}" for column, cell in zip(columns[1:], cells, strict=True) if cell != "-"]
        out.print(Padding(Text(first, "bold"), (1, 0, 0, 2)))
        out.print(Padding(Text("  ".join(facts)), (0, 0, 0, 4)))
    out.print()


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a report's table for a terminal: "X" and "X stderr" in one column, accuracies in per cent."""
    told: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith("stderr"):
            continue
        error = row.get(f"{key} stderr", row.get("stderr") if key == "value" else None)
        share = key == "value" and row.get("unit") in ("points", "share")
        percent = share or key.startswith(("task: ", "pass@", "cons@"))
        scale, unit = (100.0, " %") if percent else (1.0, "")
        if not _is_number(value) or (error is None and not percent):
            told[key] = value
        else:
            told[key] = f"{scale * value:.1f}" + ("" if error is None else f" ± {scale * error:.1f}") + unit
    return told


def short(value: Any, column: str = "") -> str:
    """A value as a person reads it: 12.3k, 4m 05s for seconds, $0.0031 for dollars, a dash for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={short(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " ".join(short(item) for item in value) or "-"
    if not _is_number(value):
        return str(value)
    name = column.lower()
    if "seconds" in name:
        return _time(float(value))
    if "usd" in name:
        return f"{'-' if value < 0 else ''}${abs(value):,.{2 if abs(value) >= 1 else 4}f}"
    return _number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    if abs(value) >= 0.9995e12:  # what would be rounded to 1000 is 1 of the next unit
        return f"{value:.2e}"
    for least, scale, unit in ((0.9995e9, 1e9, "G"), (0.9995e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / scale:.3g}{unit}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
