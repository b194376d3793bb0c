"""Learning-rate schedules as pure functions: a resumed run needs no state.

Linear warm-up, then `constant` (R1's RL), `cosine`, or `wsd`: warm-up, stable, linear decay over the last
`decay_share` of the budget (DeepSeek-V3 section 4.2 has the first two parts and a cosine for the third).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

Schedule = Literal["constant", "cosine", "wsd"]


class ScheduleOptions(Protocol):
    """The part of a stage's `optim` that shapes the schedule."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def final_ratio(self) -> float: ...
    @property
    def decay_share(self) -> float: ...


def lr_at(step: int, *, progress: float, optim: ScheduleOptions) -> float:
    """Learning rate of update `step` (0-based) when the share `progress` of the budget is spent."""
    warm = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    if optim.schedule == "constant":
        return optim.lr * warm
    start = 0.0 if optim.schedule == "cosine" else 1.0 - optim.decay_share
    spent = min(1.0, max(0.0, (progress - start) / max(1e-9, 1.0 - start)))
    shape = 0.5 * (1 + math.cos(math.pi * spent)) if optim.schedule == "cosine" else 1 - spent
    return optim.lr * warm * (optim.final_ratio + (1 - optim.final_ratio) * shape)
