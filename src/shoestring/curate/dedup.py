"""Drop exact repeats: the same question with the same thinking and answer, whoever gave it and when.

The first one stays. Near repeats (other wording, other numbers) are another filter's work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from shoestring.core.nouns import Trace


def keep(traces: Sequence[Trace]) -> list[Trace]:
    """The first of each set of equal traces, in order."""
    seen: set[str] = set()
    kept = []
    for trace in traces:
        said = json.dumps([trace.messages, trace.thinking, trace.answer], sort_keys=True)
        if said not in seen:
            seen.add(said)
            kept.append(trace)
    return kept
