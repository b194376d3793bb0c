"""The memory of the cache: for each layer, blocks of keys and values [blocks, G, size, width].

MLA has one shared head of width kv_lora + rope, and its values are the keys: 576 numbers a token a layer for V3.
Ordinary attention has G heads of keys and as many of values. Memory is asked for at once but touched only when a
block is used for the first time (then it is zeroed: what masked positions hold is multiplied by 0, and 0 · NaN is
NaN), so an engine that has answered little holds little.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Store:
    """`keys[layer]`, `values[layer]`: [blocks, G, size, width], the same tensors for MLA."""

    def __init__(
        self, layers: int, blocks: int, size: int, groups: int, width: int, *, latent: bool, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        self.blocks, self.size, self.groups, self.width = blocks, size, groups, width

        def arena() -> Tensor:
            return torch.empty(blocks, groups, size, width, dtype=dtype, device=device)

        self.keys = [arena() for _ in range(layers)]
        self.values = self.keys if latent else [arena() for _ in range(layers)]
        self.ready = 0  # blocks that hold numbers

    @property
    def _arenas(self) -> list[Tensor]:
        return self.keys if self.values is self.keys else [*self.keys, *self.values]

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        return sum(arena[0].numel() * arena.element_size() for arena in self._arenas) // self.size

    def reserve(self, blocks: int) -> None:
        """Make the first so many blocks readable."""
        if blocks > self.ready:
            blocks = min(self.blocks, max(blocks, self.ready + 16))
            for arena in self._arenas:
                arena[self.ready : blocks] = 0
            self.ready = blocks

    def slots(self, block_N: Tensor, offset_N: Tensor) -> Tensor:
        """Where the heads of these positions are in the flat arena, [N·G]."""
        head_G = torch.arange(self.groups, device=block_N.device)
        return ((block_N[:, None] * self.groups + head_G) * self.size + offset_N[:, None]).flatten()

    def write(self, arena: Tensor, slot_M: Tensor, new_NGW: Tensor) -> None:
        arena.view(-1, self.width).index_copy_(0, slot_M, new_NGW.reshape(-1, self.width))

    def read(self, arena: Tensor, blocks: Tensor, count: int) -> Tensor:
        """The first `count` positions of a block table, [G, count, width]; a copy."""
        return arena.index_select(0, blocks).transpose(0, 1).flatten(1, 2)[:, :count]

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in every layer."""
        if not pairs:
            return
        self.reserve(max(to for _, to in pairs) + 1)
        source, target = (torch.tensor(side, device=self.keys[0].device) for side in zip(*pairs, strict=True))
        for arena in self._arenas:
            arena.index_copy_(0, target, arena.index_select(0, source))
