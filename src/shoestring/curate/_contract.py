"""What every filter promises, checked on any filter module; each breach is one sentence.

`judge(traces, **options)` yields one reason for each trace, in order: "" lets it through. It decides the same when
asked again, alters no trace, and takes whatever a trace may hold: nothing at all, no verdict, an answer cut off.
`traces` may be iterated more than once. STATELESS says whether each trace is judged by itself: then judging them in two
parts says the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.nouns import Trace


def example(**changes: Any) -> Trace:
    """A verified trace, changed as asked."""
    fields: dict[str, Any] = {
        "id": "a0", "teacher": "t", "teacher_reported": "t", "messages": [{"role": "user", "content": "3 + 8 ?"}],
        "thinking": "3 + 8 1", "answer": "1", "prompt_ids": None, "token_ids": None, "finish_reason": "stop",
        "task": "questions", "problem_id": "p0", "correct": True, "decoding": {}, "usage": {}, "cost_usd": 0.0,
        "licence": "MIT", "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Trace(**fields | changes)


def traces() -> list[Trace]:
    """One of everything a store may hold."""
    return [
        example(),
        example(id="a1", correct=False, answer="2"),
        example(id="a2", correct=None, task=None, problem_id=None),
        example(id="a3", finish_reason="length", thinking=None, answer=""),
        example(id="a4", answer="1", thinking="3 + 8 1"),
        example(id="a5", answer="\0" + "7" * 10_000, thinking="é\n世界"),
        example(id="a6", prompt_ids=[1, 2], token_ids=[3]),
    ]


def check(module: ModuleType, path: Path) -> list[str]:
    """Every breach of the contract by the filter `module`, read from `path`."""
    failures = []
    if not (module.__doc__ or "").strip():
        failures.append("it has no docstring; its first line is the filter's help text.")
    if not callable(getattr(module, "judge", None)):
        failures.append("judge(traces) is missing.")
    elif not isinstance(getattr(module, "STATELESS", None), bool):
        failures.append("STATELESS is missing: True when each trace is judged by itself, else False.")
    else:
        failures += [*_check_judge(module, []), *_check_judge(module, traces())]
    return [f"{path.name}: {failure}" for failure in failures]


def _check_judge(module: ModuleType, given: Sequence[Trace]) -> list[str]:
    before = copy.deepcopy(list(given))
    try:
        reasons = list(module.judge(given))
        again = list(module.judge(given))
        parts = [*module.judge(given[:3]), *module.judge(given[3:])] if module.STATELESS else reasons
    except Exception as error:
        return [f"judge raises {type(error).__name__} on {len(given)} traces: {error}"]
    failures = []
    if len(reasons) != len(given) or any(not isinstance(why, str) for why in reasons):
        failures.append(
            f'judge must yield one reason ("" to keep) for each of {len(given)} traces, not {reasons!r:.80}.'
        )
    if again != reasons:
        failures.append("judge decides differently when asked again.")
    if parts != reasons:
        failures.append("STATELESS is True, and judging in two parts decides differently.")
    if list(given) != before:
        failures.append("judge alters the traces; it may only choose among them.")
    return failures
