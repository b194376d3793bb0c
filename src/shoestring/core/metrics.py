"""metrics.jsonl: one row a step, flushed as it is written, so that a kill loses at most a torn last line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from shoestring.core.atomic import read_lines, write_text


class Metrics:
    """The metrics file of one run, with at most one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row, in order."""
        return read_lines(self.path)

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Add a row; when this returns the system has it."""
        if self._file is None:
            self.cut_torn_line()
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open for the length of the attempt
        row = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the rows after `step`, atomically, and return those kept."""
        self.close()
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        return kept

    def cut_torn_line(self) -> None:
        """Remove what stands after the last newline: a row that a kill cut short."""
        if self.path.exists():
            with open(self.path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def close(self) -> None:
        """Close the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> float | int | str:
    """A JSON value: numbers of numpy and torch unwrapped; NaN and infinity, which JSON lacks, as strings."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
