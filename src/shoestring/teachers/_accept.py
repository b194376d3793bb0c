"""How many answers would be accepted, while they come: a sample of them is graded in a thread of its own.

For the progress line only: nothing is marked, `curate` grades every answer. Accepted is an answer that ended by itself
and is right, where its question brought a problem; where none did, one that ended by itself.
"""

from __future__ import annotations

import json
import threading
from collections import deque

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.data.places import AnyStore
from shoestring.tasks.grading import Grader, gradable

SAMPLE, EVERY_S = 16, 0.5  # answers graded at most, in so many seconds
TRIED = 64  # answers to questions without a problem, after which there is nothing to grade


class Acceptance:
    """`hear` each answer; `graded` and `right` are of the sample so far."""

    def __init__(self, store: AnyStore) -> None:
        self._store = store
        self._heard: deque[tuple[int, str, str]] = deque()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="acceptance", daemon=True)
        self.graded = self.right = 0
        self.wanted = True

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Grade what was heard last, unless a grader takes its time."""
        self._end.set()
        self._thread.join(timeout=2.0)

    def hear(self, question: int, answer: str, finish: str) -> None:
        """An answer came; taken into the sample when there is room."""
        if self.wanted and len(self._heard) < SAMPLE:
            self._heard.append((question, answer, finish))

    def _work(self) -> None:
        tried, last = 0, False
        with Grader() as grader:
            while self.wanted and not last:
                last = self._end.wait(EVERY_S)
                heard = [self._heard.popleft() for _ in range(len(self._heard))]
                if not heard:
                    continue
                tried += len(heard)
                try:
                    self._grade(grader, heard)
                except UserError:  # a task that is not here, a store that is gone: told by who needs them
                    self.wanted = False
                except Exception:
                    if not self._end.is_set():
                        raise
                    return  # `stop` no longer waited and the store is closed: nobody reads this sample
                if tried >= TRIED and not self.graded:
                    self.wanted = False

    def _grade(self, grader: Grader, heard: list[tuple[int, str, str]]) -> None:
        problems = self._store.problems([question for question, _, _ in heard])
        pairs = [
            (Problem(**json.loads(problems[question])), gradable(answer, finish))
            for question, answer, finish in heard if question in problems
        ]  # fmt: skip
        self.right += sum(grader(pairs))
        self.graded += len(pairs)
