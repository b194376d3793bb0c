"""Advantages: golden values of the papers' formulas, and no signal from equal rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Problem, Rollout
from shoestring.train.rollouts import advantages, carries_signal, reward_groups


def test_golden_values() -> None:
    assert advantages([1, 0, 0, 1], "grpo") == [1, -1, -1, 1]
    assert advantages([1, 0, 0, 0], "grpo") == pytest.approx([1.732051, -0.577350, -0.577350, -0.577350], abs=1e-6)
    assert advantages([1, 0, 0, 0], "dr_grpo") == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2])
def test_equal_rewards_carry_no_signal(value: float) -> None:
    assert not carries_signal([value] * 8)
    assert advantages([value] * 8, "grpo") == [0.0] * 8


def test_a_small_spread_is_a_signal_and_rounding_is_none() -> None:
    assert carries_signal([0.5, 0.501]) and advantages([0.5, 0.501], "grpo") == pytest.approx([-1.0, 1.0])
    assert not carries_signal([0.1 + 0.2, 0.3])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=16))
def test_advantages_sum_to_zero_and_keep_the_order(rewards: list[float]) -> None:
    found = advantages(rewards, "dr_grpo")
    assert sum(found) == pytest.approx(0, abs=1e-6)
    if carries_signal(rewards):
        assert found[rewards.index(max(rewards))] == max(found)  # rewards that differ by 1e-111 may round to equals


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_reward_that_is_no_number_is_said(value: str, tmp_path: Path) -> None:
    """NaN is no larger than anything: its group would be dropped as one of equal rewards."""
    path = tmp_path / "odd.py"
    path.write_text(f'"""Odd."""\n\ndef reward(rollouts, *, grade):\n    return [1.0, float("{value}")]\n')
    problem = Problem(task="task", version="1", id="p7", prompt="1 + 1?", gold="2", difficulty=1, seed=0)
    group = [Rollout(problem, [1], Completion("2", [2], [-1.0], "stop")) for _ in range(2)]
    with pytest.raises(UserError, match=f"gives {value} for an answer to p7"):
        reward_groups([group], {str(path): 1.0}, lambda pairs: [True] * len(pairs))
