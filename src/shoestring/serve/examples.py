"""Example questions for the page: the families of problems that a served run was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UserError
from shoestring.core.registry import load_part

if TYPE_CHECKING:
    from shoestring.serve.served import Served

SEED = 7
MOST = 9


def examples_of(served: Served) -> list[dict[str, str]]:
    """One question of each kind of each task in the run's mix; [] for a model that is from no run of ours."""
    found: list[dict[str, str]] = []
    for task, kind, difficulty in _mix(served.run):
        try:
            problem = load_part("tasks", task).make(SEED, difficulty, "test", kind)
        except (UserError, TypeError):
            continue  # a task that is not here any more has no example
        if problem.prompt not in (example["text"] for example in found):
            found.append({"task": task, "kind": kind or task, "text": problem.prompt, "gold": problem.gold})
    return found[:MOST]


def _mix(run: dict[str, Any]) -> list[tuple[str, str | None, int]]:
    """(task, kind, an easy difficulty) from wherever in the run's config a mix of problems stands."""
    mixes: list[tuple[str, str | None, int]] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("task"), str) and "difficulty" in value:
                low, high = _range(value["difficulty"])
                for kind in value.get("kinds") or [None]:
                    mixes.append((value["task"], kind, min(high, low + 1)))
            for item in value.values():
                search(item)
        elif isinstance(value, list):
            for item in value:
                search(item)

    search(run.get("config"))
    return list(dict.fromkeys(mixes))


def _range(difficulty: Any) -> tuple[int, int]:
    if isinstance(difficulty, list) and len(difficulty) == 2:
        return int(difficulty[0]), int(difficulty[1])
    return int(difficulty), int(difficulty)
