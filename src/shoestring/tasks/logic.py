"""Truth-tellers and liars, counting true propositions, and orders tracked through swaps.

liars   "A honest B agrees C denies , is C honest ?"   steps "A honest yes B agrees yes C denies no"
parity  "true among p T q F r T , odd or even ?"       steps "p T odd q F odd r T even"
order   "A B C a swap 1 2 b swap 2 3 , row ?"          steps "a swap 1 2 B A C b swap 2 3 B C A"

In `liars` everyone after A speaks of the one before: who agrees says "that one is honest", who denies says "that one
lies". The first two kinds are running parity and the third composes permutations: hard to answer at once for a small
network, easy as a chain of (label, operand, running state) steps. Difficulty is the number of statements,
propositions after the first, or swaps. Left out: puzzles that need search.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Problem
from shoestring.tasks._draw import Draft, Split, check_difficulty, draw, matches

VERSION = "1.1"  # 1.1: `order` asks for the whole row
SWAPS = ((1, 2), (2, 3), (1, 3))
PROPOSITIONS = "pqrstuvwxyzmnklab"


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed`; raises UserError for an unknown kind or an impossible difficulty (parity: at most 16)."""
    return draw("logic", VERSION, MAKERS, seed, difficulty, split, kind)


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Any = None) -> list[bool]:
    """True where the answer is exactly the gold word, letter or row."""
    return [matches(answer, problem.gold) for problem, answer in zip(problems, answers, strict=True)]


def _liars(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("liars", difficulty, len(string.ascii_uppercase) - 1)
    honest = rng.random() < 0.5
    asked = [f"A {'honest' if honest else 'lies'}"]
    steps = [f"{asked[0]} {_yes(honest)}"]
    for who in string.ascii_uppercase[1 : difficulty + 1]:
        agrees = rng.random() < 0.5
        honest = agrees == honest  # a true statement about the one before: honest; a false one: a liar
        asked.append(f"{who} {'agrees' if agrees else 'denies'}")
        steps.append(f"{asked[-1]} {_yes(honest)}")
    return Draft(f"{' '.join(asked)} , is {who} honest ?", _yes(honest), " ".join(steps))


def _parity(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("parity", difficulty, len(PROPOSITIONS) - 1)
    odd, asked, steps = False, [], []
    for label in PROPOSITIONS[: difficulty + 1]:
        true = rng.random() < 0.5
        odd = odd != true
        asked.append(f"{label} {'T' if true else 'F'}")
        steps.append(f"{asked[-1]} {'odd' if odd else 'even'}")
    return Draft(f"true among {' '.join(asked)} , odd or even ?", "odd" if odd else "even", " ".join(steps))


def _order(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("order", difficulty, len(string.ascii_lowercase))
    row = ["A", "B", "C"]
    rng.shuffle(row)
    asked, steps = [" ".join(row)], []
    for label in string.ascii_lowercase[:difficulty]:
        i, j = rng.choice(SWAPS)
        row[i - 1], row[j - 1] = row[j - 1], row[i - 1]
        asked.append(f"{label} swap {i} {j}")
        steps.append(f"{asked[-1]} {' '.join(row)}")
    return Draft(f"{' '.join(asked)} , row ?", " ".join(row), " ".join(steps))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


MAKERS = {"liars": _liars, "parity": _parity, "order": _order}
KINDS = tuple(MAKERS)
