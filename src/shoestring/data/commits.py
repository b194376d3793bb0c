"""Group commit: changes of a store, everything that has come meanwhile in one transaction.

With hundreds of requests in flight one fsync serves them all, so `synchronous=FULL` costs little. When the disk is
full, space kept aside for this moment (`BALLAST`) is freed, so that the answers in flight are kept.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shoestring.core.atomic import DiskFull
from shoestring.data.claims import Claim, Op

if TYPE_CHECKING:
    from shoestring.data.places import AnyStore

LINGER = 0.004  # seconds between the starts of two transactions of a busy job, so that its changes come together
BUSY = 4000  # changes a second; below that a transaction begins at once, since the processor has time for them
BALLAST = 16 << 20  # bytes kept aside beside the store


class Commits:
    """The transactions of one writer of `store`. After an error no more claims are taken, and what comes back is kept
    where that is still possible."""

    def __init__(self, store: AnyStore) -> None:
        self.store = store
        self.error: BaseException | None = None
        self.count = 0
        self._last = self._since = time.monotonic()
        self._rate, self._changes = 0.0, 0

    def linger(self) -> None:
        """Before what has come is taken: wait for company, when the job is so busy that there will be some."""
        if self._rate > BUSY and (wait := self._last + LINGER - time.monotonic()) > 0:
            time.sleep(wait)

    def commit(self, ops: list[Op]) -> list[int]:
        """What each claim among `ops` is answered, once all of them are on disk. Raises what stopped this writer, now
        or before."""
        self._last = time.monotonic()
        self._changes += len(ops)
        if self._last - self._since > 0.05:
            self._rate, self._changes, self._since = self._changes / (self._last - self._since), 0, self._last
        answers: list[int] = []
        try:
            answers = self._apply(ops if self.error is None else [op for op in ops if type(op) is not Claim])
        except BaseException as error:
            self.error = self.error or error
        if self.error is not None:
            raise self.error
        return answers

    def _apply(self, ops: list[Op]) -> list[int]:
        self.count += 1
        try:
            return self.store.apply(ops)
        except DiskFull as error:
            if self.error is not None:
                raise
            self.error = error
            free(self.store.ballast)
            return self.store.apply([op for op in ops if type(op) is not Claim])


def keep_aside(path: Path | None) -> None:
    """Take up BALLAST bytes, really; a file system that cannot promise space gets zeros written."""
    if path is None:
        return
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, BALLAST)
        except OSError as error:
            path.unlink()
            raise DiskFull(f"Less than {BALLAST >> 20} MB are free for {path.parent}: free some, then ask.") from error


def free(path: Path | None) -> None:
    """Give back what was kept aside."""
    if path is not None:
        path.unlink(missing_ok=True)
