"""Write a small Python function from a description or from examples; hidden tests in the sandbox decide.

describe  "f : x a + 3 b * 2 c + 5 , % 10 ?"                  steps "a + 3 1 3 b * 2 2 6 c + 5 2 1"
          "def f ( x ) : return ( 2 * x + 1 ) % 10"           (the pair a b of a * x + b after each operation)
examples  "f 1 1 = 6 . f 2 1 = 0 . f 1 2 = 9 . % 10 ?"        steps "6 0 4 . 6 9 3 . 1 1 6 . 0 1 - 4 2 . 0 0 - 3 9"
          "def f ( x , y ) : return ( 4 * x + 3 * y + 9 ) % 10"   (both slopes, then the way back to f 0 0)

Any program that passes the hidden tests is right, whatever its form. Difficulty is the number of operations described,
or of steps between the examples and zero (at most 16). Multipliers and addends are few, so that the tables are small.
Left out: loops, strings, several functions; a task file of one's own may ask for them, the sandbox runs any Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext

from shoestring.core.nouns import Problem
from shoestring.tasks._draw import Draft, Split, check_difficulty, draw
from shoestring.tasks.sandbox import Program, Sandbox

VERSION = "1.0"
NEEDS_SANDBOX = True
MULTIPLIERS, ADDENDS = (2, 3), (1, 2, 3, 4, 5)
LABELS = "abcdeghijklmnopq"  # f is the function
TEST_INPUTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 40, 58, 127)
MAX_SOURCE = 20_000  # characters; a longer answer is wrong without being run


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed`; raises UserError for an unknown kind or a difficulty out of range (examples: 16)."""
    return draw("programs", VERSION, MAKERS, seed, difficulty, split, kind)


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Sandbox | None = None) -> list[bool]:
    """True where the answer, run in the sandbox, passes every hidden test. Equal candidates are run once.

    Opens a sandbox of its own when none is given. Raises SandboxError when the sandbox itself fails: an
    infrastructure failure is never a wrong answer.
    """
    candidates: dict[tuple[str, str], Program] = {}
    keys: list[tuple[str, str] | None] = []
    for problem, answer in zip(problems, answers, strict=True):
        runnable = isinstance(answer, str) and "def" in answer and len(answer) <= MAX_SOURCE
        keys.append((problem.id, answer) if runnable else None)
        if runnable and (problem.id, answer) not in candidates:
            tests = tuple((tuple(args), expected) for args, expected in problem.meta["tests"])
            candidates[problem.id, answer] = Program(source=answer.strip(), entry=problem.meta["entry"], tests=tests)
    if not candidates:
        return [False] * len(keys)
    with nullcontext(sandbox) if sandbox is not None else Sandbox.open(workers=1) as box:
        outcomes = dict(zip(candidates, box.run(list(candidates.values())), strict=True))
    return [key is not None and outcomes[key].ok for key in keys]


def _describe(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("describe", difficulty, len(LABELS))
    a, b = 1, 0
    asked, steps = [], []
    for label in LABELS[:difficulty]:
        if rng.random() < 0.5:
            sign, operand = "+", rng.choice(ADDENDS)
            b = (b + operand) % 10
        else:
            sign, operand = "*", rng.choice(MULTIPLIERS)
            a, b = a * operand % 10, b * operand % 10
        asked.append(f"{label} {sign} {operand}")
        steps.append(f"{asked[-1]} {a} {b}")
    tests = [[[x], (a * x + b) % 10] for x in TEST_INPUTS]
    gold = f"def f ( x ) : return ( {a} * x + {b} ) % 10"
    return Draft(f"f : x {' '.join(asked)} , % 10 ?", gold, " ".join(steps), {"entry": "f", "tests": tests})


def _examples(rng: random.Random, difficulty: int) -> Draft:
    check_difficulty("examples", difficulty, 16)
    a, b, c = rng.randrange(10), rng.randrange(10), rng.randrange(10)
    x = rng.randint(max(0, difficulty - 8), min(8, difficulty))
    y = difficulty - x

    def f(x: int, y: int) -> int:
        return (a * x + b * y + c) % 10

    here, right, up = f(x, y), f(x + 1, y), f(x, y + 1)
    asked = f"f {x} {y} = {here} . f {x + 1} {y} = {right} . f {x} {y + 1} = {up} . % 10 ?"
    steps = [f"{here} {right} {a}", f"{here} {up} {b}", f"{x} {y} {here}"]
    steps += [f"{i} {y} - {a} {f(i, y)}" for i in range(x - 1, -1, -1)]
    steps += [f"0 {j} - {b} {f(0, j)}" for j in range(y - 1, -1, -1)]
    tests = [[[i, j], f(i, j)] for i, j in zip(TEST_INPUTS, reversed(TEST_INPUTS), strict=True)]
    tests += [[[i, 0], f(i, 0)] for i in range(10)] + [[[0, j], f(0, j)] for j in range(10)]
    gold = f"def f ( x , y ) : return ( {a} * x + {b} * y + {c} ) % 10"
    return Draft(asked, gold, " . ".join(steps), {"entry": "f", "tests": tests})


MAKERS = {"describe": _describe, "examples": _examples}
KINDS = tuple(MAKERS)
