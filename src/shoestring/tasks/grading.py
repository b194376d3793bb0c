"""Grader: right or wrong for any mixture of problems, with one sandbox opened when the first program has to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Literal

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.core.registry import is_path, load_part
from shoestring.tasks.sandbox import Limits, Sandbox
from shoestring.tasks.sandbox.layers import Layer

GOLDS = 4  # problems of each task whose gold is graded before a stage begins


def gradable(answer: str, finish_reason: str) -> str:
    """What of an answer may be judged: all of it when the model ended it itself, nothing of one that was cut off.

    The one rule for rewards, evaluation and kept answers alike: a truncated answer is not right, even where what there
    is of it happens to be; what would have followed is unknown.
    """
    return answer if finish_reason == "stop" else ""


def check_golds(grade: Callable[[Sequence[tuple[Problem, str]]], list[bool]], problems: Iterable[Problem]) -> None:
    """Grade the golds of the first few problems of each task: a task that calls its own gold wrong teaches nothing.

    Raises UserError for one that does, before anything is sampled.
    """
    by_task: dict[str, list[Problem]] = {}
    for problem in problems:
        by_task.setdefault(problem.task, []).append(problem)
    chosen = [problem for found in by_task.values() for problem in found[:GOLDS]]
    for problem, right in zip(chosen, grade([(problem, problem.gold) for problem in chosen]), strict=True):
        if not right:
            raise UserError(
                f"task {problem.task} grades its own gold {problem.gold[:60]!r} as wrong (problem {problem.id}); "
                "`shoestring check-part FILE --kind tasks` says what is wrong with it."
            )


def own_tasks(names: Iterable[str]) -> dict[str, str]:
    """Problem.task -> file, for tasks that are named by the path of a file: what `Grader(tasks=...)` takes."""
    return {Path(name).stem: name for name in names if name.endswith(".py")}


class Grader:
    """Callable on (problem, answer) pairs; the answer is what stands after the thinking. A context manager.

    `tasks` names the part behind a problem's task where the two differ: {"mine": "path/to/mine.py"}. `layer`,
    `workers` and `limits` are the sandbox's. Not for several threads at once.
    """

    def __init__(
        self,
        *,
        layer: Literal["auto"] | Layer = "auto",
        workers: int = 2,
        limits: Limits | None = None,
        tasks: Mapping[str, str | ModuleType] | None = None,
    ) -> None:
        self._layer: Literal["auto"] | Layer = layer
        self._workers = workers
        self._limits = limits
        self._parts = dict(tasks or {})
        self._modules: dict[str, ModuleType] = {}
        self._sandbox: Sandbox | None = None

    @property
    def layer(self) -> Layer | None:
        """The sandbox layer in use, for the manifest; None as long as nothing had to run."""
        return self._sandbox.layer if self._sandbox is not None else None

    def __call__(self, pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
        """True where the answer is right, in order.

        Raises UserError for an unknown task, one that is a file which `tasks` does not name, and a problem made by
        another version of its task; SandboxError when the sandbox itself fails.
        """
        by_task: dict[str, list[int]] = {}
        for index, (problem, _) in enumerate(pairs):
            by_task.setdefault(problem.task, []).append(index)
        verdicts = [False] * len(pairs)
        for task, indices in by_task.items():
            module = self._module(task)
            problems = [pairs[index][0] for index in indices]
            _check_versions(module, problems)
            sandbox = self._open() if getattr(module, "NEEDS_SANDBOX", False) else None
            answers = [pairs[index][1] for index in indices]
            for index, verdict in zip(indices, module.grade(problems, answers, sandbox=sandbox), strict=True):
                verdicts[index] = verdict
        return verdicts

    def close(self) -> None:
        """End the sandbox, if there is one. The grader may be used again; `layer` keeps its answer."""
        if self._sandbox is not None:
            self._sandbox.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _module(self, task: str) -> ModuleType:
        if task not in self._modules:
            if task not in self._parts and is_path(task):
                raise UserError(f"a problem names its task by a file, {task!r}; it must be the name of one installed.")
            part = self._parts.get(task, task)
            self._modules[task] = part if isinstance(part, ModuleType) else load_part("tasks", part)
        return self._modules[task]

    def _open(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = Sandbox.open(self._layer, workers=self._workers, limits=self._limits)
        return self._sandbox


def _check_versions(module: ModuleType, problems: Sequence[Problem]) -> None:
    for problem in problems:
        if problem.version != module.VERSION:
            raise UserError(
                f"problem {problem.id} was made by version {problem.version} of task {problem.task}, and this is "
                f"version {module.VERSION}; make the problems again."
            )
