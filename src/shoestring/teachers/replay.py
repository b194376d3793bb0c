"""Recorded answers, given again: a road that asks a paid teacher can be walked a second time for nothing.

A question is recognised by its messages. The traces come back as they were stored, ids, dates and prices included;
what was paid once is not paid again, so a bill must count replayed traces as free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.core.contracts import Question, Teacher
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling, Trace
from shoestring.data.traces import TraceStore


class ReplayTeacher:
    """Answers from a traces file. `name` and `licence` are those of the recorded teachers."""

    def __init__(self, traces: Sequence[Trace]):
        if not traces:
            raise UserError("there are no recorded traces to replay; record some with `shoestring ask` first.")
        self.name = ", ".join(sorted({trace.teacher for trace in traces}))
        self.licence = ", ".join(sorted({trace.licence for trace in traces}))
        self._recorded: dict[str, list[Trace]] = {}
        for trace in traces:
            self._recorded.setdefault(_key(trace.messages), []).append(trace)

    def answer(self, questions: Iterable[Question], sampling: Sampling) -> Iterator[Trace]:
        """The first `sampling.n` recorded traces of each question; the rest of `sampling` was chosen back then.

        Raises UserError for a question with fewer.
        """
        for question in questions:
            found = self._recorded.get(_key([{"role": m.role, "content": m.content} for m in question.messages]), [])
            if len(found) < sampling.n:
                raise UserError(
                    f"{len(found)} answers are recorded for the question {question.messages[-1].content[:60]!r}, and "
                    f"{sampling.n} are asked for; ask for fewer or record more."
                )
            yield from found[: sampling.n]


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages])


def teacher(*, traces: str | Path) -> Teacher:
    """Replay the traces file `traces`."""
    if not Path(traces).is_file():
        raise UserError(f"there is no traces file {traces}.")
    return ReplayTeacher(TraceStore(traces).read())
