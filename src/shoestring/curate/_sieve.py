"""Filters one after the other over a list or over a store, where they mark and never delete.

Each filter sees what those before it let through. In a store its reasons are kept under the filter, its options, its
source and everything before it, so that the same chain goes on where it was stopped, does new answers only where a
filter judges each by itself, and another chain lies beside it. Answers that came late, among those judged before, and
verdicts that did, make a filter begin anew. Memory is that of the filters. The store is a file or in PostgreSQL.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Problem, Trace
from shoestring.core.registry import load_part, part_hash
from shoestring.data.places import AnyStore
from shoestring.data.postgres import PgStore
from shoestring.data.schema import Sql
from shoestring.data.traces import stored
from shoestring.tasks.grading import Grader

CHUNK = 5000
GRADED_TOGETHER = 256
SHOWN = 4  # samples a reason, and of what is kept


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> ModuleType:
        """Raises UserError for an unknown name or option."""
        module = load_part("curate", self.name)
        known = getattr(module.judge, "__kwdefaults__", None) or {}
        for option in self.options:
            if option not in known:
                raise UserError(f'filter "{self.name}" has no option "{option}".{did_you_mean(option, known)}')
        return module


@dataclass(slots=True)
class Step:
    """What a filter did: how many it saw and dropped, by reason, and examples of each."""

    name: str
    options: Mapping[str, Any]
    seen: int
    dropped: Counter[str]
    samples: dict[str, list[Trace]]

    def to_json(self) -> dict[str, Any]:
        return {
            "filter": self.name, "options": dict(self.options), "seen": self.seen,
            "kept": self.seen - self.dropped.total(), "dropped": dict(self.dropped),
        }  # fmt: skip


def keep(module: ModuleType, traces: Sequence[Trace], **options: Any) -> list[Trace]:
    """Those of `traces` that the filter `module` lets through, in order."""
    reasons = list(module.judge(traces, **options))
    if len(reasons) != len(traces):
        raise RuntimeError(f"filter {module.__name__} gave {len(reasons)} reasons for {len(traces)} traces")
    return [trace for trace, why in zip(traces, reasons, strict=True) if not why]


class View:
    """The answers of a store behind `after` that no filter of `ids` has dropped; iterable again and again."""

    def __init__(self, sql: Sql, ids: Sequence[int], after: int = 0) -> None:
        self._sql, self._after, self.ids = sql, after, list(ids)
        marked = ",".join(map(str, ids))
        self._where = (
            f"AND NOT EXISTS (SELECT 1 FROM marks m WHERE m.row = a.row AND m.filter IN ({marked}))" if ids else ""
        )

    def __iter__(self) -> Iterator[Trace]:
        return (trace for _, trace in self.rows())

    def rows(self) -> Iterator[tuple[int, Trace]]:
        """(row, trace)."""
        return stored(self._sql, after=self._after, where=self._where)


def run(
    store: AnyStore, filters: Sequence[Filter], *, grade: bool = True,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[list[Step], View]:  # fmt: skip
    """Run the chain over `store`; what each filter did, and a view of what is left. Raises UserError."""
    modules = [one.load() for one in filters]
    _count_anew(store)
    if grade:
        grade_all(store, progress)
    ids: list[int] = []
    chain = ""
    steps = []
    for one, module in zip(filters, modules, strict=True):
        chain = _digest([chain, one.name, part_hash("curate", one.name), dict(one.options), _data_of(one)])
        number = _number(store, one.name, chain)
        _mark(store, module, one, number, ids, progress)
        _count_anew(store)
        steps.append(_step(store, one, number, ids))
        ids.append(number)
    return steps, View(store.sql, ids)


def grade_all(store: AnyStore, progress: Callable[[str, int], None] | None = None) -> int:
    """Grade every answer whose question brought a problem and that has no verdict yet; how many."""
    select = (
        "SELECT a.row, q.problem, CASE WHEN q.problem IS NULL THEN NULL ELSE a.body END FROM "
        "(SELECT row, body FROM answers WHERE correct IS NULL AND row > ? ORDER BY row LIMIT ?) AS a "
        "JOIN rows r ON r.id = a.row JOIN questions q ON q.id = r.question ORDER BY a.row"
    )
    if not store.sql.execute("SELECT 1 FROM questions WHERE problem IS NOT NULL LIMIT 1").fetchone():
        return 0
    done = after = 0
    with Grader() as grader:
        while page := store.sql.execute(select, (after, GRADED_TOGETHER)).fetchall():
            after = page[-1][0]
            if not (rows := [row for row in page if row[1] is not None]):
                continue
            pairs = [(Problem(**json.loads(problem)), json.loads(body)["answer"]) for _, problem, body in rows]
            verdicts = grader(pairs)
            with store.transaction():
                store.sql.executemany(
                    "UPDATE answers SET correct = ? WHERE row = ?",
                    [(int(verdict), row) for (row, _, _), verdict in zip(rows, verdicts, strict=True)],
                )
                _anew(store, "upto >= ?", rows[0][0])  # filters that judged these answers without their verdicts
            done += len(rows)
            if progress:
                progress("grading", done)
    return done


def _anew(store: AnyStore, which: str, value: int) -> None:
    """Forget what filters have judged; inside a transaction."""
    chosen = f"SELECT id FROM filters WHERE {which}"
    store.sql.execute(f"DELETE FROM marks WHERE filter IN ({chosen})", (value,))
    store.sql.execute(f"UPDATE filters SET upto = 0, judged = 0 WHERE {which}", (value,))


def _mark(
    store: AnyStore, module: ModuleType, one: Filter, number: int, before: Sequence[int],
    progress: Callable[[str, int], None] | None,
) -> None:  # fmt: skip
    """Bring the marks of filter `number` up to the last answer."""
    sql, last_and_count = store.sql, "SELECT coalesce(max(row), 0), count(*) FROM answers"
    upto, judged = sql.execute("SELECT upto, judged FROM filters WHERE id = ?", (number,)).fetchone()
    last, whole = sql.execute(last_and_count).fetchone()
    (behind,) = sql.execute("SELECT count(*) FROM answers WHERE row <= ?", (upto,)).fetchone()
    if upto >= last and behind == judged:
        return
    if behind != judged or not module.STATELESS:
        upto = judged = 0
        with store.transaction():
            _anew(store, "id = ?", number)
    stops = _stops(sql, upto, last, judged) if module.STATELESS else deque()  # others begin anew when they are stopped
    view = View(sql, before, upto)
    verdicts = zip((row for row, _ in view.rows()), module.judge(view, **one.options), strict=False)
    seen = 0
    while chunk := list(islice(verdicts, CHUNK)):
        seen += len(chunk)
        with store.transaction():
            sql.executemany(
                "INSERT INTO marks(filter, row, why) VALUES (?, ?, ?) "
                "ON CONFLICT (filter, row) DO UPDATE SET why = excluded.why",
                [(number, row, why) for row, why in chunk if why],
            )
            while stops and stops[0][0] <= chunk[-1][0]:
                sql.execute("UPDATE filters SET upto = ?, judged = ? WHERE id = ?", (*stops.popleft(), number))
        if progress:
            progress(one.name, seen)
    sql.execute("UPDATE filters SET upto = ?, judged = ? WHERE id = ?", (last, whole, number))


def _count_anew(store: AnyStore) -> None:
    """Have PostgreSQL know how large the tables are now: marks taken for few are gone through for every answer."""
    if isinstance(store, PgStore):
        for table in ("questions", "rows", "answers", "marks"):
            store.sql.execute(f"ANALYZE {table}")


def _stops(sql: Sql, upto: int, last: int, judged: int) -> deque[tuple[int, int]]:
    """(row, how many answers lie up to it) every CHUNK answers: where a chain that is stopped goes on. Counted before
    anything is judged, so that an answer that comes meanwhile is missed by the count and never by the filter."""
    numbered = "SELECT row, row_number() OVER (ORDER BY row) AS n FROM answers WHERE row > ? AND row <= ?"
    found = sql.execute(f"SELECT row, n FROM ({numbered}) AS r WHERE n % ? = 0 ORDER BY row", (upto, last, CHUNK))
    return deque((row, judged + n) for row, n in found.fetchall())


def _step(store: AnyStore, one: Filter, number: int, before: Sequence[int]) -> Step:
    counts = Counter[str]()
    samples: dict[str, list[Trace]] = {}
    for why, count in store.sql.execute("SELECT why, count(*) FROM marks WHERE filter = ? GROUP BY why", (number,)):
        counts[why] = count
        first = store.sql.execute(
            "SELECT row FROM marks WHERE filter = ? AND why = ? ORDER BY row LIMIT ?", (number, why, SHOWN)
        ).fetchall()
        chosen = ",".join(str(row) for (row,) in first)
        samples[why] = [trace for _, trace in stored(store.sql, where=f"AND a.row IN ({chosen})")]
    (answers,) = store.sql.execute("SELECT count(*) FROM answers").fetchone()
    earlier = 0
    if before:
        marked = ",".join(map(str, before))
        (earlier,) = store.sql.execute(f"SELECT count(*) FROM marks WHERE filter IN ({marked})").fetchone()
    return Step(one.name, one.options, answers - earlier, counts, samples)


def _number(store: AnyStore, name: str, chain: str) -> int:
    found = store.sql.execute("SELECT id FROM filters WHERE hash = ?", (chain,)).fetchone()
    if found is None:
        store.sql.execute("INSERT INTO filters(name, hash, upto) VALUES (?, ?, 0)", (name, chain))
        return _number(store, name, chain)
    return int(found[0])


def _data_of(one: Filter) -> list[str]:
    """Digests of the files that a filter's options name: another evaluation set is another filter."""
    values: Iterable[Any] = one.options.values()
    names = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    paths = [Path(name) for name in names if isinstance(name, str) and len(name) < 4096 and Path(name).is_file()]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
