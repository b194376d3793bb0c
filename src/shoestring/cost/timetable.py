"""What each rank of a pipeline does when: the order a schedule prescribes, played with real durations.

`pipeline.bubble` gives the idle time by formula; here the same schedules are played chunk by chunk, each waiting for
what it needs, which draws them and checks the formulas. Orders: GPipe, arXiv 1811.06965; 1F1B and interleaving, arXiv
2104.04473; zero bubble H1, arXiv 2401.10241; DualPipe, arXiv 2412.19437 section 3.2.1 (eight phases a rank, both ends
of the pipeline feeding). ZBV and DualPipeV fold two stages onto a rank and are not played.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoestring.core.errors import UserError


@dataclass(frozen=True, slots=True)
class Chunk:
    """One micro-batch at one stage: kind F forward, B full backward, I gradient of the input, W of the weights.

    `way`: which end of the pipeline it entered at (0 or 1; the virtual stage, when interleaved)."""

    kind: str
    way: int
    micro: int


@dataclass(frozen=True, slots=True)
class Cell:
    """What a rank does from `start` to `end`: one chunk, or a forward and a backward together."""

    rank: int
    start: float
    end: float
    chunks: tuple[Chunk, ...]


Program = list[tuple[Chunk, ...]]


def gpipe(p: int, m: int) -> list[Program]:
    """All forwards, then all backwards."""
    return [[(Chunk(kind, 0, i),) for kind in "FB" for i in range(m)] for _ in range(p)]


def one_f_one_b(p: int, m: int) -> list[Program]:
    """A backward as soon as one can be: rank r starts with p - 1 - r forwards."""
    return [_alternate([Chunk("F", 0, i) for i in range(m)], [Chunk("B", 0, i) for i in range(m)], p - 1 - r)
            for r in range(p)]  # fmt: skip


def interleaved(p: int, m: int, v: int = 2) -> list[Program]:
    """Rank r holds stages r, r + p, ...; micro-batches go in groups of p through one virtual stage after another."""
    if m % p:
        raise UserError(f"the interleaved schedule needs micro-batches in groups of {p} stages; {m} are not.")
    order = [(k // p % v, k // (p * v) * p + k % p) for k in range(m * v)]
    forward = [Chunk("F", stage, micro) for stage, micro in order]
    backward = [Chunk("B", v - 1 - stage, micro) for stage, micro in order]
    return [_alternate(forward, backward, min(m * v, 2 * (p - 1 - r) + (v - 1) * p)) for r in range(p)]


def zero_bubble(p: int, m: int) -> list[Program]:
    """1F1B with the weight gradients put off: rank r is r micro-batches late with them, and catches up at the end."""
    programs = []
    for r in range(p):
        program: Program = []
        for (chunk,) in _alternate(
            [Chunk("F", 0, i) for i in range(m)], [Chunk("I", 0, i) for i in range(m)], p - 1 - r
        ):
            program.append((chunk,))
            if chunk.kind == "I" and chunk.micro >= r:
                program.append((Chunk("W", 0, chunk.micro - r),))
        programs.append(program + [(Chunk("W", 0, i),) for i in range(max(0, m - r), m)])
    return programs


def _alternate(forward: list[Chunk], backward: list[Chunk], ahead: int) -> Program:
    """`ahead` forwards, then one forward and one backward in turn, then the backwards that are left."""
    mixed = forward[:ahead]
    for f, b in zip(forward[ahead:], backward, strict=False):
        mixed += [f, b]
    return [(chunk,) for chunk in mixed + backward[len(forward) - ahead :]]


class _DualRank:
    """One rank's place in DualPipe: what enters at its own end is way 0 for the first half of the ranks."""

    def __init__(self, p: int, m: int, rank: int):
        self.swap = int(rank >= p // 2)
        self.near = min(rank, p - 1 - rank)  # steps from the nearer end
        self.count = {(kind, side): 0 for kind in "FB" for side in (0, 1)}
        self.owed: deque[Chunk] = deque()
        self.program: Program = []

    def chunk(self, kind: str, side: int) -> Chunk:
        key = ("F" if kind == "F" else "B", side)
        self.count[key] += 1
        return Chunk(kind, side ^ self.swap, self.count[key] - 1)

    def forward(self, side: int) -> None:
        self.program.append((self.chunk("F", side),))

    def backward(self, side: int, *, split: bool = False) -> None:
        chunk = self.chunk("I" if split else "B", side)
        if split:
            self.owed.append(Chunk("W", chunk.way, chunk.micro))
        self.program.append((chunk,))

    def together(self, forward: int, backward: int) -> None:
        self.program.append((self.chunk("F", forward), self.chunk("B", backward)))

    def weight(self) -> None:
        self.program.append((self.owed.popleft(),))


def dualpipe(p: int, m: int) -> list[Program]:
    """Both ends feed m/2 micro-batches each; in the middle a forward of one way runs inside a backward of the other."""
    if p % 2 or m % 2 or m < 2 * p:
        raise UserError(f"DualPipe needs even numbers and at least {2 * p} micro-batches for {p} stages; got {m}.")
    return [_dual_program(_DualRank(p, m, rank), p // 2, m // 2 - p) for rank in range(p)]


def _dual_program(rank: _DualRank, half: int, more: int) -> Program:
    far = half - rank.near - 1  # steps from the middle
    for _ in range(2 * far):
        rank.forward(0)
    for _ in range(rank.near + 1):
        rank.forward(0)
        rank.forward(1)
    for _ in range(far):
        rank.backward(1, split=True)
        rank.weight()
        rank.forward(1)
    for i in range(more + rank.near + 1):
        if i == 0 and far == 0:  # in the middle the first pair would wait for itself
            rank.forward(0)
            rank.backward(1)
        else:
            rank.together(0, 1)
        rank.together(1, 0)
    for _ in range(far):
        rank.backward(1)
        rank.together(1, 0)
    split = False
    for i in range(rank.near + 1):
        middle = i == (rank.near + 1) // 2
        split = split or (middle and rank.near % 2 == 1)
        rank.backward(1, split=split)
        split = split or (middle and rank.near % 2 == 0)
        rank.backward(0, split=split)
    for _ in range(far):
        rank.weight()
        rank.backward(0, split=True)
    while rank.owed:
        rank.weight()
    return rank.program


ORDERS: dict[str, Callable[[int, int], list[Program]]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb1p": zero_bubble, "dualpipe": dualpipe,
}  # fmt: skip


def play(schedule: str, p: int, m: int, *, F: float, B: float, W: float, FB: float | None = None) -> list[Cell]:
    """Every rank's cells for one step of m micro-batches over p ranks; F, B, W, FB as in `pipeline.bubble`.

    A chunk starts when its rank is free and what it needs has arrived (sending takes no time). Interleaved, F and B
    are those of a rank, shared by its two virtual stages. Raises UserError for a schedule that is not played.
    """
    if schedule not in ORDERS:
        raise UserError(f'the schedule "{schedule}" is not drawn; drawn are {", ".join(ORDERS)}.')
    parts = 2 if schedule == "interleaved" else 1
    seconds = {"F": F / parts, "B": B / parts, "I": B - W, "W": W}
    programs = [deque(program) for program in ORDERS[schedule](p, m)]
    stages = p * parts
    free, done, cells = [0.0] * p, dict[tuple[str, int, int, int], float](), list[Cell]()

    def place(rank: int, chunk: Chunk) -> int:
        """The stage of a chunk, along its own way."""
        if schedule == "interleaved":
            return chunk.way * p + rank
        return p - 1 - rank if chunk.way else rank

    def way(chunk: Chunk) -> int:
        return 0 if schedule == "interleaved" else chunk.way

    def needs(rank: int, chunk: Chunk) -> Iterator[tuple[str, int, int, int]]:
        stage = place(rank, chunk)
        if chunk.kind == "F" and stage:
            yield ("F", way(chunk), stage - 1, chunk.micro)
        elif chunk.kind in "BI":
            yield ("F", way(chunk), stage, chunk.micro)
            if stage + 1 < stages:
                yield ("B", way(chunk), stage + 1, chunk.micro)

    waiting = True
    while waiting:
        waiting = False
        for rank, program in enumerate(programs):
            while program and all(need in done for chunk in program[0] for need in needs(rank, chunk)):
                chunks = program.popleft()
                start = max([free[rank], *(done[need] for chunk in chunks for need in needs(rank, chunk))])
                together = FB if FB is not None and len(chunks) == 2 else sum(seconds[c.kind] for c in chunks)
                free[rank] = start + together
                for chunk in chunks:
                    if chunk.kind != "W":
                        kind = "F" if chunk.kind == "F" else "B"
                        done[kind, way(chunk), place(rank, chunk), chunk.micro] = free[rank]
                cells.append(Cell(rank, start, free[rank], chunks))
                waiting = True
    assert not any(programs), "the schedule waits for itself"
    return cells


def idle(cells: list[Cell], p: int) -> list[float]:
    """Idle time of each rank until the last one ends."""
    end = max(cell.end for cell in cells)
    busy = [0.0] * p
    for cell in cells:
        busy[cell.rank] += cell.end - cell.start
    return [end - seconds for seconds in busy]
