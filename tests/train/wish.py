"""Likes even token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Rollout

RANGE = (0.0, 1.0)
JUDGES_CORRECTNESS = False


def reward(rollouts: Sequence[Rollout], *, grade: Any) -> list[float]:
    """The share of even ids."""
    ids = [rollout.completion.token_ids for rollout in rollouts]
    return [sum(i % 2 == 0 for i in row) / max(1, len(row)) for row in ids]
