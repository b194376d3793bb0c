"""When each rank of a pipeline does what: the orders of `shoestring.cost.orders` played with real durations.

`pipeline.bubble` gives the idle time of even stages by formula; here the same schedules are played chunk by chunk,
each waiting for what it needs, with a duration for every stage of its own. That draws them, checks the formulas, and
times pipelines whose stages are uneven. Sending takes no time; the step model adds messages beside it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from shoestring.cost.orders import Chunk, fewest, place, programs_of, stages_of


class StageSeconds(NamedTuple):
    """One micro-batch on one stage: forward, full backward, and the part of the backward that is weight gradients."""

    forward: float
    backward: float
    weight: float


class Cell(NamedTuple):
    """What a rank does from `start` to `end`: one chunk, or a forward and a backward together."""

    rank: int
    start: float
    end: float
    chunks: tuple[Chunk, ...]


KINDS = "FBIW"
Pair = Callable[[int, int], float]  # (stage of the forward, stage of the backward) -> seconds of both together


def play(schedule: str, p: int, m: int, *, F: float, B: float, W: float, FB: float | None = None) -> list[Cell]:
    """Every rank's cells for one step of m micro-batches over p even ranks; F, B, W, FB as in `pipeline.bubble`.

    They are those of a rank: where it holds two stages (interleaved, ZBV, DualPipeV), each takes half.
    """
    v = 2 if schedule == "interleaved" else 1
    stages = stages_of(schedule, p, v)
    parts = stages // p
    each = StageSeconds(F / parts, B / parts, W / parts)
    pair = None if FB is None else lambda forward, backward: FB / parts
    return play_stages(schedule, p, m, [each] * stages, pair, v)


def play_stages(
    schedule: str, p: int, m: int, stages: Sequence[StageSeconds], pair: Pair | None = None, v: int = 1
) -> list[Cell]:
    """Cells of a step whose stages take the given times. A chunk starts when its rank is free and its input is there.

    `pair` prices a forward and a backward run together (their sum if it is left out).
    Raises UserError for a schedule that does not exist or too few micro-batches.
    """
    score = _score(schedule, p, m, v)
    took = _took(stages, pair)
    ends = _ends(score, took, p)
    return [Cell(note[0], end - took[note[1]], end, chunks)
            for note, chunks, end in zip(score.notes, score.chunks, ends, strict=True)]  # fmt: skip


Note = tuple[int, int, int, int, int, int, int]  # rank, duration, two places to write the end, three to wait for


class _Score(NamedTuple):
    """All cells of a schedule in an order in which each comes after what it needs: that order holds for any durations.

    Durations are numbered: kind x stage for one chunk (kinds F, B, I, W), after them forward x backward stage for two.
    """

    notes: tuple[Note, ...]
    chunks: tuple[tuple[Chunk, ...], ...]
    places: int  # ends that are written down; place 0 is always there, place 1 is read by nobody
    uses: dict[int, int]  # how often each duration occurs


@lru_cache(maxsize=64)
def _score(schedule: str, p: int, m: int, v: int) -> _Score:
    count = stages_of(schedule, p, v)
    where = [[place(schedule, p, rank, way) for way in range(max(2, v))] for rank in range(p)]
    backwards = 2 * count * m  # ends of forwards stand from place 2 on, by path, stage and micro-batch, then backwards

    def one(path: int, stage: int, chunk: Chunk) -> tuple[int, int, int]:
        """Where the end of a chunk is written down, and the two it waits for."""
        forward = 2 + (path * count + stage) * m + chunk.micro
        if chunk.kind == "F":
            return forward, forward - m if stage else 0, 0
        if chunk.kind == "W":
            return 1, 0, 0
        return forward + backwards, forward, forward + backwards + m if stage + 1 < count else 0

    def note(rank: int, chunks: tuple[Chunk, ...]) -> Note:
        path, stage = where[rank][chunks[0].way]
        end, a, b = one(path, stage, chunks[0])
        if len(chunks) == 1:
            return rank, KINDS.index(chunks[0].kind) * count + stage, end, 1, a, b, 0
        other, after = where[rank][chunks[1].way]
        second, b, c = one(other, after, chunks[1])
        return rank, (4 + stage) * count + after, end, second, a, b, c

    programs = programs_of(schedule, p, m, v)
    waiting = [deque((note(rank, chunks), chunks) for chunks in program) for rank, program in enumerate(programs)]
    known = bytearray(2 + 4 * count * m)
    known[0] = 1
    cells: list[tuple[Note, tuple[Chunk, ...]]] = []
    moved = True
    while moved:
        moved = False
        for queue in waiting:
            while queue and known[(new := queue[0][0])[4]] and known[new[5]] and known[new[6]]:
                known[new[2]] = known[new[3]] = 1
                cells.append(queue.popleft())
                moved = True
    assert not any(waiting), "the schedule waits for itself"
    notes, chunks = zip(*cells, strict=True)
    return _Score(notes, chunks, len(known), dict(Counter(n[1] for n in notes)))


def _took(stages: Sequence[StageSeconds], pair: Pair | None) -> list[float]:
    """Durations by their numbers."""
    one = [[s.forward for s in stages], [s.backward for s in stages],
           [s.backward - s.weight for s in stages], [s.weight for s in stages]]  # fmt: skip
    both = [pair(i, j) if pair else a.forward + b.backward for i, a in enumerate(stages) for j, b in enumerate(stages)]
    return [*chain(*one), *both]


def _ends(score: _Score, took: list[float], p: int) -> list[float]:
    """When each cell ends."""
    ended, free, ends = [0.0] * score.places, [0.0] * p, []
    for rank, number, first, second, a, b, c in score.notes:
        end = max(free[rank], ended[a], ended[b], ended[c]) + took[number]
        free[rank] = ended[first] = ended[second] = end
        ends.append(end)
    return ends


def idle(cells: list[Cell], p: int) -> list[float]:
    """Idle time of each rank until the last one ends."""
    end = max(cell.end for cell in cells)
    busy = [0.0] * p
    for cell in cells:
        busy[cell.rank] += cell.end - cell.start
    return [end - seconds for seconds in busy]


class Span(NamedTuple):
    """Seconds of a step's pipeline: the whole, and busy seconds by kind of cell (F, B, I, W, FB), mean over ranks."""

    seconds: float
    busy: dict[str, float]

    @property
    def idle(self) -> float:
        return self.seconds - sum(self.busy.values())


def span(
    schedule: str, p: int, m: int, stages: Sequence[StageSeconds], pair: Pair | None = None, v: int = 1
) -> Span:  # fmt: skip
    """A whole step. Once the pipeline is full each micro-batch adds what its slowest rank needs (interleaved: what a
    group of p adds), so only the first are played and the rest are added (or, where there are fewer, taken off)."""
    played = fewest(schedule, p)
    score, took = _score(schedule, p, played, v), _took(stages, pair)
    busy: dict[str, float] = {}
    for number, times in score.uses.items():
        kind = KINDS[number // len(stages)] if number < 4 * len(stages) else "FB"
        busy[kind] = busy.get(kind, 0.0) + times * took[number] / p
    seconds = max(_ends(score, took, p))
    more, slowest = m - played, 0.0
    if schedule == "interleaved":
        slowest = (max(_ends(_score(schedule, p, played + p, v), took, p)) - seconds) / p
    for rank in range(p):
        each = _each_micro_batch(schedule, p, rank, stages, pair, v)
        slowest = max(slowest, sum(each.values()))
        for kind, took_each in each.items():
            busy[kind] = busy.get(kind, 0.0) + more * took_each / p
    return Span(seconds + more * slowest, busy)


def _each_micro_batch(
    schedule: str, p: int, rank: int, stages: Sequence[StageSeconds], pair: Pair | None, v: int
) -> dict[str, float]:
    """What a further micro-batch keeps a rank busy with."""
    ways = {"interleaved": v, "zbv": 2, "dualpipev": 2, "dualpipe": 2}.get(schedule, 1)
    mine = [place(schedule, p, rank, way)[1] for way in range(ways)]
    if schedule in ("dualpipe", "dualpipev") and pair:
        both = pair(mine[0], mine[1]) + pair(mine[1], mine[0])
        return {"FB": both / 2 if schedule == "dualpipe" else both}
    part = 0.5 if schedule == "dualpipe" else 1.0  # half of the micro-batches come each way
    F, B, W = (part * sum(getattr(stages[s], name) for s in mine) for name in ("forward", "backward", "weight"))
    if schedule.startswith("zb"):
        return {"F": F, "I": B - W, "W": W}
    return {"FB": F + B} if schedule.startswith("dual") else {"F": F, "B": B}
