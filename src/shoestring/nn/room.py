"""Memory for large tensors that live for a step or less, kept from one step to the next.

glibc gives back to the system what is larger than 32 MB when it is freed, and the system hands it out again 4 KB at a
time: a fifth of the processor time of a step at a vocabulary of 151,936 (LOG.md, entry 20). A room keeps its blocks:
a tensor's block is free again when the tensor is, whoever held it last. Without a room everything is as torch makes it.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import weakref

import numpy as np
import torch
from torch import Tensor

LARGE = 8 << 20  # bytes; less comes from memory that glibc keeps
HUGE = 2 << 20  # bytes of a huge page
WASTE = 1.25  # a block is not taken for less than its size over this


class Room:
    """Blocks of memory, each lent to one tensor at a time."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, waste: float = WASTE) -> Tensor:
        """A tensor on the CPU; what stands in it is anything. `waste`: how many times as large its block may be."""
        count = int(np.prod(shape))
        size = count * dtype.itemsize
        if size < LARGE:
            return torch.empty(shape, dtype=dtype)
        fitting = [i for i, block in enumerate(self._free) if size <= len(block) <= waste * size + HUGE]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        else:  # what is free and too small goes back to the system: else blocks of sizes gone by would gather
            self._free[:] = [block for block in self._free if len(block) >= size]
            block = huge(-(-size // HUGE) * HUGE)
        lent = block.view()
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.frombuffer(lent, dtype=dtype, count=count).view(shape)

    def __len__(self) -> int:
        """Bytes that are free."""
        return sum(map(len, self._free))


def huge(size: int) -> np.ndarray:
    """Bytes that begin at a huge page; untouched, so not yet taken from the system."""
    if not sys.platform.startswith("linux"):
        return np.empty(size, np.uint8)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE
    return whole[start : start + size]


def empty(
    room: Room | None, like: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, by default of its own shape and dtype, in the room if there is one."""
    shape, dtype = tuple(like.shape) if shape is None else shape, dtype or like.dtype
    if room is None or like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    return room.empty(shape, dtype)


def cast(room: Room | None, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`."""
    return tensor if tensor.dtype == dtype else empty(room, tensor, dtype=dtype).copy_(tensor)
