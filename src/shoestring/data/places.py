"""Where a traces store lies: a folder (SQLite), or a PostgreSQL database that workers on many machines share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from shoestring.core.errors import UserError
from shoestring.data.pg_connection import is_url
from shoestring.data.pg_worker import PgWorker
from shoestring.data.postgres import PgStore
from shoestring.data.store import Store
from shoestring.data.workers import Worker

AnyStore: TypeAlias = Store | PgStore


def open_store(out: Path | str) -> AnyStore:
    """The store that is at `out`, beside whoever asks into it. Raises UserError when there is none."""
    return PgStore(str(out)) if is_url(out) else Store(Path(out), share=True)


class Seat:
    """A process's place at a store: `store`, how many rows dead workers had left in doubt, and taking over more."""

    def __init__(self, store: AnyStore, worker: Worker | PgWorker) -> None:
        self.store, self._worker = store, worker
        self.doubtful: int = worker.register(store)  # type: ignore[arg-type]

    def take_over(self) -> int:
        """Put what workers that died meanwhile had sent in doubt; the number of such rows."""
        found: int = self._worker.take_over(self.store)  # type: ignore[arg-type]
        self.doubtful += found
        return found


@contextmanager
def seat_at(out: Path | str, *, share: bool = False) -> Iterator[Seat]:
    """Take a place at the store `out`, a folder or an address. Raises UserError when another process has it alone."""
    if is_url(out):
        with PgWorker(str(out), share=share) as far:
            yield Seat(far.store, far)
        return
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out is a folder.")
    with Worker(out, share=share) as worker:
        store = Store(out, create=True)
        try:
            yield Seat(store, worker)
        finally:
            store.close()


__all__ = ["AnyStore", "Seat", "is_url", "open_store", "seat_at"]
