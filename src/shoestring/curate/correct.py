"""Keep answers that the task's grader verified and that were not cut off.

Rejection sampling as in R1 (arXiv 2501.12948) section 2.3.3. An ungraded trace (`correct` None) is not verified and
is dropped; so is a correct answer that hit the length limit, since it would teach never to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoestring.core.nouns import Trace

STATELESS = True


def judge(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield "" for a verified, finished answer, else why not."""
    for trace in traces:
        if trace.correct is None:
            yield "not verified"
        elif not trace.correct:
            yield "wrong"
        else:
            yield "" if trace.finish_reason == "stop" else "cut off"
