"""What every reward promises, checked on any reward module; each breach is one sentence.

`RANGE`, `JUDGES_CORRECTNESS` and `reward`; one finite number in the range for each rollout, the same again when asked
again, never an exception, whatever the text. A reward that judges correctness gives the gold its maximum, and less
than that to every completion that only looks right (WRONG below).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.nouns import Completion, FinishReason, Problem, Rollout

GOLD, OTHER = "12", "13"
PROBLEM = Problem("contract", "1", "c" * 16, "last digits of 5 + 7 ?", GOLD, 1, 0)
RIGHT = (f"<think>5 + 7 {GOLD}</think>{GOLD}", f"<think></think>{GOLD}", f"<think>5 + 7\n\n{GOLD}</think>\n{GOLD}\n")
WRONG = {
    "nothing": "",
    "white space": " \n\t ",
    "an empty answer": f"<think>{GOLD}</think>",
    "the prompt": PROBLEM.prompt,
    "the prompt as the answer": f"<think></think>{PROBLEM.prompt}",
    "the answer only inside the thinking": f"<think>it is {GOLD}</think> ",
    "another answer, the right one inside the thinking": f"<think>{GOLD}</think>{OTHER}",
    "the answer before the thinking": f"{GOLD}<think>5 + 7</think>",
    "the gold as a substring": f"<think>5 + 7</think>1{GOLD}",
    "the gold and more": f"<think>5 + 7</think>{GOLD}.5",
    "several answers, right first": f"<think>5 + 7</think>{GOLD} {OTHER}",
    "several answers, wrong first": f"<think>5 + 7</think>{OTHER} {GOLD}",
    "all ten digits": "<think></think>0 1 2 3 4 5 6 7 8 9",
    "digits of another script": "<think>5 + 7</think>١٢",
    "full-width digits": "<think>5 + 7</think>１２",
    "an unclosed tag": f"<think>5 + 7 {GOLD}",
    "a closing tag alone": f"5 + 7</think>{GOLD}",
    "the tags in the wrong order": f"</think>5 + 7<think>{GOLD}",
    "nested tags": f"<think><think>5 + 7</think></think>{GOLD}",
    "a second thinking": f"<think>5 + 7</think>{GOLD}<think></think>",
    "repeated blocks": f"<think>5</think>{GOLD}<think>7</think>{GOLD}",
    "None": "<think>5 + 7</think>None",
    "nan": "<think>5 + 7</think>nan",
    "inf": "<think>5 + 7</think>inf",
    "a power without end": "<think>5 + 7</think>9**9**9**9",
    "a call": "<think>5 + 7</think>__import__('os').getpid()",
    "100,000 digits": "<think>5 + 7</think>" + "12" * 50_000,
    "100,000 tags": "<think>" * 100_000 + GOLD,
    "100,000 brackets": "<think></think>" + "(" * 100_000 + GOLD,
    "a null character": f"<think>5 + 7</think>\0{GOLD}",
}


def check(module: ModuleType, path: Path) -> list[str]:
    """Every breach of the contract by the reward `module`, read from `path`."""
    failures = _surface(module)
    if not failures:
        failures = [*_check_range(module), *(_check_judgement(module) if module.JUDGES_CORRECTNESS else [])]
    return [f"{path.name}: {failure}" for failure in failures]


def exact_grade(pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
    """The grader of the checks: exactly the gold."""
    return [answer == problem.gold for problem, answer in pairs]


def rollout(text: Any, finish_reason: FinishReason = "stop") -> Rollout:
    """A rollout of the check's own problem that says `text`, a token for each of its first characters."""
    tokens = [ord(letter) % 251 for letter in str(text)[:500]]
    return Rollout(PROBLEM, [1, 2, 3], Completion(text, tokens, [-1.0] * len(tokens), finish_reason))


def _surface(module: ModuleType) -> list[str]:
    failures = []
    if not (module.__doc__ or "").strip():
        failures.append("it has no docstring; its first line is the reward's help text.")
    if not _is_range(getattr(module, "RANGE", None)):
        failures.append("RANGE is missing; set it to (lowest, highest), both finite.")
    if not isinstance(getattr(module, "JUDGES_CORRECTNESS", None), bool):
        failures.append("JUDGES_CORRECTNESS is missing; set it to True or False.")
    if not callable(getattr(module, "reward", None)):
        failures.append("reward is missing.")
    return failures


def _is_range(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    return pair and all(map(math.isfinite, value)) and value[0] < value[1]


def _check_range(module: ModuleType) -> list[str]:
    texts: dict[str, Any] = {**WRONG, **{f"right answer {i}": text for i, text in enumerate(RIGHT)}, "no text": None}
    failures = []
    for what, text in texts.items():
        (value, again), error = _rewards(module, [rollout(text)])
        low, high = module.RANGE
        if error:
            failures.append(f"it fails on {what} ({error}).")
        elif not (isinstance(value, (int, float)) and low <= value <= high):
            failures.append(f"it gives {value!r} for {what}, outside its RANGE {module.RANGE}.")
        elif value != again:
            failures.append(f"it gives {value!r} and then {again!r} for {what}; it has to repeat.")
    many = [rollout(text) for text in texts.values()]
    if not failures and len(module.reward(many, grade=exact_grade)) != len(many):
        failures.append("it does not give one number for each rollout.")
    return failures


def _check_judgement(module: ModuleType) -> list[str]:
    best = module.RANGE[1]
    failures = [
        f"it gives {value!r} for the gold in {text!r}, not its maximum {best}."
        for text in RIGHT
        if (value := _rewards(module, [rollout(text)])[0][0]) != best
    ]
    wrong = {**{what: rollout(text) for what, text in WRONG.items()}, "a cut-off answer": rollout(RIGHT[0], "length")}
    failures += [
        f"it gives its maximum {best} for {what}."
        for what, made in wrong.items()
        if _rewards(module, [made])[0][0] == best
    ]
    return failures


def _rewards(module: ModuleType, rollouts: list[Rollout]) -> tuple[tuple[Any, Any], str]:
    """The reward of one rollout, twice, or what went wrong."""
    reward: Callable[..., list[float]] = module.reward
    try:
        return (reward(rollouts, grade=exact_grade)[0], reward(rollouts, grade=exact_grade)[0]), ""
    except Exception as error:
        return (None, None), f"{type(error).__name__}: {error}"
