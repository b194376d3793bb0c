"""Which block of the cache belongs to whom: reference counts, and prefixes that are found again.

A block holds `size` consecutive positions of a sequence. Full blocks are named by a chain of hashes,

    h_i = H(h_{i-1}, tokens of block i),   h_{-1} = H(salt)

so that a name stands for a whole prefix (the scheme of vLLM's prefix cache). A freed block keeps its name until its
memory is needed: first blocks without a name are taken, lowest number first, then the least recently freed named
one. A sequence frees its last block first, so that of a prefix the tail goes before the head. A block that more than
one sequence uses is never written: full blocks are shared, a partly filled one is copied.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

SEED = b"shoestring"


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the prefix that ends with these tokens."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def root(salt: str) -> bytes:
    """What the first block's name is chained to; requests of different salts share nothing."""
    return hashlib.blake2b(SEED + salt.encode(), digest_size=16).digest()


class BlockManager:
    """`count` blocks of `size` positions. `take`, `share` and `release` keep free + used = count."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.refs = [0] * count
        self._name: list[bytes | None] = [None] * count
        self._tokens: list[tuple[int, ...]] = [()] * count
        self._block: dict[bytes, int] = {}  # by name
        self._blank = list(range(count))  # a heap
        self._kept: OrderedDict[int, None] = OrderedDict()  # free but named, the first to go first

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        return self.count - self.free

    def take(self) -> int:
        """A free block for one user. Raises IndexError when there is none: the scheduler looks at `free` first."""
        if self._blank:
            block = heapq.heappop(self._blank)
        else:
            if not self._kept:
                raise IndexError("no free block")
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block that is in use, or that is free and still named."""
        if self.refs[block] == 0:
            del self._kept[block]
        self.refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One user less for each, given in the order of the sequence."""
        for block in reversed(list(blocks)):
            self.refs[block] -= 1
            if self.refs[block] > 0:
                continue
            if self._name[block] is None:
                heapq.heappush(self._blank, block)
            else:
                self._kept[block] = None

    def name(self, block: int, name: bytes, tokens: Sequence[int]) -> None:
        """The block is full: later prompts may find it. The first block of a name keeps it."""
        if name not in self._block:
            self._block[name] = block
            self._name[block], self._tokens[block] = name, tuple(tokens)

    def find(self, names: Iterable[bytes], ids: Sequence[int]) -> list[int]:
        """The longest run of known blocks that hold the beginning of `ids`. The caller shares them."""
        found: list[int] = []
        for index, name in enumerate(names):
            block = self._block.get(name)
            if block is None or self._tokens[block] != tuple(ids[index * self.size : (index + 1) * self.size]):
                break
            found.append(block)
        return found

    def forget_all(self) -> None:
        """No prefix is found any more (the weights changed); users keep their blocks."""
        for block in [block for block, name in enumerate(self._name) if name is not None]:
            self._forget(block)
        for block in self._kept:
            heapq.heappush(self._blank, block)
        self._kept.clear()

    def _forget(self, block: int) -> None:
        name = self._name[block]
        if name is not None:
            del self._block[name]
            self._name[block], self._tokens[block] = None, ()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the counts are those of the block tables given: none leaked, none used twice."""
        users = [0] * self.count
        for table in tables:
            assert len(set(table)) == len(table), "a block twice in one table"
            for block in table:
                users[block] += 1
        assert users == self.refs, "reference counts differ from the tables"
        free = [*self._blank, *self._kept]
        assert sorted(free) == [block for block, n in enumerate(users) if n == 0], "free list differs from the tables"
        assert all(self._name[block] is None for block in self._blank)
        named = {name: block for block, name in enumerate(self._name) if name is not None}
        assert named == self._block
