"""The audit log: one JSON line a call, who asked how much when and what came of it; never a key, and no prompt and no
answer unless the operator asks for them (`audit_text`).

Lines are appended by a thread of their own. A disk that is full must not stop the service nor pass in silence: the
line is lost, the loss is counted, said in the log and in /health, and writing goes on as soon as there is room.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError

_log = logging.getLogger("shoestring.serve")


class AuditLog:
    """Append-only JSON lines."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"the audit log {path} cannot be written: {error.strerror}.") from error
        self._thread = ThreadPoolExecutor(1, "audit")
        self._torn = False  # whether the file ends in a line that was cut off
        self.lost = 0
        self.failing = ""

    def write(self, row: Mapping[str, Any]) -> None:
        """Hand a line over; returns at once."""
        self._thread.submit(self._append, json.dumps(row, ensure_ascii=False))

    def _append(self, line: str) -> None:
        data = (("\n" if self._torn else "") + line + "\n").encode("utf-8", "replace")
        try:
            written = os.write(self._fd, data)
            self._torn = written < len(data)
            if self._torn:
                raise OSError(errno.ENOSPC, "only part of a line was written")
        except OSError as error:
            self.lost += 1
            if not self.failing:
                _log.error("the audit log cannot be written (%s); calls go on without it", error.strerror)
            self.failing = error.strerror or "unknown"
            return
        if self.failing:
            _log.warning("the audit log is written again; %d lines were lost", self.lost)
            self.failing = ""

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        os.close(self._fd)
