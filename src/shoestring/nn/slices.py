"""Products with a large table some of its rows at a time, so that neither its copy in bf16 nor a chunk's logits exist.

A table beyond LARGE is read twice for each chunk of tokens: once for what a row needs of all its logits (the largest,
the sum of their exponentials), once for the gradients. Logits of a slice live in a core's cache. Those that fit are
kept from one reading to the next, of the first chunk in the memory of the table's gradient; the others are made twice.
In exchange the gradient is written once for each chunk of up to ROWS tokens (LOG.md, entry 25). The twins are
`head_rows.NativeRows` and the chunks of `losses/_fused.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoestring.nn import elements, multiply
from shoestring.nn.head_rows import BentRows, NativeRows, Rows, accurate, add_outer
from shoestring.nn.room import Room, empty

LARGE = 1 << 24  # numbers of a table; below, a copy and a chunk of logits are small beside all else
SLICE = 2048  # rows of the table at a time; a multiple of the strips of csrc/
ROWS = 512  # tokens of a chunk at most: 2 MB of logits for each side
KEPT = 0.5  # bytes of logits kept of later chunks over those of the table in fp32


def worth_it(native: bool, hidden_ND: Tensor, table_VD: Tensor) -> bool:
    """Whether native functions were chosen and fit, and the table is large."""
    return table_VD.numel() >= LARGE and elements.usable(native, hidden_ND)


def parts(N: int, most: int = ROWS) -> list[slice]:
    """Even parts of N rows."""
    count = -(-N // most)
    return [slice(N * i // count, N * (i + 1) // count) for i in range(count)]


def cuts(vocab: int) -> list[slice]:
    """The slices of a table."""
    return [slice(start, min(start + SLICE, vocab)) for start in range(0, vocab, SLICE)]


class Memory:
    """Logits that are kept between the two readings, and those that are not.

    Those of the first part of the tokens lie in the table's gradient, which is not there yet: slice i a place behind
    the rows that are written before slice i + 1 is read again. The later parts have memory of their own.
    """

    def __init__(
        self, hidden_ND: Tensor, table_VD: Tensor, sides: int, grad_VD: Tensor | None, room: Room | None
    ):  # fmt: skip
        self._sides, self._slices = sides, len(cuts(len(table_VD)))
        self._per = max((part.stop - part.start for part in parts(len(hidden_ND))), default=0) * SLICE
        self._passing = torch.empty(sides, self._per, dtype=hidden_ND.dtype)
        self._grad = None if grad_VD is None else grad_VD.view(-1).view(hidden_ND.dtype)
        self._row, self._room, self._like = table_VD.shape[1] * 4 // hidden_ND.element_size(), room, hidden_ND
        spare = int(KEPT * self._row * len(table_VD)) // max(1, self._per)
        self._count = min(spare, sides * self._slices) if grad_VD is not None else 0
        self._spare: Tensor | None = None

    def kept(self, rows: slice, side: int, i: int) -> Tensor | None:
        """Where slice i of a side (0: whose logits are kept first) lies for a part of the tokens; None: not kept."""
        if self._grad is None:
            return None
        if rows.start == 0:
            together = self._sides if self._sides * self._per <= SLICE * self._row else 1
            stride = max(together * self._per, SLICE * self._row)
            at = (i + 1) * stride + side * self._per
            return self._grad[at : at + self._per] if side < together and at + self._per <= len(self._grad) else None
        if self._spare is None:
            self._spare = empty(self._room, self._like, (self._count, self._per))
        at = i + side * self._slices
        return self._spare[at] if at < self._count else None

    def passing(self, side: int) -> Tensor:
        """Where logits of a side lie until the next."""
        return self._passing[side]


class Side:
    """Some tokens' hidden states [n, D] against a table; `which`: of the memory's sides."""

    def __init__(self, hidden_nD: Tensor, table_VD: Tensor, memory: Memory, rows: slice, which: int = 0):
        self.hidden_nD, self.table_VD, self._memory, self._rows, self._which = hidden_nD, table_VD, memory, rows, which

    def logits(self, i: int, cut: slice, again: bool = False) -> Tensor:
        """[n, slice] of slice i; the same memory may serve the next. `again`: it was asked for before."""
        kept = self._memory.kept(self._rows, self._which, i)
        width, n = cut.stop - cut.start, len(self.hidden_nD)
        z_nv = (self._memory.passing(self._which) if kept is None else kept)[: n * width].view(n, width)
        return z_nv if again and kept is not None else product(self.hidden_nD, self.table_VD[cut], z_nv)


def product(x_nD: Tensor, table_vD: Tensor, out_nv: Tensor) -> Tensor:
    """Logits, in the dtype of x."""
    if multiply.usable(True, x_nD, (table_vD,)):
        return multiply.forward(x_nD, (table_vD,), out_nv)
    return torch.mm(x_nD, table_vD.to(x_nD.dtype).t(), out=out_nv)


def add_back(dz_nv: Tensor, table_vD: Tensor, into_nD: Tensor) -> None:
    """Add dz U to fp32 (or fp64)."""
    if multiply.usable(True, dz_nv, (table_vD,)):
        into_nD += multiply.inputs(dz_nv, (table_vD,))
    else:
        into_nD += torch.mm(dz_nv, table_vD.to(dz_nv.dtype))


class SlicedRows(Rows):
    """`Rows` whose slopes are not there: `slopes` gives what is known of each row, `add_gradients` makes them."""

    native = True

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, room: Room | None
    ):  # fmt: skip
        self.hidden_ND, self.ids_N, self.temperature = hidden_ND, ids_N.contiguous(), temperature
        self.table_VD = weight_VD.contiguous()
        self.slices, self.cuts = parts(len(hidden_ND)), cuts(len(weight_VD))
        self._room, self._memory = room, Memory(hidden_ND, weight_VD, 1, None, room)

    def into(self, grad_VD: Tensor | None) -> None:
        self._memory = Memory(self.hidden_ND, self.table_VD, 1, grad_VD, self._room)

    def _side(self, rows: slice) -> Side:
        return Side(self.hidden_ND[rows].contiguous(), self.table_VD, self._memory, rows)

    def _call(self, name: str, z_nv: Tensor, rows: slice, first: int, seen_n4: Tensor) -> None:
        n, v = z_nv.shape
        elements.call(name, z_nv.dtype, z_nv, self.ids_N[rows], self.temperature, n, v, first, seen_n4)

    def slopes_and_entropy(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        side = self._side(rows)
        seen_n4 = torch.tensor([-math.inf, 0.0, 0.0, 0.0], dtype=torch.float64).repeat(len(side.hidden_nD), 1)
        for i, cut in enumerate(self.cuts):
            self._call("logits_read", side.logits(i, cut), rows, cut.start, seen_n4)
        top_n, sum_n, dot_n, target_n = seen_n4.unbind(1)
        log_n = sum_n.log()
        return seen_n4, (target_n - top_n - log_n).float(), (log_n - dot_n / sum_n).float()

    def slopes(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.slopes_and_entropy(rows)[:2]

    def logprobs(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.slopes_and_entropy(rows)[1:]

    def add_gradients(
        self, slope_nV: Tensor, factor_n: Tensor, rows: slice, grad_ND: Tensor | None, grad_VD: Tensor | None
    ) -> None:
        side, factor_n1 = self._side(rows), factor_n[:, None]
        scaled_nD = (side.hidden_nD * factor_n1).to(side.hidden_nD.dtype)
        back_nD = torch.zeros(scaled_nD.shape, dtype=accurate(scaled_nD.dtype))
        for i, cut in enumerate(self.cuts):
            z_nv = side.logits(i, cut, again=True)
            self._call("logits_slope", z_nv, rows, cut.start, slope_nV)
            if grad_ND is not None:
                add_back(z_nv, self.table_VD[cut], back_nD)
            if grad_VD is not None:
                add_outer(grad_VD[cut], z_nv, scaled_nD, first=rows.start == 0, native=True)
        if grad_ND is not None:
            grad_ND[rows] = back_nD.mul_(factor_n1)


def rows_of(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, native: bool,
    room: Room | None, softcap: float,
) -> Rows:  # fmt: skip
    """The rows for these inputs: in C where that can be had and there is no softcap."""
    if softcap:
        return BentRows(hidden_ND, weight_VD, ids_N, temperature, chunk, room, softcap)
    if worth_it(native, hidden_ND, weight_VD):
        return SlicedRows(hidden_ND, weight_VD, ids_N, temperature, room)
    way = NativeRows if elements.usable(native, hidden_ND) else Rows
    return way(hidden_ND, weight_VD, ids_N, temperature, chunk, room)
