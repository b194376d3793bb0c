"""Drop exact repeats: the same question with the same thinking and answer, whoever gave it and when.

The first one stays. Near repeats (other wording, other numbers) are `near_duplicates`'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

from shoestring.core.nouns import Trace

STATELESS = False


def judge(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield "repeat" for all but the first of each set of equal traces."""
    seen: set[bytes] = set()
    for trace in traces:
        said = json.dumps([trace.messages, trace.thinking, trace.answer], sort_keys=True)
        digest = hashlib.blake2b(said.encode(), digest_size=16).digest()
        yield "repeat" if digest in seen else ""
        seen.add(digest)
