"""The key-value cache: one contiguous tensor [B, capacity, width] per layer, key index == position.

For MLA the width is kv_lora_rank + qk_rope_head_dim (the normed latent, then the rotated shared key: 576 numbers a
token in V3); for GQA it is 2 · kv_heads · head_dim (keys, then values).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Cache:
    """Rows are sequences. `used` is the number of positions any row has written; later ones are never read."""

    def __init__(self, layers: int, batch: int, capacity: int, width: int, *, dtype: torch.dtype, device: torch.device):
        self.layers = [torch.zeros(batch, capacity, width, dtype=dtype, device=device) for _ in range(layers)]
        self.used = 0

    @property
    def batch(self) -> int:
        return self.layers[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.layers[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    def write(self, layer: int, positions_BT: Tensor | None, new_BTW: Tensor) -> None:
        """Put the new entries where their positions say; None means the next positions, the same in every row."""
        store_BSW = self.layers[layer]
        if positions_BT is None:
            store_BSW[:, self.used : self.used + new_BTW.shape[1]] = new_BTW
        else:
            rows_B1 = torch.arange(self.batch, device=store_BSW.device).unsqueeze(1)
            store_BSW[rows_B1, positions_BT] = new_BTW

    def read(self, layer: int, n_keys: int) -> Tensor:
        return self.layers[layer][:, :n_keys]

    def _over_rows(self, change: Callable[[Tensor], Tensor]) -> Cache:
        other = object.__new__(Cache)
        other.layers = [change(layer) for layer in self.layers]
        other.used = self.used
        return other

    def select(self, rows: Tensor) -> Cache:
        """A new cache that keeps these rows, in this order (finished sequences are dropped)."""
        return self._over_rows(lambda layer: layer.index_select(0, rows))

    def repeat_interleave(self, n: int) -> Cache:
        """Each row n times in a row: one prompt, read once, for a group of n samples."""
        return self._over_rows(lambda layer: layer.repeat_interleave(n, dim=0))
