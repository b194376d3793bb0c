"""Advantages of a group of completions of one problem.

    grpo     A_i = (r_i - mean r) / std r      DeepSeekMath (arXiv 2402.03300) section 4.1; population std
    dr_grpo  A_i = r_i - mean r                Dr. GRPO (arXiv 2503.20783): no up-weighting of easy or hard groups

A group of equal rewards carries no signal: all its advantages are 0 (never 0/0, never noise over an epsilon).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal


def carries_signal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ. Tested on the spread, so that continuous rewards count too."""
    return max(rewards) - min(rewards) > 1e-9


def advantages(rewards: Sequence[float], kind: Literal["grpo", "dr_grpo"]) -> list[float]:
    """One advantage for each reward of the group; they sum to 0."""
    if not carries_signal(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards) if kind == "grpo" else 1.0
    return [(r - mean) / scale for r in rewards]
