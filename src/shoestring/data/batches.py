"""Rows that lie at a provider's batch API, in either store: theirs is the batch's number, negative, as their worker.

So they are nobody's who may be dead, and a session that goes on finds them. In PostgreSQL a batch is numbered, and its
rows are leased and claimed, in one transaction; what is to be asked again is leased by nobody in the same one that says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from shoestring.data.claims import Claim, Op, Row
from shoestring.data.places import AnyStore
from shoestring.data.postgres import PgStore

_OPEN = """
WITH open AS (SELECT id, question FROM rows WHERE state = 0 AND worker = 0 AND job = %s AND how = %s
  ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED),
summed AS (SELECT o.id, sum(octet_length(q.messages)) OVER (ORDER BY o.id) AS bytes, row_number() OVER (ORDER BY o.id)
  AS place FROM open o JOIN questions q ON q.id = o.question),
mine AS (UPDATE rows SET worker = %s FROM summed s WHERE rows.id = s.id AND (s.bytes <= %s OR s.place = 1)
  RETURNING rows.*)
SELECT m.id, m.trace, m.sample, m.attempts, m.turn, m.question, q.messages FROM mine m
JOIN questions q ON q.id = m.question ORDER BY m.id
"""


def claim_batch(
    store: AnyStore, job: int, how: int, claim_of: Callable[[Row], Claim], *, rows: int, size: int
) -> tuple[int, list[int]]:
    """Claim the next planned rows, so many and so large at most, for a new batch: its number, and what each claim is
    answered; no answers when no row is left."""
    if not isinstance(store, PgStore):
        found = store.planned(job, how, 0, rows=rows, size=size)
        number = _new(store) if found else 0
        return number, settle_batch(store, number, [claim_of(row) for row in found]) if found else []
    with store.transaction():
        number = _new(store)
        found = [Row._make(row) for row in store._all(_OPEN, (job, how, rows, -number, size))]
        if found:
            return number, settle_batch(store, number, [claim_of(row) for row in found])
        store.sql.execute("DELETE FROM batches WHERE id = ?", (number,))
        return 0, []


def _new(store: AnyStore) -> int:
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return int(store.sql.execute("INSERT INTO batches(made) VALUES (?) RETURNING id", (made,)).fetchone()[0])


def settle_batch(store: AnyStore, number: int, ops: Sequence[Op]) -> list[int]:
    """Apply `ops` to rows of a batch; what each claim among them is answered."""
    worker, store.worker = store.worker, -number
    try:
        if not isinstance(store, PgStore):
            return store.apply(ops)
        with store.transaction():
            answers = store.apply(ops)
            store.base.execute("UPDATE rows SET worker = 0 WHERE state = 0 AND worker = %s", (-number,))
            return answers
    finally:
        store.worker = worker
