"""Drop what would teach the test: 13 words in a row of an evaluation set, or nearly one of its questions.

against: files of evaluation questions (.jsonl with question or prompt, or messages; .txt, one a line; .gz too).
Words are compared as they read: accents apart, full-width letters, invisible marks and capitals hide nothing.
Exact: any run of `n` words of question, thinking and answer, across question and answer too, that stands in a question
of the sets (GPT-3 appendix C used 13; fewer find phrases everybody uses). A set's question of fewer than `n` words
counts when a trace's question is equal to it. Fuzzy: the trace's question holds at least `fuzzy` of the runs of 3
words of a set's question: a few words changed, a sentence added. A number changed in a word problem is another problem
to solve and the same one to learn from, so it counts too.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._words import Words, question, runs, said

STATELESS = True
CHUNK = 500
FUZZY_RUN = 3
FEWEST_RUNS = 6  # a shorter question has too few runs for a share of them to mean anything
BITS = 22


def judge(
    traces: Iterable[Trace], *, against: str | Sequence[str] = (), n: int = 13, fuzzy: float = 0.6
) -> Iterator[str]:
    """Yield "in an evaluation set" or "like a question of an evaluation set". Raises UserError."""
    if n < 1 or not 0 < fuzzy <= 1:
        raise UserError(f"decontaminate: n is {n} and fuzzy is {fuzzy}; n must be at least 1, fuzzy above 0 to 1.")
    paths = [against] if isinstance(against, str) else list(against)
    words = Words()
    index = Index(words, [text for path in paths for text in read_questions(Path(path))], n, fuzzy)
    stream = iter(traces)
    while chunk := list(islice(stream, CHUNK)):
        yield from index.judge(chunk)


class Index:
    """The evaluation sets' questions, to look texts up in."""

    def __init__(self, words: Words, questions: Sequence[str], n: int, fuzzy: float) -> None:
        self._words, self._n, self._fuzzy = words, n, fuzzy
        flat, ends = words.of(questions)
        lengths = np.diff(ends)
        self._exact = Set(runs(flat, ends, n)[0])
        self._whole = {flat[a:b].tobytes() for a, b, k in zip(ends, ends[1:], lengths, strict=False) if 0 < k < n}
        small, bounds = runs(flat, ends, FUZZY_RUN)
        self._sizes = np.zeros(len(questions), np.int64)
        self._holders: dict[int, list[int]] = {}
        for which in range(len(questions)):
            distinct = set(small[bounds[which] : bounds[which + 1]].tolist())
            self._sizes[which] = len(distinct)
            if len(distinct) >= FEWEST_RUNS:
                for run in distinct:
                    self._holders.setdefault(run, []).append(which)
        self._small = Set(np.array(list(self._holders), np.uint64))

    def judge(self, traces: Sequence[Trace]) -> Iterator[str]:
        """One reason a trace, "" for none."""
        asked = [question(trace) for trace in traces]
        flat, ends = self._words.of([f"{q}\n{said(trace)}" for q, trace in zip(asked, traces, strict=True)])
        found, bounds = runs(flat, ends, self._n)
        exact = _any(self._exact.holds(found), bounds)
        flat, ends = self._words.of(asked)
        small, bounds = runs(flat, ends, FUZZY_RUN)
        known = self._small.holds(small)
        near = _any(known, bounds)
        for i in range(len(traces)):
            if exact[i] or flat[ends[i] : ends[i + 1]].tobytes() in self._whole:
                yield "in an evaluation set"
            elif near[i] and self._is_near(small[bounds[i] : bounds[i + 1]][known[bounds[i] : bounds[i + 1]]]):
                yield "like a question of an evaluation set"
            else:
                yield ""

    def _is_near(self, shared: NDArray[np.uint64]) -> bool:
        """Whether the known runs of a question are most of one set question's."""
        counts = Counter(which for run in set(shared.tolist()) for which in self._holders[run])
        return any(count >= self._fuzzy * self._sizes[which] for which, count in counts.most_common(8))


class Set:
    """Membership of many hashes at once: a bitmap of their low bits, then a search among the few that pass."""

    def __init__(self, members: NDArray[np.uint64]) -> None:
        self._members = np.unique(members)
        self._bitmap = np.zeros(1 << BITS, bool)
        self._bitmap[self._members & np.uint64((1 << BITS) - 1)] = True

    def holds(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = self._bitmap[hashes & np.uint64((1 << BITS) - 1)]
        maybe = np.flatnonzero(found)
        if len(maybe):
            place = np.searchsorted(self._members, hashes[maybe])
            found[maybe] = self._members[np.minimum(place, len(self._members) - 1)] == hashes[maybe]
        return found


def _any(flags: NDArray[np.bool_], bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether any flag is set between each two bounds."""
    before = np.concatenate([[0], np.cumsum(flags)])
    found: NDArray[np.bool_] = before[bounds[1:]] > before[bounds[:-1]]
    return found


def read_questions(path: Path) -> list[str]:
    """The questions of an evaluation file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"decontaminate: there is no file {path}.")
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")  # noqa: SIM115
    plain = path.name.removesuffix(".gz").endswith(".txt")
    with opened as file:
        found = [line.strip() if plain else _question(path, i, line) for i, line in enumerate(file, 1) if line.strip()]
    if not found:
        raise UserError(f"decontaminate: {path} holds no questions.")
    return found


def _question(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
        for name in ("question", "prompt", "problem", "text", "code"):
            if isinstance(row.get(name), str):
                return str(row[name])
        return str(row["messages"][-1]["content"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"decontaminate: {path} line {number} has no question, prompt or problem.") from error
