"""Drop answers that were cut off, filtered by the provider, or that hold no text outside the thinking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoestring.core.nouns import Trace

STATELESS = True


def judge(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield "" for an answer that ended by itself and says something."""
    for trace in traces:
        if trace.finish_reason != "stop":
            yield "cut off" if trace.finish_reason == "length" else f"finished by {trace.finish_reason}"
        else:
            yield "" if trace.answer.strip() else "no text"
