"""What every teacher promises that can be checked without asking it; each breach is one sentence.

`teacher(**options)` builds the teacher from keyword options, each with a name a recipe can spell. What it answers is
held to the contract by tests that run it: traces of the current schema, complete, ids that repeat.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from shoestring.core.contracts import Question, Teacher
from shoestring.core.nouns import Sampling, Trace


def check(module: ModuleType, path: Path) -> list[str]:
    """Every breach of the contract by the teacher `module`, read from `path`."""
    failures = []
    if not (module.__doc__ or "").strip():
        failures.append("it has no docstring; its first line is the teacher's help text.")
    build = getattr(module, "teacher", None)
    if not callable(build):
        failures.append("teacher(**options) is missing.")
    else:
        kinds = {parameter.kind for parameter in inspect.signature(build).parameters.values()}
        if kinds - {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}:
            failures.append("teacher must take keyword options only: teacher(*, model, ...).")
    return [f"{path.name}: {failure}" for failure in failures]


def check_answers(teacher: Teacher, questions: Iterable[Question], sampling: Sampling) -> list[str]:
    """Every breach by what `teacher` answers; it is asked twice."""
    questions = list(questions)
    traces, again = list(teacher.answer(questions, sampling)), list(teacher.answer(questions, sampling))
    failures = []
    if not isinstance(teacher, Teacher) or not teacher.name or not teacher.licence:
        failures.append("it needs a name, a licence and answer().")
    if len(traces) != len(questions) * sampling.n:
        failures.append(f"{len(questions)} questions x {sampling.n} samples gave {len(traces)} traces.")
    if len({trace.id for trace in traces}) != len(traces):
        failures.append("two of its traces have the same id.")
    if {trace.id for trace in traces} != {trace.id for trace in again}:
        failures.append("asked the same again, its traces have other ids.")
    for trace in traces:
        if Trace.from_dict(trace.to_dict()) != trace:
            failures.append(f"trace {trace.id} does not survive being written and read.")
        if not trace.licence or not trace.date or trace.usage.keys() < {"prompt_tokens", "completion_tokens"}:
            failures.append(f"trace {trace.id} lacks its licence, date or usage.")
    return failures
