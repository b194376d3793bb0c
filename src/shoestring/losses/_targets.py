"""What a divergence and the teacher's side of it know of each other: forms, scratch rows, and the contract of targets.

A divergence is a form over rows of logits; the kinds of targets (`_teacher.py`, `_several.py`, `_states.py`) say what
those rows are compared with, and the fused loop (`_fused.py`) brings both together a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from shoestring.nn.room import Room, empty

# form(z, t, buffers) -> value_n. z [n, V] and t [n, V]: student and teacher logits at the temperature, both may be
# overwritten; d value / d z is left in z.
Form = Callable[[Tensor, Tensor, "Buffers"], Tensor]
# What `open` gives: (rows of the chunk, their student logits, form) -> values, gradient in place of the logits.
Opened = Callable[[slice, Tensor, Form], Tensor]


class Buffers:
    """Scratch rows, made once and used for every chunk: allocating them anew costs more than computing in them."""

    def __init__(self, room: Room | None = None) -> None:
        self.room = room
        self._made: dict[tuple[str, torch.dtype], Tensor] = {}
        self._once: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made for the first chunk and kept for the others."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def get(self, name: str, like: Tensor, columns: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer [n, columns] for the n rows of `like` (its own columns and dtype when not given)."""
        n, columns, dtype = like.shape[0], columns or like.shape[1], dtype or like.dtype
        kept = self._made.get((name, dtype))
        if kept is None or kept.shape[0] < n or kept.shape[1] != columns:
            kept = self._made[name, dtype] = empty(self.room, like, (n, columns), dtype)
        return kept[:n]


class Targets(Protocol):
    """The teacher's side of a divergence, aligned with N student positions."""

    def __len__(self) -> int: ...
    def index_select(self, rows_N: Tensor) -> Targets:
        """The targets of some positions."""
        ...

    def to(self, device: torch.device) -> Targets: ...
    def width(self, vocab: int) -> int:
        """Rows of the widest logits that exist for a chunk."""
        ...

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        """The chunk's side of the teacher, ready for blocks of its rows."""
        ...

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        """The values [N] with everything materialised: the plain twin. `value` takes (log p, log q)."""
        ...
