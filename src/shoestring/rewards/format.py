"""1 for `<think>thinking</think>answer` with each tag once and an answer, else 0.

Rules only, as in DeepSeek-R1-Zero (2501.12948), section 2.2.2. An empty thinking is well-formed: whether to think is
the model's choice, and the reward for being right decides it; `thinking` True asks for some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shoestring.core.nouns import Rollout
from shoestring.text.chat import split_thinking

RANGE = (0.0, 1.0)
JUDGES_CORRECTNESS = False


def reward(
    rollouts: Sequence[Rollout], *, grade: Callable[..., Any] | None = None, thinking: bool = False
) -> list[float]:
    """1.0 or 0.0 for each rollout; `grade` is not used."""
    return [_score(rollout.completion.text, thinking) for rollout in rollouts]


def _score(text: object, thinking: bool) -> float:
    thought, answer = split_thinking(text) if isinstance(text, str) else (None, "")
    return float(answer != "" and (not thinking or thought != ""))  # malformed text has no answer
