"""Golden numbers, brute force, and calibration of the statistics."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from shoestring.core.errors import UserError
from shoestring.evals.paired import compare, paired_bootstrap
from shoestring.evals.passk import cons_at_k, mean_and_stderr, pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "value"), [(8, 2, 2, 0.4643), (10, 3, 5, 0.916667), (5, 0, 5, 0.0), (5, 5, 1, 1.0), (8, 2, 1, 0.25)]
)
def test_pass_at_k_golden(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("c", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(c: int, k: int) -> None:
    samples = [True] * c + [False] * (6 - c)
    subsets = [any(subset) for subset in combinations(samples, k)]
    assert pass_at_k(6, c, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= c <= n"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "correct", "value"),
    [
        (["7", "7", "3"], [True, True, False], 1.0),
        (["3", "7", "3"], [False, True, False], 0.0),
        (["7", "3"], [True, False], 0.5),
        (["7", "3", "4"], [True, False, False], 1 / 3),
        ([" 7", "7 ", "3"], [True, True, False], 1.0),
        (["", "", "7"], [False, False, True], 1.0),  # no answer has no vote
        (["", ""], [False, False], 0.0),
        (["7"], [True], 1.0),
    ],
)
def test_cons_at_k(answers: list[str], correct: list[bool], value: float) -> None:
    assert cons_at_k(answers, correct) == pytest.approx(value)


def test_mean_and_stderr() -> None:
    values = [0.0, 0.5, 1.0, 1.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(np.mean(values))
    assert stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_and_stderr([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="no problems"):
        mean_and_stderr([])


def test_the_stderr_of_one_sample_at_seven_in_ten() -> None:
    """30 problems at p = .7: 8.4 points (sqrt(.21 / 30), with n - 1)."""
    _, stderr = mean_and_stderr([1.0] * 21 + [0.0] * 9)
    assert stderr == pytest.approx((0.21 / 29) ** 0.5)
    assert stderr == pytest.approx(0.084, abs=2e-3)


def test_a_paired_comparison_sees_what_an_unpaired_one_cannot() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random(200)
    a, b = difficulty + 0.03 + 0.01 * rng.standard_normal(200), difficulty
    result = paired_bootstrap(a.tolist(), b.tolist())
    assert result.difference == pytest.approx(float((a - b).mean()))
    assert result.low < 0.03 < result.high
    assert result.low > 0
    assert result.p_value == pytest.approx(2 / 10_001)
    assert result.stderr == pytest.approx(float((a - b).std(ddof=1)) / 200**0.5, rel=0.1)


def test_the_bootstrap_is_seeded_and_antisymmetric() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0, 0.5] * 8, [0.0, 0.5, 1.0, 0.0, 0.5] * 8
    one, same, other = (paired_bootstrap(a, b, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    back = paired_bootstrap(b, a, seed=1)
    assert (back.difference, back.low) == pytest.approx((-one.difference, -one.high))
    assert paired_bootstrap(a, a).p_value == 1.0


def test_the_bounds_hold_the_central_95_percent() -> None:
    """Of a mean of 400 normal numbers: 1.96 standard errors to either side."""
    gap = np.random.default_rng(1).standard_normal(400)
    result = paired_bootstrap(gap.tolist(), [0.0] * 400)
    assert (result.high - result.low) / 2 / result.stderr == pytest.approx(1.96, rel=0.03)
    assert (result.high + result.low) / 2 == pytest.approx(gap.mean(), abs=0.01)


def test_false_alarms_are_rare() -> None:
    """Two equal models over 60 problems: about one comparison in twenty has p < .05."""
    rng = np.random.default_rng(3)
    alarms = sum(
        paired_bootstrap(rng.random(60).tolist(), rng.random(60).tolist(), resamples=400).p_value < 0.05
        for _ in range(300)
    )
    assert 3 <= alarms <= 33


def test_compare_matches_by_id() -> None:
    a, b = {"p": 1.0, "q": 0.0, "r": 1.0}, {"r": 0.5, "q": 0.0, "p": 0.0}
    assert compare(a, b).difference == pytest.approx(0.5)
    assert compare(a, b) == paired_bootstrap([1.0, 0.0, 1.0], [0.0, 0.0, 0.5])  # its spread too is that of the pairs
    assert compare(a, b) == compare(dict(reversed(a.items())), b)
    with pytest.raises(UserError, match="differ in 2 problems"):
        compare({"p": 1.0, "q": 0.0}, {"p": 1.0, "r": 0.0})
    with pytest.raises(UserError, match="differ in 1 problems"):
        compare(a | {"s": 1.0}, b)
    with pytest.raises(UserError, match="at least 2 problems"):
        compare({"p": 1.0}, {"p": 0.0})
