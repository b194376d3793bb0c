"""What the procedural tasks share: a repeatable draw that respects the split, and the Problem made of it.

The split is a property of the problem, not of the seed: the hash of the problem's id decides, about one in five
is a test problem. So no seed, however chosen, can put one problem on both sides, and `make` draws again until the
problem falls into the split asked for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Problem, Solution

Split = Literal["train", "test"]
TEST_ONE_IN = 5
MAX_DRAWS = 2000  # the chance that a space with test problems shows none in so many draws is below 1e-100


@dataclass(slots=True, frozen=True)
class Draft:
    """A problem before it has an id: the question, its answer, and the steps that lead there."""

    prompt: str
    gold: str
    steps: str | None  # None: no voice but the short one
    meta: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[random.Random, int], Draft]  # (rng, difficulty) -> Draft


def problem_id(task: str, version: str, content: str) -> str:
    """16 hex digits of the hash of what the problem is."""
    return hashlib.sha256(f"{task}\n{version}\n{content}".encode()).hexdigest()[:16]


def split_of(id_: str) -> Split:
    """The side a problem belongs to, from its id alone."""
    return "test" if int(id_, 16) % TEST_ONE_IN == 0 else "train"


def draw(
    task: str, version: str, makers: Mapping[str, Maker], seed: int, difficulty: int, split: Split, kind: str | None
) -> Problem:
    """The problem of `seed`. Raises UserError for an unknown kind or split and an impossible difficulty."""
    if split not in ("train", "test"):
        raise UserError(f'split "{split}" is unknown; use "train" or "test".')
    if kind is not None and kind not in makers:
        raise UserError(f'task {task} has no kind "{kind}".{did_you_mean(kind, makers)}')
    if difficulty < 1:
        raise UserError(f"difficulty is {difficulty}; it counts operations and must be at least 1.")
    rng = random.Random(f"{task}/{version}/{kind}/{difficulty}/{seed}")
    chosen = kind if kind is not None else rng.choice(tuple(makers))
    for _ in range(MAX_DRAWS):
        draft = makers[chosen](rng, difficulty)
        if split_of(problem_id(task, version, draft.prompt)) == split:
            return finish(task, version, replace(draft, meta={"kind": chosen, **draft.meta}), difficulty, seed)
    raise UserError(
        f"task {task} has no {split} problem of kind {chosen} at difficulty {difficulty}; raise difficulty."
    )


def check_difficulty(kind: str, difficulty: int, limit: int) -> None:
    """Raise UserError where `kind` cannot be made that hard."""
    if difficulty > limit:
        raise UserError(f"kind {kind} goes up to difficulty {limit}, not {difficulty}; lower it or leave the kind out.")


def matches(answer: object, gold: str) -> bool:
    """Exactly the gold, whitespace around it aside. Anything else, however close, is wrong."""
    return isinstance(answer, str) and len(answer) <= len(gold) + 64 and answer.strip() == gold


def finish(task: str, version: str, draft: Draft, difficulty: int, seed: int) -> Problem:
    """The Problem of a draft, with its id and a Solution in each voice it has."""
    voices = {"short": Solution("", draft.gold)}
    if draft.steps is not None:
        voices["long"] = Solution(draft.steps, draft.gold)
    id_ = problem_id(task, version, draft.prompt)
    return Problem(task, version, id_, draft.prompt, draft.gold, difficulty, seed, voices, draft.meta)
