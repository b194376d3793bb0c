"""Who writes while a job is asked: a thread beside the event loop, or a process of its own (`writer.py`).

A request leaves only when the transaction that says so is on disk; an answer is acknowledged the same way, but nobody
waits for that. What one turn of the loop brings goes to the writer together, and what has come while it was busy goes
into one transaction (`commits.py`). A thread shares the interpreter's lock with the loop, which costs about 50 us an
answer where the server answers at once (LOG.md, entry 6); a process costs its start, so only a job of MANY rows, on a
machine with a core to spare, has one, and only one that has its store alone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import suppress

from shoestring.core.host import cores
from shoestring.data.claims import Claim, Op, Purse, Returned, Settled
from shoestring.data.commits import Commits, free, keep_aside
from shoestring.data.far import Far
from shoestring.data.places import AnyStore
from shoestring.data.store import Store

MANY = 4000  # rows still to ask, from which on the start of a process pays
Item = tuple[Op, asyncio.Future[int] | None]  # a change, and who waits for its answer


class Journal:
    """The writer of a store, for one event loop. Open it inside the loop; `close` waits until all is on disk.

    `lost`: why nothing more can be kept, should the writer die.
    """

    def __init__(self, store: AnyStore) -> None:
        self.store = store
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._fresh: list[Item] = []  # what this turn of the loop has brought
        keep_aside(store.ballast)

    @property
    def purse(self) -> Purse:
        """As of the last commit."""
        return self.store.purse

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
        await self._end()
        free(self.store.ballast)
        if self.error is not None:
            raise self.error

    def _add(self, item: Item) -> None:
        """To the writer, together with what else this turn of the loop brings: woken for each change, it would fight
        for the interpreter's lock and commit them one by one."""
        if not self._fresh:
            self._loop.call_soon(self._hand_over)
        self._fresh.append(item)

    def _hand_over(self) -> None:
        if self._fresh:
            fresh, self._fresh = self._fresh, []
            self._give(fresh)

    def _give(self, items: list[Item]) -> None:
        raise NotImplementedError

    async def _end(self) -> None:
        raise NotImplementedError


class ThreadJournal(Journal):
    """Written by a thread of this process."""

    def __init__(self, store: AnyStore) -> None:
        super().__init__(store)
        self._queue: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        self._commits = Commits(store)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def _give(self, items: list[Item]) -> None:
        self._queue.put(items)

    async def _end(self) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self.error = self._commits.error

    def _write(self) -> None:
        open_ = True
        while open_:
            given = [self._queue.get()]
            self._commits.linger()
            with suppress(queue.Empty):
                while len(given) < 4096:
                    given.append(self._queue.get_nowait())
            open_ = None not in given
            if batch := [item for items in given for item in items or ()]:
                self._commit(batch)

    def _commit(self, batch: list[Item]) -> None:
        futures = [future for _, future in batch if future is not None]
        try:
            answers = self._commits.commit([op for op, _ in batch])
        except BaseException as error:
            self.error = error
            self._loop.call_soon_threadsafe(_reject, futures, error)
        else:
            self._loop.call_soon_threadsafe(_resolve, futures, answers)


class FarJournal(Journal):
    """Written by a process of its own. Dead processes write nothing: what was in flight is in doubt then."""

    def __init__(self, store: AnyStore, far: Far) -> None:
        super().__init__(store)
        self._waiting: list[asyncio.Future[int]] = []  # in the order of their claims
        self._far = far

    async def open(self) -> FarJournal:
        """Start listening to the process; it takes what is written meanwhile when it has started."""
        await self._far.listen(self._hear, self._died)
        return self

    def _give(self, items: list[Item]) -> None:
        self._waiting += [future for _, future in items if future is not None]
        self._far.write([op for op, _ in items])

    async def _end(self) -> None:
        await self._far.end()

    def _hear(self, answers: list[int] | BaseException, claims: int) -> None:
        """Of a commit: what it answers to the `claims` oldest claims."""
        futures, self._waiting = self._waiting[:claims], self._waiting[claims:]
        if isinstance(answers, BaseException):
            self.error = self.error or answers
            _reject(futures, self.error)
        else:
            _resolve(futures, answers)

    def _died(self, why: str) -> None:
        """Claims are answered no more."""
        if not self.lost.done():
            self.lost.set_result(why)


def apart(store: AnyStore, rows: int) -> Far | None:
    """A process that writes `store`, where one pays for a job with `rows` to ask."""
    if rows >= MANY and isinstance(store, Store) and not store.share and cores() > 1:
        return Far(store)
    return None


async def open_journal(store: AnyStore, rows: int = 0, far: Far | None = None) -> Journal:
    """The writer that suits a job with `rows` still to ask; `far` when it is there. Raises DiskFull when little space
    is left."""
    far = far or apart(store, rows)
    if far is None:
        return ThreadJournal(store)
    try:
        return await FarJournal(store, far).open()
    except BaseException:
        far.quit()
        raise


def _resolve(futures: list[asyncio.Future[int]], answers: list[int]) -> None:
    for future, answer in zip(futures, answers, strict=True):
        if not future.done():
            future.set_result(answer)


def _reject(futures: list[asyncio.Future[int]], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
