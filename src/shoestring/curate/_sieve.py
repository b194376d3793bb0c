"""Filters one after the other over a list or over a store, where they mark and never delete.

Each filter sees what those before it let through. In a store its reasons are kept under the filter, its options, its
source and everything before it, so that the same chain goes on where it was stopped, does new answers only where a
filter judges each by itself, and another chain lies beside it. Memory is that of the filters.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Problem, Trace
from shoestring.core.registry import load_part, part_hash
from shoestring.data.store import Store
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

    def __init__(self, base: sqlite3.Connection, ids: Sequence[int], after: int = 0) -> None:
        self._base, self._after, self.ids = base, after, list(ids)
        marked = ",".join(map(str, ids))
        self._where = (
            f"AND NOT EXISTS (SELECT 1 FROM marks m WHERE m.row = a.row AND m.filter IN ({marked}))" if ids else ""
        )

    def __iter__(self) -> Iterator[Trace]:
        return (trace for _, trace in self.rows())

    def rows(self) -> Iterator[tuple[int, Trace]]:
        """(row, trace)."""
        return stored(self._base, after=self._after, where=self._where)


def run(
    store: Store, filters: Sequence[Filter], *, grade: bool = True, progress: Callable[[str, int], None] | None = None
) -> tuple[list[Step], View]:
    """Run the chain over `store`; what each filter did, and a view of what is left. Raises UserError."""
    modules = [one.load() for one in filters]
    if grade:
        grade_all(store, progress)
    ids: list[int] = []
    chain = ""
    steps = []
    for one, module in zip(filters, modules, strict=True):
        chain = _digest([chain, one.name, part_hash("curate", one.name), dict(one.options), _data_of(one)])
        number = _number(store, one.name, chain)
        _mark(store, module, one, number, ids, progress)
        steps.append(_step(store, one, number, ids))
        ids.append(number)
    return steps, View(store.base, ids)


def grade_all(store: Store, progress: Callable[[str, int], None] | None = None) -> int:
    """Grade every answer whose question brought a problem and that has no verdict yet; how many."""
    select = (
        "SELECT a.row, q.problem, json_extract(a.body, '$.answer') FROM answers a JOIN rows r ON r.id = a.row "
        "JOIN questions q ON q.id = r.question WHERE a.correct IS NULL AND q.problem IS NOT NULL AND a.row > ? "
        "ORDER BY a.row LIMIT ?"
    )
    done = after = 0
    with Grader() as grader:
        while rows := store.base.execute(select, (after, GRADED_TOGETHER)).fetchall():
            pairs = [(Problem(**json.loads(problem)), answer) for _, problem, answer in rows]
            verdicts = grader(pairs)
            with store.transaction():
                store.base.executemany(
                    "UPDATE answers SET correct = ? WHERE row = ?",
                    [(int(verdict), row) for (row, _, _), verdict in zip(rows, verdicts, strict=True)],
                )
            after = rows[-1][0]
            done += len(rows)
            if progress:
                progress("grading", done)
    return done


def _mark(
    store: Store, module: ModuleType, one: Filter, number: int, before: Sequence[int],
    progress: Callable[[str, int], None] | None,
) -> None:  # fmt: skip
    """Bring the marks of filter `number` up to the last answer."""
    (upto,) = store.base.execute("SELECT upto FROM filters WHERE id = ?", (number,)).fetchone()
    (last,) = store.base.execute("SELECT coalesce(max(row), 0) FROM answers").fetchone()
    if upto >= last:
        return
    if not module.STATELESS:
        upto = 0
        with store.transaction():
            store.base.execute("UPDATE filters SET upto = 0 WHERE id = ?", (number,))
            store.base.execute("DELETE FROM marks WHERE filter = ?", (number,))
    view = View(store.base, before, upto)
    judged = zip((row for row, _ in view.rows()), module.judge(view, **one.options), strict=False)
    seen = 0
    while chunk := list(islice(judged, CHUNK)):
        seen += len(chunk)
        marks = [(number, row, why) for row, why in chunk if why]
        with store.transaction():
            store.base.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", marks)
            if module.STATELESS:  # a filter that looks at all of them begins anew when it is stopped
                store.base.execute("UPDATE filters SET upto = ? WHERE id = ?", (chunk[-1][0], number))
        if progress:
            progress(one.name, seen)
    store.base.execute("UPDATE filters SET upto = ? WHERE id = ?", (last, number))


def _step(store: Store, one: Filter, number: int, before: Sequence[int]) -> Step:
    counts = Counter[str]()
    samples: dict[str, list[Trace]] = {}
    for why, count in store.base.execute("SELECT why, count(*) FROM marks WHERE filter = ? GROUP BY why", (number,)):
        counts[why] = count
        first = store.base.execute(
            "SELECT row FROM marks WHERE filter = ? AND why = ? ORDER BY row LIMIT ?", (number, why, SHOWN)
        ).fetchall()
        chosen = ",".join(str(row) for (row,) in first)
        samples[why] = [trace for _, trace in stored(store.base, where=f"AND a.row IN ({chosen})")]
    (answers,) = store.base.execute("SELECT count(*) FROM answers").fetchone()
    earlier = 0
    if before:
        marked = ",".join(map(str, before))
        (earlier,) = store.base.execute(f"SELECT count(*) FROM marks WHERE filter IN ({marked})").fetchone()
    return Step(one.name, one.options, answers - earlier, counts, samples)


def _number(store: Store, name: str, chain: str) -> int:
    found = store.base.execute("SELECT id FROM filters WHERE hash = ?", (chain,)).fetchone()
    if found is None:
        store.base.execute("INSERT INTO filters(name, hash, upto) VALUES (?, ?, 0)", (name, chain))
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
