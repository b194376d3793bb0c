"""The order in which each rank of a pipeline does its chunks, for every schedule.

Sources: GPipe, arXiv 1811.06965; 1F1B and interleaving, arXiv 2104.04473; zero bubble H1 and ZBV, arXiv 2401.10241;
DualPipe, arXiv 2412.19437 section 3.2.1 (eight phases a rank, both ends of the pipeline feeding) and DualPipeV
(deepseek-ai/DualPipe: the same folded, so that a rank holds two stages and one end feeds). `shoestring.cost.timetable`
plays them with real durations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from shoestring.core.errors import UserError


class Chunk(NamedTuple):
    """One micro-batch at one stage: kind F forward, B full backward, I gradient of the input, W of the weights.

    `way`: DualPipe: the end of the pipeline it entered at; otherwise which of the rank's stages, 0 first."""

    kind: str
    way: int
    micro: int


Program = list[tuple[Chunk, ...]]  # what one rank does, in order: one chunk, or a forward and a backward together


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
    return [_alternate(forward, backward, 2 * (p - 1 - r) + (v - 1) * p) for r in range(p)]


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
    ahead = min(ahead, len(forward))
    mixed = forward[:ahead]
    for f, b in zip(forward[ahead:], backward, strict=False):
        mixed += [f, b]
    return [(chunk,) for chunk in mixed + backward[len(forward) - ahead :]]


class _Rank:
    """A rank that fills in its program; chunks of one kind and side are counted up."""

    def __init__(self, swap: int = 0):
        self.swap = swap
        self.count = {(kind, side): 0 for kind in "FB" for side in (0, 1)}
        self.owed: deque[Chunk] = deque()  # weight gradients put off
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

    def weight(self, side: int | None = None) -> None:
        """The longest-owed weight gradient, or that of one side."""
        chunk = next(c for c in self.owed if side is None or c.way == side ^ self.swap)
        self.owed.remove(chunk)
        self.program.append((chunk,))


def dualpipe(p: int, m: int) -> list[Program]:
    """Both ends feed m/2 micro-batches each; in the middle a forward of one way runs inside a backward of the other."""
    if p % 2 or m % 2 or m < 2 * p:
        raise UserError(f"DualPipe needs even numbers and at least {2 * p} micro-batches for {p} stages; got {m}.")
    half = p // 2
    return [_dual_program(_Rank(int(r >= half)), min(r, p - 1 - r), half, m // 2 - p) for r in range(p)]


def dualpipev(p: int, m: int) -> list[Program]:
    """DualPipe folded: rank r holds the stages r and 2p - 1 - r, all m micro-batches enter at rank 0."""
    if m < 2 * p:
        raise UserError(f"DualPipeV needs at least {2 * p} micro-batches for {p} ranks; got {m}.")
    return [_dual_program(_Rank(), r, p, m - 2 * p) for r in range(p)]


def _dual_program(rank: _Rank, near: int, half: int, more: int) -> Program:
    """`near`: steps from the nearer end, of `half` ranks; `more`: micro-batches a way beyond the fewest."""
    far = half - near - 1  # steps from the middle
    for _ in range(2 * far):
        rank.forward(0)
    for _ in range(near + 1):
        rank.forward(0)
        rank.forward(1)
    for _ in range(far):
        rank.backward(1, split=True)
        rank.weight()
        rank.forward(1)
    for i in range(more + near + 1):
        if i == 0 and far == 0:  # in the middle the first pair would wait for itself
            rank.forward(0)
            rank.backward(1)
        else:
            rank.together(0, 1)
        rank.together(1, 0)
    for _ in range(far):
        rank.backward(1)
        rank.together(1, 0)
    _dual_end(rank, near, far)
    return rank.program


def _dual_end(rank: _Rank, near: int, far: int) -> None:
    """The last backwards; from the middle of them on, weight gradients are put off to fill the gaps."""
    split = False
    for i in range(near + 1):
        middle = i == (near + 1) // 2
        split = split or (middle and near % 2 == 1)
        rank.backward(1, split=split)
        split = split or (middle and near % 2 == 0)
        rank.backward(0, split=split)
    for _ in range(far):
        rank.weight()
        rank.backward(0, split=True)
    while rank.owed:
        rank.weight()


def zbv(p: int, m: int) -> list[Program]:
    """Rank r holds the stages r and 2p - 1 - r; every weight gradient at once, but for the last ones of each rank."""
    if m < 2 * p - 1:
        raise UserError(f"ZBV needs at least {2 * p - 1} micro-batches for {p} ranks; got {m}.")
    return [_v_program(_Rank(), r, p, m) for r in range(p)]


def _v_program(rank: _Rank, r: int, p: int, m: int) -> Program:
    def whole_backward(side: int) -> None:
        rank.backward(side, split=True)
        rank.weight()

    for _ in range(2 * (p - r) - 1):
        rank.forward(0)
    for _ in range(r):
        rank.forward(1)
        rank.forward(0)
    for _ in range(p - r):
        rank.forward(1)
        whole_backward(1)
    while rank.count["F", 1] < m:
        if rank.count["F", 0] < m:
            rank.forward(0)
        whole_backward(0)
        rank.forward(1)
        whole_backward(1)
    for side in (0, 1) * r:
        rank.backward(side, split=True)
    for _ in range(p - r):
        rank.backward(0, split=True)
        rank.weight(0)
    for side in (1,) * r + (0,) * r:
        rank.weight(side)
    return rank.program


ORDERS: dict[str, Callable[[int, int], list[Program]]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb1p": zero_bubble, "zbv": zbv,
    "dualpipe": dualpipe, "dualpipev": dualpipev,
}  # fmt: skip
FOLDED = ("zbv", "dualpipev")  # rank r holds stages r and 2p - 1 - r


@lru_cache(maxsize=32)
def programs_of(schedule: str, p: int, m: int, v: int = 1) -> list[Program]:
    """Every rank's program; `v`: stages a rank, interleaved. Raises UserError for too few micro-batches."""
    if schedule not in ORDERS:
        raise UserError(f'the schedule "{schedule}" is not known; known are {", ".join(ORDERS)}.')
    return interleaved(p, m, v) if schedule == "interleaved" else ORDERS[schedule](p, m)


def stages_of(schedule: str, p: int, v: int = 1) -> int:
    """Stages that the layers are cut into: p, or more where a rank holds several."""
    return p * (v if schedule == "interleaved" else 2 if schedule in FOLDED else 1)


def place(schedule: str, p: int, rank: int, way: int) -> tuple[int, int]:
    """(path, stage on it) of a rank's chunks of one way; DualPipe has two paths over the same stages."""
    if schedule == "interleaved":
        return 0, way * p + rank
    if schedule in FOLDED:
        return 0, 2 * p - 1 - rank if way else rank
    if schedule == "dualpipe":
        return way, p - 1 - rank if way else rank
    return 0, rank


def fewest(schedule: str, p: int) -> int:
    """Micro-batches from which on each further one costs the same."""
    return {"interleaved": p, "dualpipe": 2 * p + 2 * (p % 2), "dualpipev": 2 * p, "zbv": 2 * p}.get(schedule, p + 1)
