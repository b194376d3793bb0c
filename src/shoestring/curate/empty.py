"""Drop answers that hold nothing: from them a student would learn to end its turn at once.

An answer is empty that has neither text nor thinking and no token but the one that ended it. Answers that were cut off,
or whose tokens are no well-formed answer, stay; `finished` drops those too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoestring.core.nouns import Trace

STATELESS = True


def judge(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield "empty" where nothing was said."""
    for trace in traces:
        yield "" if _says_something(trace) else "empty"


def _says_something(trace: Trace) -> bool:
    if trace.answer.strip() or (trace.thinking or "").strip():
        return True
    ends = trace.finish_reason == "stop"  # its last token is the end
    return len(trace.token_ids or []) > ends
