"""1 for a finished, well-formed completion whose answer is right, else 0.

Only what stands after `</think>` counts, and only when the completion ended by itself: an answer cut off by the
length limit is not an answer, even if what there is of it happens to be right. DeepSeek-R1 (2501.12948), section 2.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoestring.core.nouns import Problem, Rollout
from shoestring.tasks.grading import gradable
from shoestring.text.chat import split_thinking

RANGE = (0.0, 1.0)
JUDGES_CORRECTNESS = True

Grade = Callable[[Sequence[tuple[Problem, str]]], list[bool]]


def reward(rollouts: Sequence[Rollout], *, grade: Grade) -> list[float]:
    """1.0 or 0.0 for each rollout; one call of `grade` for all that have an answer."""
    answers = {index: answer for index, rollout in enumerate(rollouts) if (answer := _answer(rollout))}
    verdicts = grade([(rollouts[index].problem, answer) for index, answer in answers.items()]) if answers else []
    right = {index for index, verdict in zip(answers, verdicts, strict=True) if verdict}
    return [float(index in right) for index in range(len(rollouts))]


def _answer(rollout: Rollout) -> str:
    text = rollout.completion.text
    return gradable(split_thinking(text)[1], rollout.completion.finish_reason) if isinstance(text, str) else ""
