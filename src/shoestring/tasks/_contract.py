"""What every task promises, checked on any task module; each breach is one sentence.

`VERSION`, `KINDS`, `make`, `grade`; `make(seed)` repeats; the gold and every voice's answer are right; another
problem's different gold is wrong, and so is every answer that merely looks like it (ANSWERS below); `grade` never
raises on what an answer says; train and test problems are disjoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.tasks.sandbox import Sandbox

DIFFICULTIES = (1, 3, 6)
SEEDS = 4
SPLIT_SEEDS = 150
MANY_KINDS, FEW_SEEDS = 12, 10  # of a task with more kinds some are checked, evenly spaced, on few problems
OTHER_DIGITS = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")

# What must not pass for an answer, given the problem's gold and another problem's different gold.
ANSWERS: dict[str, Callable[[str, str, str], str]] = {
    "an empty answer": lambda prompt, gold, other: "",
    "white space": lambda prompt, gold, other: " \n\t ",
    "the prompt itself": lambda prompt, gold, other: prompt,
    "another problem's gold": lambda prompt, gold, other: other,
    "the gold and another answer": lambda prompt, gold, other: f"{gold} {other}",
    "another answer and the gold": lambda prompt, gold, other: f"{other} {gold}",
    "one answer or the other": lambda prompt, gold, other: f"{other} or {gold}",
    "the gold inside something longer": lambda prompt, gold, other: f"1{gold}1",
    "the gold inside thinking": lambda prompt, gold, other: f"<think>{gold}</think>",
    "the gold twice": lambda prompt, gold, other: f"{gold}\n\n{gold}" if "def " not in gold else "def",
    "all ten digits": lambda prompt, gold, other: "0 1 2 3 4 5 6 7 8 9",
    "the gold in the digits of another script": lambda prompt, gold, other: gold.translate(OTHER_DIGITS),
    "None": lambda prompt, gold, other: "None",
    "nan": lambda prompt, gold, other: "nan",
    "inf": lambda prompt, gold, other: "inf",
    "a power without end": lambda prompt, gold, other: "9**9**9**9",
    "a call": lambda prompt, gold, other: "__import__('os').getpid()",
    "100,000 characters": lambda prompt, gold, other: "7" * 100_000,
    "100,000 characters before the gold": lambda prompt, gold, other: "( " * 50_000 + gold,
    "a null character": lambda prompt, gold, other: "\0" + gold,
}


def check(module: ModuleType, path: Path) -> list[str]:
    """Every breach of the contract by the task `module`, read from `path`. Raises UserError without a sandbox
    for a task that needs one."""
    failures = _surface(module)
    if failures:
        return [f"{path.name}: {failure}" for failure in failures]
    needs = getattr(module, "NEEDS_SANDBOX", False)
    with Sandbox.open() if needs else nullcontext(None) as sandbox:
        many = len(module.KINDS) > MANY_KINDS
        for kind in module.KINDS[:: len(module.KINDS) // MANY_KINDS if many else 1]:
            try:
                failures += check_kind(module, kind, sandbox, few=many)
            except Exception as error:
                failures.append(f"kind {kind} raises {type(error).__name__}: {error}")
    return [f"{path.name}: {failure}" for failure in failures]


def _surface(module: ModuleType) -> list[str]:
    failures = []
    if not (module.__doc__ or "").strip():
        failures.append("it has no docstring; its first line is the task's help text.")
    if not isinstance(getattr(module, "VERSION", None), str):
        failures.append("VERSION is missing; set it to a string and change it whenever problems or verdicts change.")
    kinds = getattr(module, "KINDS", None)
    if not (isinstance(kinds, tuple) and kinds and all(isinstance(kind, str) for kind in kinds)):
        failures.append("KINDS is missing; name the kinds of problem as a tuple of strings.")
    for name in ("make", "grade"):
        if not callable(getattr(module, name, None)):
            failures.append(f"{name} is missing.")
    return failures


def check_kind(module: ModuleType, kind: str, sandbox: Sandbox | None, few: bool = False) -> Iterator[str]:
    """Every breach by one kind; with `few`, on its easiest problems and fewer of them."""
    problems = list(_problems(module, kind, DIFFICULTIES[:1] if few else DIFFICULTIES))
    if not problems:
        yield f"kind {kind} makes no problem at difficulties {DIFFICULTIES}."
        return
    for problem in problems:
        yield from _check_problem(module, kind, problem)
    yield from _check_right(module, problems, sandbox)
    yield from _check_wrong(module, problems, sandbox)
    yield from _check_split(module, kind, problems[-1].difficulty, FEW_SEEDS if few else SPLIT_SEEDS)


def _problems(module: ModuleType, kind: str, difficulties: Sequence[int]) -> Iterator[Problem]:
    for difficulty in difficulties:
        with suppress(UserError):  # a kind may have limits
            yield from (module.make(seed, difficulty, "train", kind) for seed in range(SEEDS))


def _check_problem(module: ModuleType, kind: str, problem: Problem) -> Iterator[str]:
    what = _name(problem)
    if module.make(problem.seed, problem.difficulty, "train", kind) != problem:
        yield f"{what} is another problem when it is made again; draw from random.Random(seed) alone."
    if problem.version != module.VERSION:
        yield f"{what} says version {problem.version}, and the task {module.VERSION}."
    if not (problem.id and problem.prompt.strip() and problem.gold.strip()):
        yield f"{what} has an empty id, prompt or gold."
    try:
        json.dumps(problem.meta, allow_nan=False)
    except (TypeError, ValueError):
        yield f"{what} has a meta that is no JSON value."


def _check_right(module: ModuleType, problems: Sequence[Problem], sandbox: Sandbox | None) -> Iterator[str]:
    cases = [(problem, problem.gold, "its own gold") for problem in problems]
    for problem in problems:
        cases += [(problem, voice.answer, f"the answer of voice {name}") for name, voice in problem.voices.items()]
    for (problem, answer, what), right in zip(cases, _grade(module, cases, sandbox), strict=True):
        if right is not True:
            yield f"{_name(problem)} grades {what}, {answer[:60]!r}, as wrong."


def _check_wrong(module: ModuleType, problems: Sequence[Problem], sandbox: Sandbox | None) -> Iterator[str]:
    cases = []
    for index, problem in enumerate(problems):
        others = (problems[index - step].gold for step in range(1, len(problems)))
        other = next((gold for gold in others if gold != problem.gold), "")
        for what, build in ANSWERS.items():
            answer = build(problem.prompt, problem.gold, other)
            if answer.strip() != problem.gold.strip() and (other or not what.startswith("another")):
                cases.append((problem, answer, what))
    for (problem, answer, what), right in zip(cases, _grade(module, cases, sandbox), strict=True):
        if right is not False:
            yield f"{_name(problem)} grades {what}, {answer[:60]!r}, as right."


def _check_split(module: ModuleType, kind: str, difficulty: int, seeds: int) -> Iterator[str]:
    train = [module.make(seed, difficulty, "train", kind) for seed in range(seeds)]
    test = [module.make(seed, difficulty, "test", kind) for seed in range(seeds)]
    for what in ("id", "prompt"):
        both = {getattr(problem, what) for problem in train} & {getattr(problem, what) for problem in test}
        if both:
            yield f"kind {kind} has {len(both)} {what}(s) both in train and in test, {sorted(both)[0][:60]!r} for one."


def _grade(module: ModuleType, cases: Sequence[tuple[Problem, str, str]], sandbox: Sandbox | None) -> list[Any]:
    """Verdicts; one call for all, and one by one when that raises, to say on what."""
    try:
        return module.grade([case[0] for case in cases], [case[1] for case in cases], sandbox=sandbox)
    except Exception:
        for problem, answer, what in cases:
            try:
                module.grade([problem], [answer], sandbox=sandbox)
            except Exception as error:
                raise RuntimeError(f"grade fails on {what} ({type(error).__name__}: {error})") from error
        raise


def _name(problem: Problem) -> str:
    kind = problem.meta.get("kind", problem.task)
    return f"the {kind} problem of seed {problem.seed} at difficulty {problem.difficulty}"
