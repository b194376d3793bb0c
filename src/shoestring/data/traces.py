"""The traces store: a teacher's kept answers as JSON lines, appended for good.

One `append` is one write and one fsync, however many traces it holds (group commit). Whatever stands after the last
line end was never committed: it is left out when reading and cut off by the next append, so a kill at any moment
costs at most the append it interrupted. A trace's id says what was asked of whom and how, not what was answered:
appending an id that is there already does nothing, so a batch asked again after a crash is stored once.

Left out: deletion, and an index (a million traces are read in seconds, and every use reads them all).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from shoestring.core.atomic import disk_full, fsync_path
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace

NOT_CONTENT = ("date", "cost_usd")  # when it was said and at what price: not part of what was said


def trace_id(teacher: str, messages: Sequence[Mapping[str, Any]], decoding: Mapping[str, Any], sample: int) -> str:
    """16 hex digits of teacher, messages, decoding parameters and sample index."""
    return _sha256([teacher, list(messages), dict(decoding), sample])[:16]


class TraceStore:
    """Traces in one .jsonl file. Opening it touches nothing; the first append makes the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._ids: set[str] = set()
        self._seen = 0  # bytes of the file whose ids are in _ids

    def append(self, traces: Iterable[Trace]) -> int:
        """Store those whose id is new, on disk before this returns; the number stored.

        Safe between processes. Raises DiskFull (the store stays as it was) and UserError for a foreign file.
        """
        try:
            made = not self.path.exists()
            with open(self.path, "a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up(file)
                fresh = {trace.id: trace for trace in traces if trace.id not in self._ids}
                data = "".join(_line(trace) for trace in fresh.values()).encode()
                self._commit(file, data)
            if made:
                fsync_path(self.path.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(self.path) from error
            raise
        self._ids.update(fresh)
        self._seen += len(data)
        return len(fresh)

    def read(self) -> list[Trace]:
        """Every committed trace in the order of storing; none when there is no file.

        Raises UserError, naming the line, for one that is not a trace of this schema.
        """
        if not self.path.exists():
            return []
        return self._parse(_committed(self.path.read_bytes()), first_line=1)

    def __len__(self) -> int:
        return len(self.read())

    def digest(self) -> str:
        """12 hex digits of what the traces say, in any order of storing; dates and prices do not count."""
        rows = [trace.to_dict() for trace in self.read()]
        content = [{key: value for key, value in row.items() if key not in NOT_CONTENT} for row in rows]
        return _sha256(sorted(content, key=lambda row: row["id"]))[:12]

    def _catch_up(self, file: BinaryIO) -> None:
        """Learn the ids written since the last look, and cut a torn last line. The caller holds the lock."""
        file.seek(self._seen)
        data = file.read()
        whole = _committed(data)
        self._ids.update(trace.id for trace in self._parse(whole, first_line=None))
        self._seen += len(whole)
        if len(whole) < len(data):
            file.truncate(self._seen)

    def _commit(self, file: BinaryIO, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(file.fileno(), data[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(self._seen)
            raise

    def _parse(self, data: bytes, first_line: int | None) -> list[Trace]:
        traces = []
        for number, line in enumerate(data.splitlines(), first_line or 1):
            where = f"{self.path} line {number}" if first_line else str(self.path)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON; remove or mend it.") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a trace; each line of a traces file is one JSON object.")
            try:
                traces.append(Trace.from_dict(row))
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        return traces


def _committed(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _line(trace: Trace) -> str:
    return json.dumps(trace.to_dict(), ensure_ascii=True, allow_nan=False) + "\n"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
