"""Who writes to a store in PostgreSQL, and a local copy of what it holds."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from shoestring.core.errors import UserError
from shoestring.data.pg_connection import STORE_LOCK
from shoestring.data.postgres import COPIED, PgStore
from shoestring.data.store import Store

GRACE = 2.0  # seconds in which the server notices that a process that held the store has gone


class PgWorker:
    """The place of one process at a store in PostgreSQL, as `workers.Worker` is at a folder."""

    def __init__(self, url: str, *, share: bool = False) -> None:
        self._share = share
        self.store = PgStore(url, create=True)
        self.id = 0
        end = time.monotonic() + GRACE
        while not (got := self._try(STORE_LOCK, shared=share)) and time.monotonic() < end:
            time.sleep(0.05)
        if not got:
            self.store.close()
            raise UserError(
                f'Another process is asking into the store "{self.store.name}": wait for it, or let several share the '
                "work with --share (all of them)."
            )

    def register(self, store: PgStore) -> int:
        """Take a number in the store, and put what dead workers had sent in doubt; the number of such rows."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        found = store._one("INSERT INTO workers(pid, started) VALUES (%s, %s) RETURNING id", (os.getpid(), started))
        self.id = store.worker = int(found[0])
        if not self._try(self.id):
            raise RuntimeError(f"worker number {self.id} is taken")
        return self.take_over(store)

    def take_over(self, store: PgStore) -> int:
        """Put what the dead had sent in doubt, and free what they had leased; the number of rows in doubt."""
        dead = []
        for (worker,) in store._all("SELECT DISTINCT worker FROM rows WHERE state < 2 AND worker > 0"):
            if worker != self.id and self._try(worker):
                dead.append(worker)
        try:
            return store.recover(dead) if dead else 0
        finally:
            for worker in dead:
                store._one("SELECT pg_advisory_unlock(%s, %s)", (store.place, worker))

    def __enter__(self) -> PgWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.store.base.closed:
            self.store._all("UPDATE rows SET worker = 0 WHERE state = 0 AND worker = %s RETURNING id", (self.id,))
            self.store._one("SELECT pg_advisory_unlock_all()", ())  # now, not when the server sees the connection end
            self.store.close()

    def _try(self, number: int, *, shared: bool = False) -> bool:
        how = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
        return bool(self.store._one(f"SELECT {how}(%s, %s)", (self.store.place, number))[0])


def copy_down(url: str, folder: str | Path) -> int:
    """Make `folder` a local store with what the one at `url` holds, for curation and export; the number of answers.

    Raises UserError when a store is there already that holds something else.
    """
    far, near = PgStore(url), Store(folder, create=True)
    try:
        with near.transaction(), far.base.transaction():
            far.base.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            if near.base.execute("SELECT count(*) FROM workers WHERE started != 'copied'").fetchone()[0]:
                raise UserError(f"{folder} has been asked into; give another folder for the copy.")
            for table in COPIED:
                columns = [row[1] for row in near.base.execute(f"PRAGMA table_info({table})")]
                near.base.execute(f"DELETE FROM {table}")
                marks = ",".join("?" * len(columns))
                with far.base.cursor(name="copied") as cursor:
                    cursor.execute(f"SELECT {', '.join(columns)} FROM {table}")
                    while rows := cursor.fetchmany(1000):
                        near.base.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
            near.base.execute("UPDATE workers SET started = 'copied'")
        return int(near.base.execute("SELECT count(*) FROM answers").fetchone()[0])
    finally:
        far.close()
        near.close()
