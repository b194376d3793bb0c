"""Choose among a question's answers by length: the short ones, the long ones, or both.

Students of up to about 3B parameters learn better from shorter chains or a mixture than from long ones alone (arXiv
2502.12143). `per_question` answers of a question stay: "short" the shortest, "long" the longest, "mixed" half of each.
Length is the teacher's count of tokens. `most_tokens` drops longer answers whatever the policy; 0: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._keys import question_key

STATELESS = False


def judge(
    traces: Iterable[Trace], *, policy: Literal["short", "long", "mixed"] = "mixed", per_question: int = 2,
    most_tokens: int = 0,
) -> Iterator[str]:  # fmt: skip
    """Yield "too long", or "longer / shorter than those that stay". Reads the traces twice; raises UserError."""
    if policy not in ("short", "long", "mixed") or per_question < 1 or most_tokens < 0:
        raise UserError("length: policy is short, long or mixed; per_question at least 1, most_tokens 0 or more.")
    lengths: dict[bytes, list[tuple[int, str]]] = {}
    for trace in traces:
        if not most_tokens or _tokens(trace) <= most_tokens:
            lengths.setdefault(question_key(trace), []).append((_tokens(trace), trace.id))
    kept = {name for found in lengths.values() for name in _chosen(sorted(found), policy, per_question)}
    for trace in traces:
        if most_tokens and _tokens(trace) > most_tokens:
            yield "too long"
        else:
            yield "" if trace.id in kept else "another length was wanted"


def _chosen(found: list[tuple[int, str]], policy: str, count: int) -> list[str]:
    short = count if policy == "short" else (count + 1) // 2 if policy == "mixed" else 0
    ids = [name for _, name in found]
    return ids[:short] + ids[max(short, len(ids) - (count - short)) :]


def _tokens(trace: Trace) -> int:
    return trace.usage.get("completion_tokens", len(trace.answer.split()))
