"""Soft overlong punishment: 0 up to a length, then linearly down to -1 at the limit.

DAPO (2503.14476), equation 13: 0 for T <= L - C; (L - C - T) / C up to L; -1 beyond, with L `max_tokens`, C
`buffer_tokens` and T the sampled tokens, the end token included. A completion cut off at L so scores -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Rollout

RANGE = (-1.0, 0.0)
JUDGES_CORRECTNESS = False


def reward(
    rollouts: Sequence[Rollout],
    *,
    grade: Callable[..., Any] | None = None,
    max_tokens: int = 128,
    buffer_tokens: int = 32,
) -> list[float]:
    """A number in [-1, 0] for each rollout; `grade` is not used. Raises UserError unless 0 < buffer <= max."""
    if not 0 < buffer_tokens <= max_tokens:
        raise UserError(f"length reward: buffer_tokens is {buffer_tokens}; it must be between 1 and max_tokens.")
    free = max_tokens - buffer_tokens
    return [max(-1.0, min(0.0, (free - len(r.completion.token_ids)) / buffer_tokens)) for r in rollouts]
