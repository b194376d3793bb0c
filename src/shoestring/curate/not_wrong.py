"""Drop answers that the task's grader found wrong; what nobody could grade stays.

For sets in which only some questions have a gold answer. OpenThoughts (arXiv 2506.04178) found no filter of answers
better than keeping all: measure before you drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoestring.core.nouns import Trace

STATELESS = True


def judge(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield "wrong" where the grader said so."""
    for trace in traces:
        yield "wrong" if trace.correct is False else ""
