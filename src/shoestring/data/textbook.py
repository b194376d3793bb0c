"""The textbook: worked solutions of procedurally made problems, one document each, as a function of a seed.

Document i is made from (seed, i) alone, so any part of the book can be made again anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, Protocol

from shoestring.core.errors import UserError
from shoestring.core.nouns import Message, Problem
from shoestring.core.registry import load_part


class MixEntry(Protocol):
    """A task with its kinds, difficulty range and weight (train.configs.TaskMix)."""

    @property
    def task(self) -> str: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def difficulty(self) -> tuple[int, int]: ...
    @property
    def weight(self) -> float: ...


Split = Literal["train", "test"]


def problems(mix: Sequence[MixEntry], seed: int, *, start: int = 0, split: Split = "train") -> Iterator[Problem]:
    """An endless stream of problems drawn from the mix; problem i depends on (seed, i) only."""
    parts = [load_part("tasks", entry.task) for entry in mix]
    weights = [entry.weight for entry in mix]
    index = start
    while True:
        rng = random.Random(f"{seed}/{split}/{index}")
        (which,) = rng.choices(range(len(mix)), weights)
        entry, part = mix[which], parts[which]
        kind = rng.choice(entry.kinds or part.KINDS)
        difficulty = rng.randint(*entry.difficulty)
        yield part.make(rng.getrandbits(48), difficulty, split=split, kind=kind)
        index += 1


def distinct_problems(
    mix: Sequence[MixEntry], seed: int, count: int, *, split: Split = "train", tries: int = 50
) -> list[Problem]:
    """The first `count` problems of the stream that no earlier one repeats, neither in id nor in words.

    Raises UserError when `tries` draws a problem do not find as many.
    """
    found: dict[str, Problem] = {}
    said: set[str] = set()
    for problem in islice(problems(mix, seed, split=split), tries * count):
        if problem.id not in found and problem.prompt not in said:
            found[problem.id] = problem
            said.add(problem.prompt)
            if len(found) == count:
                return list(found.values())
    told = ", ".join(f"{e.task} {'/'.join(e.kinds)} at difficulty {e.difficulty}".replace("  ", " ") for e in mix)
    raise UserError(
        f"{told} has only about {len(found)} different {split} problems, not {count}; ask for fewer or raise the "
        "difficulty."
    )


def solved(mix: Sequence[MixEntry], seed: int, long_share: float, *, start: int = 0) -> Iterator[tuple[Problem, str]]:
    """Training problems with the voice each is told in: "long" with probability `long_share`, else "short"."""
    voices = random.Random(f"{seed}/voice")
    for _ in range(start):
        voices.random()
    for problem in problems(mix, seed, start=start):
        yield problem, "long" if voices.random() < long_share else "short"


def conversation(problem: Problem, voice: str | None = None) -> list[Message]:
    """The problem as a chat: the question and, when a voice is given, its worked solution."""
    question = [Message("user", problem.prompt)]
    if voice is None:
        return question
    solution = problem.voices[voice]
    return [*question, Message("assistant", solution.answer, thinking=solution.thinking)]
