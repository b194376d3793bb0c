"""Keep answers that the task's grader verified and that were not cut off.

Rejection sampling as in R1 (arXiv 2501.12948) section 2.3.3. An ungraded trace (`correct` None) is not verified and
is dropped; so is a correct answer that hit the length limit, since it would teach never to end.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoestring.core.nouns import Trace


def keep(traces: Sequence[Trace]) -> list[Trace]:
    """The verified, finished ones, in order."""
    return [trace for trace in traces if trace.correct is True and trace.finish_reason == "stop"]
