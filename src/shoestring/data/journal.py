"""Group commit: a thread of its own takes every change that has come meanwhile into one transaction.

A request leaves only when the transaction that says so is on disk; an answer is acknowledged the same way, but nobody
waits for that. With hundreds of requests in flight one fsync serves them all, so `synchronous=FULL` costs little.
When the disk is full, space kept aside for this moment (`BALLAST`) is freed, so that the answers in flight are kept.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path

from shoestring.core.atomic import DiskFull
from shoestring.data.claims import Claim, Op, Purse, Returned, Settled
from shoestring.data.places import AnyStore

LINGER = 0.004  # seconds between the starts of two transactions of a busy job, so that its changes come together
BUSY = 4000  # changes a second; below that a transaction begins at once, since the processor has time for them
Item = tuple[Op, asyncio.Future[int] | None]  # a change, and who waits for its answer
BALLAST = 16 << 20  # bytes kept aside beside the store


class Journal:
    """The writer of a store, for one event loop. Open it inside the loop; `close` waits until all is on disk."""

    def __init__(self, store: AnyStore) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        self._fresh: list[Item] = []  # what this turn of the loop has brought
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self.error: BaseException | None = None
        self.commits = 0
        self._ballast = store.ballast
        if self._ballast is not None:
            _keep_aside(self._ballast)
        self._thread.start()

    @property
    def purse(self) -> Purse:
        """As of the last commit."""
        return self._store.purse

    def claim(self, claim: Claim) -> asyncio.Future[int]:
        """Resolves to GRANTED once it is on disk that the request is sent, or to POOR or TAKEN. Raises DiskFull."""
        future = self._loop.create_future()
        if self.error is not None:
            future.set_exception(self.error)
        else:
            self._add((claim, future))
        return future

    def settle(self, settled: Settled) -> None:
        """Keep answers."""
        self._add((settled, None))

    def give_back(self, returned: Returned) -> None:
        """Record a claim that failed."""
        self._add((returned, None))

    async def close(self) -> None:
        """Wait until everything is on disk. Raises what stopped the writer."""
        self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._free()
        if self.error is not None:
            raise self.error

    def _add(self, item: Item) -> None:
        """To the thread, together with what else this turn of the loop brings: woken for each change, the thread would
        fight for the interpreter's lock and commit them one by one."""
        if not self._fresh:
            self._loop.call_soon(self._hand_over)
        self._fresh.append(item)

    def _hand_over(self) -> None:
        if self._fresh:
            self._queue.put(self._fresh)
            self._fresh = []

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _write(self) -> None:
        last = since = time.monotonic()
        rate, changes, open_ = 0.0, 0, True
        while open_:
            first = self._queue.get()
            if rate > BUSY and (wait := last + LINGER - time.monotonic()) > 0:
                time.sleep(wait)
            given = [first]
            with suppress(queue.Empty):
                while len(given) < 4096:
                    given.append(self._queue.get_nowait())
            open_ = None not in given
            batch = [item for items in given for item in items or ()]
            last = time.monotonic()
            changes += len(batch)
            if last - since > 0.05:
                rate, changes, since = changes / (last - since), 0, last
            self._commit(batch)

    def _commit(self, batch: list[Item]) -> None:
        if not batch:
            return
        futures = [future for _, future in batch if future is not None]
        try:
            if self.error is not None:  # the disk was full: no new claims, but what comes back is still kept
                batch = [(op, future) for op, future in batch if future is None]
            answers = self._apply([op for op, _ in batch])
        except BaseException as error:
            self.error = self.error or error
        if self.error is not None:
            self._tell(futures, self.error)
        else:
            self._loop.call_soon_threadsafe(_resolve, futures, answers)

    def _apply(self, ops: list[Op]) -> list[int]:
        self.commits += 1
        try:
            return self._store.apply(ops)
        except DiskFull as error:
            if self.error is not None:
                raise
            self.error = error
            self._free()
            return self._store.apply([op for op in ops if type(op) is not Claim])

    def _free(self) -> None:
        if self._ballast is not None:
            self._ballast.unlink(missing_ok=True)

    def _tell(self, futures: list[asyncio.Future[int]], error: BaseException) -> None:
        if futures:
            self._loop.call_soon_threadsafe(_reject, futures, error)


def _resolve(futures: list[asyncio.Future[int]], answers: list[int]) -> None:
    for future, answer in zip(futures, answers, strict=True):
        if not future.done():
            future.set_result(answer)


def _reject(futures: list[asyncio.Future[int]], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


def _keep_aside(path: Path) -> None:
    """Take up BALLAST bytes, really; a file system that cannot promise space gets zeros written."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, BALLAST)
        except OSError as error:
            path.unlink()
            raise DiskFull(f"Less than {BALLAST >> 20} MB are free for {path.parent}: free some, then ask.") from error
