"""The traces store in PostgreSQL, for workers on many machines: the tables of `schema.py`, the promises of `store.py`.

A row is *sent* and its worst case reserved in one transaction (`synchronous_commit = on`) before its request leaves.
Transactions that touch the purse take its row first, so the budget holds over all workers. A worker leases rows before
it claims them, so that two never reach for the same one. It holds an advisory lock for as long as its connection
lives; a lock that can be taken belongs to the dead: what they had sent is in doubt, what they had leased is free.
A connection that is lost is a death: nothing is written twice, and the same command goes on.

`pg_connection.py` opens it; `pg_worker.copy_down` makes a local copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shoestring.core.errors import UserError
from shoestring.data.claims import CUT, PURSE, Budget, Claim, Op, Planned, Purse, Returned, Row, Settled, decide
from shoestring.data.pg_connection import PLAN_LOCK, PgConnection
from shoestring.data.pg_sql import cleaned, in_columns
from shoestring.data.schema import ANSWERED, FAILED, SENT, STATES

LEASE = 64  # rows a worker holds before it has sent them
COPIED = ("questions", "hows", "jobs", "rows", "answers", "purse", "troubles", "workers")


class PgStore(PgConnection):
    """A worker's connection to a store in PostgreSQL; the public face is `Store`'s. Raises UserError."""

    ballast = None  # the disk is the server's
    share = True

    def __init__(self, url: str, *, create: bool = False, worker: int = 0) -> None:
        super().__init__(url, create=create)
        self.worker = worker
        self.budget = Budget()
        self.purse = self.read_purse()

    # ---- planning ------------------------------------------------------------------------------------------------

    def how(self, digest: str, values: dict[str, Any]) -> int:
        """The number of a way of asking."""
        import json

        self.base.execute(
            "INSERT INTO hows(hash, fields) VALUES (%s, %s) ON CONFLICT DO NOTHING", (digest, json.dumps(values))
        )
        return int(self._one("SELECT id FROM hows WHERE hash = %s", (digest,))[0])

    def job(self, signature: str) -> int:
        """The number of a job."""
        self.base.execute("INSERT INTO jobs(signature) VALUES (%s) ON CONFLICT DO NOTHING", (signature,))
        return int(self._one("SELECT id FROM jobs WHERE signature = %s", (signature,))[0])

    @contextmanager
    def planning(self) -> Iterator[None]:
        """One worker plans at a time; the others wait, and find it planned."""
        self.base.execute("SELECT pg_advisory_lock(%s, %s)", (self.place, PLAN_LOCK))
        try:
            yield
        finally:
            self.base.execute("SELECT pg_advisory_unlock(%s, %s)", (self.place, PLAN_LOCK))

    def plan(self, planned: Sequence[Planned], how: int, job: int) -> None:
        """Make what is not there yet part of `job`; rows that have their answer stay as they are."""
        with self.transaction():
            self._many(
                "INSERT INTO questions AS q (hash, messages, ref, problem) VALUES (%s, %s, %s, %s) "
                "ON CONFLICT (hash) DO UPDATE SET ref = coalesce(q.ref, excluded.ref), "
                "problem = coalesce(q.problem, excluded.problem) WHERE (q.problem IS NULL AND excluded.problem IS NOT "
                "NULL) OR (q.ref IS NULL AND excluded.ref IS NOT NULL)",
                [[text and text.replace("\0", "") for text in p[:4]] for p in planned],
            )
            rows = [(trace, i, p.hash) for p in planned for i, trace in enumerate(p.traces)]
            self.base.execute(
                "INSERT INTO rows(trace, question, how, sample, job) SELECT j.trace, q.id, %s, j.sample, %s "
                "FROM unnest(%s::text[], %s::bigint[], %s::text[]) WITH ORDINALITY AS j(trace, sample, hash, place) "
                "JOIN questions q ON q.hash = j.hash ORDER BY j.place "
                "ON CONFLICT (trace) DO UPDATE SET job = excluded.job, "
                f"how = CASE WHEN rows.state < {ANSWERED} THEN excluded.how ELSE rows.how END "
                f"WHERE rows.job != excluded.job OR (rows.how != excluded.how AND rows.state < {ANSWERED})",
                (how, job, *in_columns(rows, 3)),
            )

    def is_planned(self, job: int) -> bool:
        """Whether every question of `job` is in the store."""
        return bool(self._one("SELECT planned FROM jobs WHERE id = %s", (job,))[0])

    def set_planned(self, job: int) -> None:
        """`job` is planned whole, and no other is."""
        self.base.execute("UPDATE jobs SET planned = CASE WHEN id = %s THEN 1 ELSE 0 END", (job,))

    def halt(self, job: int, halted: bool) -> None:
        """Tell the workers of `job`, wherever they are, to stop (or no longer to)."""
        self.base.execute("UPDATE jobs SET halted = %s WHERE id = %s", (int(halted), job))

    def halted(self, job: int) -> bool:
        """Whether somebody told them to."""
        return bool(self._leased("SELECT halted FROM jobs WHERE id = %s", (job,))[0][0])

    def repeat_failed(self, job: int) -> None:
        """Plan the failed rows of `job` again; not those whose answer was cut off."""
        self.base.execute(
            "UPDATE rows SET state = 0, worker = 0 WHERE job = %s AND state = %s AND kind IS DISTINCT FROM %s",
            (job, FAILED, CUT),
        )

    def check_refs(self, refs: Sequence[tuple[str, int, int]]) -> tuple[str, int, int] | None:
        """Remember (the user's id, question hash, line); the first id given to two questions, with both lines."""
        self.base.execute("CREATE TEMP TABLE IF NOT EXISTS refs(ref TEXT PRIMARY KEY, hash BIGINT, line BIGINT)")
        clean = [(ref.replace("\0", ""), digest, line) for ref, digest, line in refs]
        added = self.base.execute(
            "INSERT INTO refs SELECT * FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) ON CONFLICT DO NOTHING",
            in_columns(clean, 3),
        ).rowcount
        if added == len(refs):
            return None
        found = {
            ref: rest for ref, *rest in self._all("SELECT * FROM refs WHERE ref = ANY(%s)", ([r[0] for r in clean],))
        }
        for ref, digest, line in clean:
            if found[ref][0] != digest:
                return ref, found[ref][1], line
        return None

    def planned(self, job: int, how: int, after: int, *, rows: int = LEASE, size: int = 0) -> list[Row]:
        """Lease the next planned rows of a job; [] when all are taken. `after` and `size` are of the other store."""
        found = self._leased(
            "WITH open AS (SELECT id FROM rows WHERE state = 0 AND worker = 0 AND job = %s AND how = %s "
            "ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED), "
            "mine AS (UPDATE rows SET worker = %s FROM open WHERE rows.id = open.id RETURNING rows.*) "
            "SELECT m.id, m.trace, m.sample, m.attempts, m.turn, m.question, q.messages FROM mine m "
            "JOIN questions q ON q.id = m.question ORDER BY m.id",
            (job, how, min(rows, LEASE), self.worker),
        )
        return [Row._make(row) for row in found]

    def spread(self, job: int, how: int, wanted: int) -> list[Row]:
        """Lease `wanted` planned rows, evenly over the job."""
        found = self._all(
            "SELECT id FROM (SELECT id, row_number() OVER (ORDER BY id) AS place, count(*) OVER () AS whole "
            "FROM rows WHERE state = 0 AND worker = 0 AND job = %s AND how = %s) AS r "
            "WHERE (place - 1) * %s / whole != place * %s / whole", (job, how, wanted, wanted),
        )  # fmt: skip
        taken = self._all(
            "WITH mine AS (UPDATE rows SET worker = %s WHERE id = ANY(%s) AND state = 0 AND worker = 0 RETURNING *) "
            "SELECT m.id, m.trace, m.sample, m.attempts, m.turn, m.question, q.messages FROM mine m "
            "JOIN questions q ON q.id = m.question ORDER BY m.id",
            (self.worker, [row for (row,) in found]),
        )
        return [Row._make(row) for row in taken]

    def recover(self, dead: Sequence[int]) -> int:
        """Put what dead workers had sent in doubt, and free what they had leased; the number of rows in doubt."""
        with self.transaction():
            purse = self._lock_purse()
            self.base.execute("UPDATE rows SET worker = 0 WHERE state = 0 AND worker = ANY(%s)", (list(dead),))
            found = self._all(
                "WITH lost AS (SELECT id, reserved, reserved_tokens FROM rows WHERE state = %s AND worker = ANY(%s) "
                "FOR UPDATE) UPDATE rows SET state = 0, worker = 0, doubts = doubts + 1, reserved = 0, "
                "reserved_tokens = 0 FROM lost WHERE rows.id = lost.id RETURNING lost.reserved, lost.reserved_tokens",
                (SENT, list(dead)),
            )
            pico, tokens = sum(row[0] for row in found), sum(row[1] for row in found)
            purse.reserved, purse.doubt = purse.reserved - pico, purse.doubt + pico
            purse.tokens_reserved, purse.tokens_doubt = purse.tokens_reserved - tokens, purse.tokens_doubt + tokens
            purse.in_flight, purse.doubts = purse.in_flight - len(found), purse.doubts + len(found)
            self._write_purse(purse)
        self.purse = purse
        return len(found)

    # ---- the transaction of the journal ----------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> list[int]:
        """Everything in `ops` in one transaction, on disk when this returns; what each claim is answered, in order."""
        claims = [op for op in ops if type(op) is Claim]
        settled = [op for op in ops if type(op) is Settled]
        returned = [op for op in ops if type(op) is Returned]
        with self.transaction():
            self._keep(settled)
            self._give_back(returned)
            purse = self._lock_purse()
            for op in settled:
                purse.settle(op)
            for back in returned:
                purse.settle(back)
            answers, granted = decide(self.budget, purse, claims)
            self._send(granted)
            self._write_purse(purse)
        self.purse = purse
        return answers

    def _keep(self, settled: Sequence[Settled]) -> None:
        done = [answer for op in settled for answer in op.answers]
        if done:
            self.base.execute(
                "INSERT INTO answers(row, finish, tokens_in, tokens_out, pico, date, body) SELECT * FROM "
                "unnest(%s::bigint[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[])",
                in_columns(done, 7),
            )
        back, cut = [row for op in settled for row in op.back], [row for op in settled for row in op.cut]
        for state, rows, kind in ((ANSWERED, [a.row for a in done], None), (0, back, None), (FAILED, cut, CUT)):
            if rows:
                self._mine(rows, self.base.execute(
                    "UPDATE rows SET state = %s, reserved = 0, reserved_tokens = 0, kind = coalesce(%s::text, kind) "
                    "WHERE id = ANY(%s) AND state = %s AND worker = %s", (state, kind, rows, SENT, self.worker),
                ).rowcount)  # fmt: skip

    def _give_back(self, returned: Sequence[Returned]) -> None:
        if not returned:
            return
        rows = [
            (row, FAILED if op.final else 0, int(op.turn), int(op.doubt), op.kind, cleaned(op.told))
            for op in returned for row in op.claim.ids
        ]  # fmt: skip
        self._mine(rows, self.base.execute(
            "UPDATE rows SET state = j.state, turn = rows.turn + j.turn, doubts = rows.doubts + j.doubt, "
            "kind = j.kind, told = j.told, reserved = 0, reserved_tokens = 0 "
            "FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[]) "
            "AS j(id, state, turn, doubt, kind, told) "
            "WHERE rows.id = j.id AND rows.state = %s AND rows.worker = %s", (*in_columns(rows, 6), SENT, self.worker),
        ).rowcount)  # fmt: skip
        words = {op.kind: cleaned(op.told) for op in returned}
        counts = sorted(Counter(op.kind for op in returned).items())  # in one order, so that two workers never deadlock
        self._many(
            "INSERT INTO troubles(kind, count, told) VALUES (%s, %s, %s) ON CONFLICT (kind) DO UPDATE SET "
            "count = troubles.count + excluded.count, told = excluded.told",
            [(kind, count, words[kind]) for kind, count in counts],
        )

    def _send(self, granted: Sequence[Claim]) -> None:
        rows = [(row, *((c.pico, c.tokens) if row == c.ids[0] else (0, 0))) for c in granted for row in c.ids]
        if rows:
            self._mine(rows, self.base.execute(
                "UPDATE rows SET state = %s, attempts = attempts + 1, reserved = j.pico, reserved_tokens = j.tokens "
                "FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[]) AS j(id, pico, tokens) WHERE rows.id = j.id "
                "AND rows.state = 0 AND rows.worker = %s", (SENT, *in_columns(rows, 3), self.worker),
            ).rowcount)  # fmt: skip

    def _mine(self, rows: Sequence[Any], count: int) -> None:
        """A row that another worker took while this one lives: the lock was lost, and nothing more may be written."""
        if count != len(rows):
            raise UserError("another worker took this one for dead and its rows over; run the same command again.")

    # ---- the purse and the counts ----------------------------------------------------------------------------------

    def _lock_purse(self) -> Purse:
        return Purse(*self._one(f"SELECT {', '.join(PURSE)} FROM purse FOR UPDATE"))

    def read_purse(self) -> Purse:
        return Purse(*self._one(f"SELECT {', '.join(PURSE)} FROM purse"))

    def _write_purse(self, purse: Purse) -> None:
        columns = ", ".join(f"{name} = %s" for name in PURSE)
        self._one(f"UPDATE purse SET {columns} RETURNING id", [getattr(purse, name) for name in PURSE])

    def counts(self, job: int | None = None) -> dict[str, int]:
        """Rows by state, of a job or of all."""
        where = "" if job is None else "WHERE job = %s"
        found = dict(
            self._all(f"SELECT state, count(*) FROM rows {where} GROUP BY state", () if job is None else (job,))
        )
        return {name: found.get(state, 0) for state, name in enumerate(STATES)}

    def troubles(self) -> dict[str, tuple[int, str]]:
        """Errors by kind: how many, and the last one's words."""
        rows = self._all("SELECT kind, count, told FROM troubles ORDER BY count DESC, kind")
        return {kind: (count, words) for kind, count, words in rows}

    def costs(self, job: int) -> list[tuple[int, int, int]]:
        """(pico-dollars, tokens out, tokens in) of the answers of a job."""
        return self._all(
            "SELECT a.pico, a.tokens_out, a.tokens_in FROM answers a JOIN rows r ON r.id = a.row WHERE r.job = %s",
            (job,),
        )

    def cut(self, job: int) -> list[tuple[str, str | None, int]]:
        """(messages, problem, how many answers were cut off) of the questions of a job with any."""
        return self._all(
            "SELECT q.messages, q.problem, count(*) FROM answers a JOIN rows r ON r.id = a.row JOIN questions q "
            "ON q.id = r.question WHERE r.job = %s AND a.finish = 'length' GROUP BY q.id ORDER BY q.id",
            (job,),
        )

    def problems(self, questions: Sequence[int]) -> dict[int, str]:
        """The problems (JSON) behind those of `questions` that have one."""
        statement = "SELECT id, problem FROM questions WHERE problem IS NOT NULL AND id = ANY(%s)"
        return dict(self._leased(statement, (list(questions),)))
