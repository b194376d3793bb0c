"""Is one model better than another on the same problems? A paired bootstrap over problems.

Both models answer the same problems, so what a problem's difficulty adds to both cancels in the difference.
Resampling problems with replacement gives the spread of the mean difference (Efron & Tibshirani, 1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoestring.core.errors import UserError


@dataclass(frozen=True, slots=True)
class Paired:
    """`difference` is mean(a) - mean(b); `low` and `high` bound its central 95 %; `p_value` is two-sided."""

    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    problems: int
    resamples: int
    seed: int


def compare(a: dict[str, float], b: dict[str, float], *, seed: int = 0, resamples: int = 10_000) -> Paired:
    """Compare two models' values by problem id (see `EvalResult.scores`). Raises UserError unless the ids are equal."""
    if a.keys() != b.keys():
        only = len(a.keys() ^ b.keys())
        raise UserError(f"the two evaluations differ in {only} problems; evaluate both on the same seed and mix.")
    order = sorted(a)
    return paired_bootstrap([a[key] for key in order], [b[key] for key in order], seed=seed, resamples=resamples)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> Paired:
    """Compare values of the same problems in the same order."""
    gap_P = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    P = len(gap_P)
    if P < 2:
        raise UserError(f"a paired comparison needs at least 2 problems, not {P}.")
    rng = np.random.default_rng(seed)
    means = np.array([gap_P[rng.integers(0, P, P)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    # Share of resamples on the other side of 0, counting the sample itself, so that it is never exactly 0.
    other_side = min((means <= 0).sum(), (means >= 0).sum())
    return Paired(
        difference=float(gap_P.mean()),
        stderr=float(means.std(ddof=1)),
        low=float(low),
        high=float(high),
        p_value=float(min(1.0, 2 * (other_side + 1) / (resamples + 1))),
        problems=P,
        resamples=resamples,
        seed=seed,
    )
