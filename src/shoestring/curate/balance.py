"""Keep at most so many traces of a topic, drawn by the hash of their ids: the same ones every time.

A topic is the task behind the question, or "none". Two numbers a topic in memory, and eight bytes a trace.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace

STATELESS = False


def judge(traces: Iterable[Trace], *, most: int = 100_000) -> Iterator[str]:
    """Yield "enough of ..." beyond `most` of a topic. Reads the traces twice; raises UserError."""
    if most < 1:
        raise UserError(f"balance: most is {most}; it must be at least 1.")
    drawn: dict[str, array[int]] = {}
    for trace in traces:
        drawn.setdefault(trace.task or "none", array("Q")).append(_draw(trace))
    limits = {topic: sorted(draws)[most - 1] for topic, draws in drawn.items() if len(draws) > most}
    for trace in traces:
        topic = trace.task or "none"
        yield f"enough of {topic}" if topic in limits and _draw(trace) > limits[topic] else ""


def _draw(trace: Trace) -> int:
    return int.from_bytes(hashlib.blake2b(trace.id.encode(), digest_size=8).digest(), "little")
