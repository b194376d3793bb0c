"""Python's search for cycles, out of the way of loops that make many objects and next to no cycles.

The search begins whenever so many more objects have been made than freed (700 by itself). A loop that works in bursts
reaches that in every burst: asking 10,000 questions searched 618 times, a tenth of its processor time (LOG.md, entry
6), and found nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = 20_000  # objects: a few MB at most, should they all be in cycles


@contextmanager
def seldom_searched() -> Iterator[None]:
    """Look for cycles once in SELDOM objects until the end of the block, unless it is rarer, or off, already."""
    before = gc.get_threshold()
    if 0 < before[0] < SELDOM:
        gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
