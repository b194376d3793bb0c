"""Tensors in huge pages: what a step reads once and in order costs a walk of the page table every 2 MB, not every 4 KB.

Measured on a virtual machine: products with 4 to 16 rows against weights that lie in no cache are 15 to 25 % faster
(LOG.md, entry 10). Where the system has no huge pages nothing is lost but the copy.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from shoestring.nn.room import HUGE, Room, huge

CHUNK = 4 * HUGE
LARGE = 64 << 20  # bytes; a tensor of that size that needs no other dtype stays where it lies
COLLAPSE = 25  # madvise's MADV_COLLAPSE (Linux 6.1), which the mmap module does not name


def empty(size: int) -> Tensor:
    """`size` bytes that begin at a huge page; untouched, so not yet taken from the system."""
    return torch.from_numpy(huge(size))


def collapse(tensor: Tensor) -> None:
    """Ask for huge pages under memory that is in use; what the system refuses stays as it is."""
    if not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // HUGE) * HUGE
    size = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // HUGE * HUGE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), COLLAPSE)


class Pages:
    """Copies of tensors side by side, each at a line of the cache; in a trainer's `room`, where one is given."""

    def __init__(self, room: Room | None = None) -> None:
        self._room, self._lender = torch.empty(0, dtype=torch.uint8), room

    @staticmethod
    def keeps(tensor: Tensor, dtype: torch.dtype) -> bool:
        """Whether `copy` would leave it where it lies."""
        return tensor.numel() * dtype.itemsize >= LARGE and tensor.dtype == dtype and tensor.is_contiguous()

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous and in this dtype. Large ones that are so already are not copied."""
        if self.keeps(tensor, dtype):
            collapse(tensor)
            return tensor
        return self.take(tensor.shape, dtype).copy_(tensor)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a tensor, not written yet."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._room):
            whole = max(CHUNK, -(-size // HUGE) * HUGE)
            self._room = empty(whole) if self._lender is None else self._lender.empty((whole,), torch.uint8, 4.0)
        made = self._room[:size].view(dtype).view(*shape)
        self._room = self._room[-(-size // 64) * 64 :]
        return made
