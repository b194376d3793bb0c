"""Reading the package's data files: rows of text, with the file named in every complaint."""

from __future__ import annotations

import csv
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.units import SCALES, ungrouped


@cache
def shipped_rows(name: str) -> tuple[dict[str, str], ...]:
    """Rows of data/NAME.csv."""
    text = (files("shoestring.cost") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines(keepends=True)))


@cache
def shipped_json(name: str) -> Any:
    """Contents of data/NAME.json. Shared: do not change it."""
    return json.loads((files("shoestring.cost") / "data" / f"{name}.json").read_text(encoding="utf-8"))


def read_rows(path: Path, needed: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Rows of a user's CSV file, empty lines left out; semicolons or tabs may part the cells.

    Raises UserError for a file that cannot be read, or whose header lacks a needed column.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; give a CSV file with a header line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    header = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count))
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    rows = [row for row in reader if any(cell.strip() for cell in row.values() if isinstance(cell, str))]
    missing = [name for name in needed if name not in reader.fieldnames]
    if rows and missing:
        raise UserError(f'{path} has no column "{missing[0]}"; the first line must name the columns.')
    if not rows:
        raise UserError(f"{path} holds no rows; the first line must name the columns.")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(
                f"{path}, row {number}: the number of cells differs from the header; quote cells with commas."
            )
    return rows


def number(row: dict[str, str], column: str) -> float | None:
    """A cell as a number, `1,000` and `14.8T` too; None when empty."""
    text = ungrouped((row.get(column) or "").strip().removeprefix("$"))
    if not text:
        return None
    scale = SCALES.get(text[-1].lower(), 1.0)  # a digit has none
    try:
        value = float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        name = row.get("id") or row.get("chip") or "?"
        raise UserError(f'row "{name}": {column} is "{text}", not a number; leave the cell empty if unknown.') from None
    if value != value or abs(value) == float("inf"):
        raise UserError(f'row "{row.get("id", "?")}": {column} is "{text}"; give a finite number or leave it empty.')
    return value
