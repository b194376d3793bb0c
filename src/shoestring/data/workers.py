"""Who writes to a store: one process, or several that agreed to share it.

A worker holds a record lock on its own byte of the lock file for as long as it lives; a lock that can be taken belongs
to the dead, and what they had sent is in doubt. Byte 0 is locked exclusively by a worker that does not share, and
shared by those that do. Left out: network file systems, which do not keep such locks.
"""

from __future__ import annotations

import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from shoestring.core.errors import UserError
from shoestring.data.store import Store
from shoestring.data.writer import LOCK

WRITER_S = 30.0  # seconds in which the writer of a process that was killed has written what it had been sent


class Worker:
    """The place of one process at the store in `folder`. A context manager; `id` marks what it sends."""

    def __init__(self, folder: Path, *, share: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.share = share
        self.id = 0
        self._file = open(folder / ".lock", "a+b")  # noqa: SIM115 (held until __exit__)
        if not self._try(0, fcntl.LOCK_SH if share else fcntl.LOCK_EX):
            self._file.close()
            raise UserError(
                f"Another process is asking into {folder}: wait for it, or let several share the work with --share "
                "(all of them)."
            )
        self._await_writer(folder)

    def _await_writer(self, folder: Path) -> None:
        """A process that was killed may have left one behind that is still writing (`writer.py`)."""
        end = time.monotonic() + WRITER_S
        while not self._try(LOCK, fcntl.LOCK_SH):
            if time.monotonic() > end:
                self._file.close()
                raise UserError(f"A dead process's writer still holds {folder}: end it, then run the command again.")
            time.sleep(0.005)
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, LOCK)

    def register(self, store: Store) -> int:
        """Take a number in the store, and put what dead workers had sent in doubt; the number of such rows."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        with store.transaction():
            cursor = store.base.execute("INSERT INTO workers(pid, started) VALUES (?, ?)", (os.getpid(), started))
            self.id = int(cursor.lastrowid or 0)
        if not self._try(self.id, fcntl.LOCK_EX):
            raise RuntimeError(f"worker number {self.id} is taken")
        store.worker, store.share = self.id, self.share
        return store.recover(self.dead(store) if self.share else None)

    def take_over(self, store: Store) -> int:
        """Put what has been left as sent by workers that died meanwhile in doubt; the number of such rows."""
        dead = self.dead(store) if self.share else []
        return store.recover(dead) if dead else 0

    def dead(self, store: Store) -> list[int]:
        """Workers that left rows as sent and live no more."""
        found = []
        for (worker,) in store.base.execute(
            "SELECT DISTINCT worker FROM rows WHERE state = 1 AND worker > 0"
        ).fetchall():
            if worker != self.id and self._try(worker, fcntl.LOCK_EX):
                found.append(worker)
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, worker)
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _try(self, byte: int, how: int) -> bool:
        try:
            fcntl.lockf(self._file, how | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True
