"""reasoning-gym's side of the adapter: an item made again from three numbers, and its own score of an answer.

Imports reasoning-gym, so it is imported by the first call of its adapter, and aside for scoring.
"""

from __future__ import annotations

from contextlib import redirect_stdout, suppress
from functools import cache, lru_cache
from importlib.metadata import version
from io import StringIO
from typing import Any

from reasoning_gym.factory import CURRICULA, create_curriculum, create_dataset

# Item i of a set is made from seed + i, so one set of seed 0 has them all; these know only the items they hold.
BOUNDED = ("acre", "gsm_symbolic", "list_functions")


@lru_cache(maxsize=64)
def item(kind: str, difficulty: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The data set of one item and that item, all attributes of the curriculum raised `difficulty` - 1 levels."""
    with redirect_stdout(StringIO()):  # some sets print while they work
        dataset = _dataset(kind, difficulty, seed if kind in BOUNDED else 0)
        return dataset, dataset[0 if kind in BOUNDED else seed]


@lru_cache(maxsize=256)
def _dataset(kind: str, difficulty: int, seed: int) -> Any:
    if kind in CURRICULA:
        for level in range(difficulty - 1, -1, -1):
            with suppress(AssertionError):  # some curricula climb to settings that their own set refuses
                return create_dataset(kind, **_settings(kind, level), seed=seed, size=1)
    return create_dataset(kind, seed=seed, size=1)


def _settings(kind: str, level: int) -> dict[str, Any]:
    curriculum = create_curriculum(kind)
    for name in curriculum.attributes:
        for _ in range(level):
            if not curriculum.increment_attr_level(name):
                break
    settings = vars(curriculum.generate_configuration())
    return {name: value for name, value in settings.items() if name not in ("seed", "size")}


def question(kind: str, difficulty: int, seed: int) -> str:
    """What is asked."""
    return str(item(kind, difficulty, seed)[1]["question"]).strip()


def gold(kind: str, difficulty: int, seed: int) -> str:
    """An answer that is right."""
    return str(item(kind, difficulty, seed)[1]["answer"]).strip()


def score(kind: str, difficulty: int, seed: int, answer: str) -> float:
    """The set's own score of an answer."""
    dataset, entry = item(kind, difficulty, seed)
    with redirect_stdout(StringIO()):
        return float(dataset.score_answer(answer, entry))


def serve(what: str, *arguments: Any) -> Any:
    """`question` or `score`, for a process aside."""
    return question(*arguments) if what == "question" else score(*arguments)


@cache
def release() -> str:
    """The installed release, as the package index knows it."""
    return version("reasoning-gym")
