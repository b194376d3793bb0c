"""Keep questions of a band of difficulty: the share of their graded answers that are right.

lowest and highest bound that share, both included: 0.1 to 0.9 leaves out what the teacher never or nearly always
solves, where a student learns least (open-r1 and EasyDistill keep such bands). Put it before filters that drop wrong
answers, or every share is 1. A question without graded answers stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._keys import question_key

STATELESS = False


def judge(traces: Iterable[Trace], *, lowest: float = 0.0, highest: float = 1.0) -> Iterator[str]:
    """Yield "too hard" or "too easy". Reads the traces twice; raises UserError."""
    if not 0 <= lowest <= highest <= 1:
        raise UserError(f"difficulty: {lowest} to {highest} is no band; give 0 <= lowest <= highest <= 1.")
    right: dict[bytes, list[int]] = {}
    for trace in traces:
        if trace.correct is not None:
            counts = right.setdefault(question_key(trace), [0, 0])
            counts[0] += trace.correct
            counts[1] += 1
    for trace in traces:
        passed, whole = right.get(question_key(trace), (0, 0))
        if not whole or lowest <= passed / whole <= highest:
            yield ""
        else:
            yield "too hard" if passed / whole < lowest else "too easy"
