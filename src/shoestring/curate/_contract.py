"""What every filter promises, checked on any filter module; each breach is one sentence.

`keep(traces)` returns some of the traces it was given, each at most once and in order, the same when asked again,
alters none, and takes whatever a trace may hold: nothing at all, an ungraded answer, an answer cut off.
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
    if not callable(getattr(module, "keep", None)):
        failures.append("keep(traces) is missing.")
    else:
        failures += [*_check_keep(module, []), *_check_keep(module, traces())]
    return [f"{path.name}: {failure}" for failure in failures]


def _check_keep(module: ModuleType, given: Sequence[Trace]) -> list[str]:
    before = copy.deepcopy(list(given))
    try:
        kept = module.keep(given)
        again = module.keep(given)
    except Exception as error:
        return [f"keep raises {type(error).__name__} on {len(given)} traces: {error}"]
    if not isinstance(kept, list) or any(not isinstance(trace, Trace) for trace in kept):
        return [f"keep must return a list of traces, not {kept!r:.80}."]
    failures = []
    places = [next((i for i, trace in enumerate(given) if trace is one), -1) for one in kept]
    if -1 in places or places != sorted(set(places)):
        failures.append("keep must return traces it was given, each at most once and in order.")
    if again != kept:
        failures.append("keep decides differently when asked again.")
    if list(given) != before:
        failures.append("keep alters the traces; it may only choose among them.")
    return failures
