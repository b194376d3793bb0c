"""Drop refusals: answers that begin by declining, or that speak of themselves as a language model.

English phrases only, at the start of the answer: a model that quotes a refusal further down is not one. What an
aligned teacher refuses teaches the student to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from shoestring.core.nouns import Trace

STATELESS = True
START = 200  # characters
REFUSAL = re.compile(
    r"\b(i(?:'|’)?m sorry,? (?:but )?(?:i )?(?:can(?:no|')?t|am unable|can’t)|"
    r"i (?:can(?:no|')t|can’t|cannot|won(?:'|’)t|am unable to|am not able to) "
    r"(?:help|assist|provide|comply|answer|fulfil|do that|engage|create|write)|"
    r"as an? (?:ai|large) (?:language )?model|i must (?:decline|refuse)|i(?:'|’)m not able to (?:help|assist))",
    re.IGNORECASE,
)


def judge(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield "refuses" where the answer begins with a refusal."""
    for trace in traces:
        yield "refuses" if REFUSAL.search(trace.answer[:START]) else ""
