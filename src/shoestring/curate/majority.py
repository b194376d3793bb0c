"""Drop answers that differ from what most answers to the same question say, where nobody knows the gold.

Self-consistency (arXiv 2203.11171) as a filter. What an answer says is its last box, else its last number, else its
last line. A question with fewer than `fewest` answers, or whose best answer fewer than `share` of them give, is dropped
whole: nothing is agreed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._keys import question_key

STATELESS = False
BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def judge(traces: Iterable[Trace], *, fewest: int = 3, share: float = 0.5) -> Iterator[str]:
    """Yield "" for an answer that agrees with its question's majority. Reads the traces twice; raises UserError."""
    if fewest < 1 or not 0 < share <= 1:
        raise UserError("majority: fewest must be at least 1 and share above 0 to 1.")
    votes: dict[bytes, Counter[str]] = {}
    for trace in traces:
        votes.setdefault(question_key(trace), Counter())[stated(trace.answer)] += 1
    for trace in traces:
        counts = votes[question_key(trace)]
        best, number = counts.most_common(1)[0]
        if counts.total() < fewest:
            yield "too few answers to agree"
        elif number < share * counts.total():
            yield "no majority"
        else:
            yield "" if stated(trace.answer) == best else "against the majority"


def stated(answer: str) -> str:
    """What an answer comes to, in a form that can be compared."""
    if boxes := BOX.findall(answer):
        return str(boxes[-1]).replace(",", "").strip()
    if numbers := NUMBER.findall(answer):
        value = str(numbers[-1]).replace(",", "")
        return value.rstrip("0").rstrip(".") if "." in value else value
    lines = answer.strip().splitlines()
    return lines[-1].strip().lower() if lines else ""
