"""Questions to ask and answers that came: one transaction at a time, so that a kill at any moment loses nothing.

A row is *sent* before its request leaves, and what it may cost at worst is reserved in the same transaction. What a
dead process left as sent is *in doubt*: perhaps billed. Its worst case stays counted, and it is asked again.
Left out: deletion.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoestring.data.claims import (
    CUT,
    PURSE,
    Budget,
    Claim,
    Op,
    Planned,
    Purse,
    Returned,
    Row,
    Settled,
    decide,
)  # fmt: skip
from shoestring.data.schema import ANSWERED, FAILED, FILE, SENT, STATES, Sql, file_of, open_file, told

LARGEST = 2**63 - 1
ANSWERS_A_STATEMENT = 32


_WRITE_PURSE = f"UPDATE purse SET {', '.join(f'{name} = ?' for name in PURSE)}"


class Store:
    """A connection to the store at `path`; one for each thread. `worker` marks the rows this process has sent.

    share: other processes write too, so that every transaction reads the purse and checks the rows it claims.
    """

    def __init__(self, path: str | Path, *, create: bool = False, worker: int = 0, share: bool = False) -> None:
        self.file = file_of(path)
        self.base = open_file(self.file, create=create)
        self.sql: Sql = _Sql(self.base, self.file)
        self.ballast = Path(f"{self.file}.ballast")  # where the journal keeps space aside
        self.worker, self.share = worker, share
        self.budget = Budget()
        self.purse = self.read_purse()

    @property
    def title(self) -> str:
        return self.file.resolve().parent.name if self.file.name == FILE else self.file.stem

    def close(self) -> None:
        self.base.close()

    # ---- planning ------------------------------------------------------------------------------------------------

    def how(self, digest: str, values: dict[str, Any]) -> int:
        """The number of a way of asking."""
        self.base.execute("INSERT OR IGNORE INTO hows(hash, fields) VALUES (?, ?)", (digest, json.dumps(values)))
        return int(self.base.execute("SELECT id FROM hows WHERE hash = ?", (digest,)).fetchone()[0])

    def job(self, signature: str) -> int:
        """The number of a job: the same command again goes on with the same rows."""
        self.base.execute("INSERT OR IGNORE INTO jobs(signature) VALUES (?)", (signature,))
        return int(self.base.execute("SELECT id FROM jobs WHERE signature = ?", (signature,)).fetchone()[0])

    def plan(self, planned: Sequence[Planned], how: int, job: int) -> None:
        """Make what is not there yet part of `job`; rows that have their answer stay as they are."""
        add = self.base.executemany
        with self.transaction():
            add(
                "INSERT INTO questions(hash, messages, ref, problem) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (hash) DO UPDATE SET ref = coalesce(ref, excluded.ref), "
                "problem = coalesce(problem, excluded.problem) "
                "WHERE (problem IS NULL AND excluded.problem IS NOT NULL) "
                "OR (ref IS NULL AND excluded.ref IS NOT NULL)",
                [p[:4] for p in planned],
            )
            add(
                "INSERT INTO rows(trace, question, how, sample, job) "
                "SELECT ?, id, ?, ?, ? FROM questions WHERE hash = ? "
                "ON CONFLICT (trace) DO UPDATE SET job = excluded.job, "
                f"how = CASE WHEN rows.state < {ANSWERED} THEN excluded.how ELSE rows.how END "
                f"WHERE rows.job != excluded.job OR (rows.how != excluded.how AND rows.state < {ANSWERED})",
                [(trace, how, i, job, p.hash) for p in planned for i, trace in enumerate(p.traces)],
            )

    def is_planned(self, job: int) -> bool:
        """Whether every question of `job` is in the store."""
        return bool(self.base.execute("SELECT planned FROM jobs WHERE id = ?", (job,)).fetchone()[0])

    def set_planned(self, job: int) -> None:
        """`job` is planned whole; another job's open rows may have become its own, so those are planned anew."""
        self.base.execute("UPDATE jobs SET planned = (id = ?)", (job,))

    def repeat_failed(self, job: int) -> None:
        """Plan the failed rows of `job` again; not those whose answer was cut off, which would be again."""
        self.base.execute(f"UPDATE rows SET state = 0 WHERE job = ? AND state = {FAILED} AND kind IS NOT ?", (job, CUT))

    def check_refs(self, refs: Sequence[tuple[str, int, int]]) -> tuple[str, int, int] | None:
        """Remember (the user's id, question hash, line); the first id given to two questions, with both lines."""
        self.base.execute("CREATE TEMP TABLE IF NOT EXISTS refs(ref TEXT PRIMARY KEY, hash INTEGER, line INTEGER)")
        before = self.base.total_changes
        self.base.executemany("INSERT OR IGNORE INTO refs VALUES (?, ?, ?)", refs)
        if self.base.total_changes - before == len(refs):
            return None
        for ref, digest, line in refs:
            found = self.base.execute("SELECT hash, line FROM refs WHERE ref = ?", (ref,)).fetchone()
            if found[0] != digest:
                return ref, found[1], line
        return None

    def recover(self, dead: Sequence[int] | None) -> int:
        """Put what dead workers (None: all) had sent in doubt and plan it again; the number of such rows."""
        which = "AND worker >= 0" if dead is None else f"AND worker IN ({','.join(map(str, dead)) or 'NULL'})"
        with self.transaction():
            count, pico, tokens = self.base.execute(
                f"SELECT count(*), total(reserved), total(reserved_tokens) FROM rows WHERE state = {SENT} {which}"
            ).fetchone()
            self.base.execute(
                f"UPDATE rows SET state = 0, doubts = doubts + 1, reserved = 0, reserved_tokens = 0 "
                f"WHERE state = {SENT} {which}"
            )
            purse = self.read_purse()
            purse.reserved, purse.doubt = purse.reserved - int(pico), purse.doubt + int(pico)
            purse.tokens_reserved, purse.tokens_doubt = (
                purse.tokens_reserved - int(tokens),
                purse.tokens_doubt + int(tokens),
            )
            purse.in_flight, purse.doubts = purse.in_flight - count, purse.doubts + count
            self._write_purse(purse)
        self.purse = purse
        return int(count)

    def planned(self, job: int, how: int, after: int, *, rows: int = 256, size: int = 1 << 23) -> list[Row]:
        """The next planned rows of a job in the order of planning, at most `size` bytes of them but one."""
        cursor = self.base.execute(
            "SELECT r.id, r.trace, r.sample, r.attempts, r.turn, r.question, q.messages FROM rows r "
            "JOIN questions q ON q.id = r.question "
            "WHERE r.state = 0 AND r.job = ? AND r.how = ? AND r.id > ? ORDER BY r.id LIMIT ?",
            (job, how, after, rows),
        )
        found, taken = [], 0
        for fields_ in cursor:
            row = Row._make(fields_)
            found.append(row)
            text = row.messages
            taken += len(text) if text.isascii() else len(text.encode())
            if taken > size:
                break
        cursor.close()
        return found

    def spread(self, job: int, how: int, wanted: int) -> list[Row]:
        """`wanted` planned rows, evenly over the job."""
        found = self.base.execute(
            "SELECT id FROM (SELECT id, row_number() OVER (ORDER BY id) AS place, count(*) OVER () AS whole "
            "FROM rows WHERE state = 0 AND job = ? AND how = ?) WHERE (place - 1) * ? / whole != place * ? / whole",
            (job, how, wanted, wanted),
        ).fetchall()
        return [row for (first,) in found for row in self.planned(job, how, first - 1, rows=1)]

    # ---- the transaction of the journal ----------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> list[int]:
        """Everything in `ops` in one transaction, on disk when this returns; what each claim is answered, in order.

        What came back is settled first, so that what it frees can be claimed at once.
        """
        claims = [op for op in ops if type(op) is Claim]
        settled = [op for op in ops if type(op) is Settled]
        returned = [op for op in ops if type(op) is Returned]
        with self.transaction():
            purse = self.read_purse() if self.share else replace(self.purse)
            self._settle(settled, purse)
            self._return(returned, purse)
            answers = self._claim(claims, purse)
            self._write_purse(purse)
        self.purse = purse
        return answers

    def _settle(self, settled: Sequence[Settled], purse: Purse) -> None:
        if not settled:
            return
        done = [answer for op in settled for answer in op.answers]
        for start in range(0, len(done), ANSWERS_A_STATEMENT):
            part = done[start : start + ANSWERS_A_STATEMENT]
            marks = ",".join(["(?,?,?,?,?,?,?)"] * len(part))
            self.base.execute(
                f"INSERT INTO answers(row, finish, tokens_in, tokens_out, pico, date, body) VALUES {marks}",
                [value for answer in part for value in answer],
            )
        self._set(ANSWERED, [answer.row for answer in done])
        self._set(0, [row for op in settled for row in op.back])
        if cut := [(CUT, row) for op in settled for row in op.cut]:
            self._set(FAILED, [row for _, row in cut])
            self.base.executemany("UPDATE rows SET kind = ? WHERE id = ?", cut)
        for op in settled:
            purse.settle(op)

    def _return(self, returned: Sequence[Returned], purse: Purse) -> None:
        if not returned:
            return
        for op in returned:
            purse.settle(op)
        rows = [
            [row, FAILED if op.final else 0, op.turn, op.doubt, op.kind, op.told[:500]]
            for op in returned for row in op.claim.ids
        ]  # fmt: skip
        self.base.execute(
            "UPDATE rows SET state = json_extract(j.value, '$[1]'), turn = turn + json_extract(j.value, '$[2]'), "
            "doubts = doubts + json_extract(j.value, '$[3]'), kind = json_extract(j.value, '$[4]'), "
            "told = json_extract(j.value, '$[5]'), reserved = 0, reserved_tokens = 0 "
            "FROM json_each(?) AS j WHERE rows.id = json_extract(j.value, '$[0]')",
            (json.dumps(rows),),
        )
        words = {op.kind: op.told[:500] for op in returned}
        self.base.executemany(
            "INSERT INTO troubles(kind, count, told) VALUES (?, ?, ?) ON CONFLICT (kind) DO UPDATE SET "
            "count = troubles.count + excluded.count, told = excluded.told",
            [(kind, count, words[kind]) for kind, count in Counter(op.kind for op in returned).items()],
        )

    def _claim(self, claims: Sequence[Claim], purse: Purse) -> list[int]:
        answers, granted = decide(self.budget, purse, claims, self._taken(claims) if self.share else ())
        rows = [[row, *((c.pico, c.tokens) if row == c.ids[0] else (0, 0))] for c in granted for row in c.ids]
        if rows:
            self.base.execute(
                f"UPDATE rows SET state = {SENT}, worker = ?, attempts = attempts + 1, "
                "reserved = json_extract(j.value, '$[1]'), reserved_tokens = json_extract(j.value, '$[2]') "
                "FROM json_each(?) AS j WHERE rows.id = json_extract(j.value, '$[0]')",
                (self.worker, json.dumps(rows)),
            )
        return answers

    def _taken(self, claims: Sequence[Claim]) -> set[int]:
        """Rows among `claims` that another process has sent or has the answer of."""
        wanted = json.dumps([row for claim in claims for row in claim.ids])
        found = self.base.execute(
            "SELECT id FROM rows WHERE state != 0 AND id IN (SELECT value FROM json_each(?))", (wanted,)
        )
        return {row for (row,) in found}

    def _set(self, state: int, rows: list[int]) -> None:
        if rows:
            self.base.execute(
                f"UPDATE rows SET state = {state}, reserved = 0, reserved_tokens = 0 "
                "WHERE id IN (SELECT value FROM json_each(?))",
                (json.dumps(rows),),
            )

    # ---- the purse and the counts ----------------------------------------------------------------------------------

    def read_purse(self) -> Purse:
        return Purse(*self.base.execute(f"SELECT {', '.join(PURSE)} FROM purse").fetchone())

    def _write_purse(self, purse: Purse) -> None:
        values = [getattr(purse, name) for name in PURSE]
        if max(values) > LARGEST:
            raise OverflowError("the sums of this store are larger than 9.2 million dollars; begin another store")
        self.base.execute(_WRITE_PURSE, values)

    def counts(self, job: int | None = None) -> dict[str, int]:
        """Rows by state, of a job or of all."""
        found = dict(self.base.execute(
            "SELECT state, count(*) FROM rows WHERE ?1 IS NULL OR job = ?1 GROUP BY state", (job,)
        ).fetchall())  # fmt: skip
        return {name: found.get(state, 0) for state, name in enumerate(STATES)}

    def troubles(self) -> dict[str, tuple[int, str]]:
        """Errors by kind: how many, and the last one's words."""
        rows = self.base.execute("SELECT kind, count, told FROM troubles ORDER BY count DESC")
        return {kind: (count, words) for kind, count, words in rows}

    def costs(self, job: int) -> list[tuple[int, int, int]]:
        """(pico-dollars, tokens out, tokens in) of the answers of a job."""
        return self.base.execute(
            "SELECT a.pico, a.tokens_out, a.tokens_in FROM answers a JOIN rows r ON r.id = a.row WHERE r.job = ?",
            (job,),
        ).fetchall()

    def cut(self, job: int) -> list[tuple[str, str | None, int]]:
        """(messages, problem, how many answers were cut off) of the questions of a job with any."""
        return self.base.execute(
            "SELECT q.messages, q.problem, count(*) FROM answers a JOIN rows r ON r.id = a.row "
            "JOIN questions q ON q.id = r.question WHERE r.job = ? AND a.finish = 'length' GROUP BY q.id ORDER BY q.id",
            (job,),
        ).fetchall()

    def problems(self, questions: Sequence[int]) -> dict[int, str]:
        """The problems (JSON) behind those of `questions` that have one."""
        wanted = json.dumps(list(questions))
        found = self.base.execute(
            "SELECT id, problem FROM questions WHERE problem IS NOT NULL AND id IN (SELECT value FROM json_each(?))",
            (wanted,),
        )
        return dict(found.fetchall())

    @contextmanager
    def planning(self) -> Iterator[None]:
        """While a job is planned; several processes may plan at once, and find each other's rows there."""
        yield

    def transaction(self) -> _Transaction:
        return _Transaction(self.base, self.file)


class _Sql:
    """Statements of a file's database; a full disk, or a broken file, is told in one sentence."""

    __slots__ = ("_base", "_file")

    def __init__(self, base: sqlite3.Connection, file: Path) -> None:
        self._base, self._file = base, file

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> sqlite3.Cursor:
        try:
            return self._base.execute(statement, values)
        except sqlite3.Error as error:
            raise told(error, self._file) from error

    def executemany(self, statement: str, rows: Any, /) -> sqlite3.Cursor:
        try:
            return self._base.executemany(statement, rows)
        except sqlite3.Error as error:
            raise told(error, self._file) from error


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or nothing of it; a full disk is told in one sentence."""

    def __init__(self, base: sqlite3.Connection, file: Path) -> None:
        self._base, self._file = base, file

    def __enter__(self) -> None:
        try:
            self._base.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise told(error, self._file) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._base.execute("COMMIT")
        except sqlite3.Error as failed:
            error = failed
        if error is not None:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise told(error, self._file) from error
