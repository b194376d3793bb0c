"""Minus the share of repeated n-grams among the sampled tokens: 0 for none, towards -1 for a loop.

-(1 - unique / total) over runs of `n` tokens: the penalty of Demystifying Long Chain-of-Thought (2502.03373) without
its weighting by position. Tokens, not words: what is sampled is what is punished, whatever it decodes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Rollout

RANGE = (-1.0, 0.0)
JUDGES_CORRECTNESS = False


def reward(rollouts: Sequence[Rollout], *, grade: Callable[..., Any] | None = None, n: int = 8) -> list[float]:
    """A number in (-1, 0] for each rollout; `grade` is not used. Fewer than `n` tokens repeat nothing."""
    if n < 1:
        raise UserError(f"repetition reward: n is {n}; it must be at least 1.")
    return [_score(rollout.completion.token_ids, n) for rollout in rollouts]


def _score(token_ids: Sequence[int], n: int) -> float:
    total = len(token_ids) - n + 1
    if total < 1:
        return 0.0
    unique = len({tuple(token_ids[start : start + n]) for start in range(total)})
    return unique / total - 1.0
