"""What a stage is given: its run directory, its inputs, the machine; and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoestring.core.errors import UserError
from shoestring.core.progress import Progress
from shoestring.core.run import Run
from shoestring.train.machine import Machine


@dataclass(slots=True)
class Outcome:
    """What a finished stage leaves: files to hash, one headline number, and what it spent.

    `tokens` counts everything read, trained on and written; `sampled_tokens` are those of them that sampling read and
    wrote. `train_flops` is what a control must match: the FLOPs spent on training the stage's model, rollouts included.
    """

    outputs: list[Path]
    headline_metric: dict[str, Any] | None
    tokens: int
    flops: float
    train_flops: float = 0.0
    sampled_tokens: int = 0


@dataclass(slots=True)
class Context:
    """The run directory and inputs of one attempt at one stage."""

    run: Run
    inputs: dict[str, Run | Path]
    machine: Machine
    usd_per_hour: float
    quiet: bool = False

    def progress(self, total: int | float, unit: str = "steps") -> Progress:
        return Progress(total, title=self.run.name, unit=unit, usd_per_hour=self.usd_per_hour, quiet=self.quiet)

    def note_sandbox(self, layer: str | None) -> None:
        """Record the sandbox that graded. None says that nothing had to run: what is recorded already stays."""
        if layer is not None and layer != self.run.manifest["sandbox"]:
            self.run.note(sandbox=layer)

    def input_run(self, role: str) -> Run:
        found = self.inputs.get(role)
        if not isinstance(found, Run):
            raise UserError(f'{self.run.name}: input "{role}" must be a finished run, not {found}.')
        return found

    def checkpoint_of(self, role: str) -> Path:
        """The folder of weights behind an input: a run's last checkpoint, or a folder in Hugging Face layout."""
        found = self.inputs.get(role)
        if found is None:
            raise UserError(f'{self.run.name}: input "{role}" is missing; name a stage, a run or a model folder.')
        if isinstance(found, Path):
            return found
        latest = found.latest_checkpoint()
        if latest is None:
            raise UserError(f'{self.run.name}: input "{role}" is {found.name}, {found.without_checkpoint()}.')
        return latest[1]

    def folder_of(self, role: str, name: str) -> Path:
        """The folder `name` that a run left, or a folder as given."""
        found = self.inputs.get(role)
        if found is None:
            raise UserError(f'{self.run.name}: input "{role}" is missing; name a stage, a run or a folder.')
        return found if isinstance(found, Path) else found.path / name

    def budget_flops(self, roles: tuple[str, ...]) -> float:
        """Training FLOPs that the named inputs spent together."""
        return sum(float(self.input_run(role).manifest["cost"]["train_flops"]) for role in roles)


def step_generator(seed: int, *path: int) -> torch.Generator:
    """A generator that depends only on the seed and where we are: resuming needs no saved RNG state."""
    mixed = seed & 0xFFFFFFFF
    for part in path:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)


def derived_seed(seed: int, *path: int) -> int:
    """A 62-bit integer seed for whoever takes one (tasks, the engine)."""
    return int(torch.randint(0, 1 << 62, (1,), generator=step_generator(seed, *path)).item())
