"""What the step model leaves out, estimated from published runs: six constants with priors, and two spreads.

log(real / predicted time) = the sum of those that apply of
`steady`: every run; `whole`: hours of a whole run rather than a measured rate (restarts, evaluation, slow starts);
`undocumented`: the fabric, and so usually the layout, is not stated; `experts`: a mixture of experts in 16 bits;
`half`: a whole run in FP16 with loss scaling, so on an older stack; `optimism`: times log(predicted utilisation /
0.45), because what looks fast on paper falls further short.
Priors (normal) come from facts outside the table: goodput 0.65-1.0 with centre 0.85 (Llama 3: over 90% effective
time), small MoE models losing a quarter (karpathy/nanochat: 46% dense to 35% MoE). `half` and `optimism` were added
after looking at the misses, so their merit shows only on runs outside the table. Rows of one study share its
weight, as they share its software. DeepSeek-V3 is the worked example, so no constant is ever fitted to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

from shoestring.cost.rows import Run

NAMES = ("steady", "whole", "undocumented", "experts", "half", "optimism")
PRIOR = (0.05, 0.12, 0.15, 0.25, 0.10, 0.30)
PRIOR_SD = (0.08, 0.12, 0.20, 0.25, 0.20, 0.20)
USUAL_MFU = 0.45
SD_WHOLE, SD_STEADY = 0.25, 0.13  # of the log, between runs: facts of 20 runs and of layout-known benchmarks
Z80 = 1.2816  # half-width of an 80% interval in standard deviations
WORKED_EXAMPLE = "DeepSeek-V3"
FITTED_CONSTANTS = len(NAMES)

Vector = tuple[float, ...]
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """One run's features, log slowness, its own spread and the study it is from."""

    id: str
    model: str
    study: str
    features: Vector
    steady: bool
    slowness: float
    spread: float


@dataclass(frozen=True, slots=True)
class Residual:
    """Posterior of the constants."""

    mean: Vector
    covariance: Matrix
    rows: int

    def at(self, features: Vector, *, steady: bool, spread: float = 0.0) -> tuple[float, float]:
        """(mean, standard deviation) of log slowness for a run with these features."""
        centre = sum(w * x for w, x in zip(self.mean, features, strict=True))
        doubt = sum(a * c * b for a, line in zip(features, self.covariance, strict=True)
                    for c, b in zip(line, features, strict=True))  # fmt: skip
        noise = SD_STEADY if steady else SD_WHOLE
        return centre, sqrt(doubt + noise**2 + spread**2)


def features_of(run: Run, mfu: float) -> Vector:
    """Which constants apply to a run whose predicted utilisation is `mfu`."""
    slow_experts = run.moe and run.fixed.get("precision") != "fp8"
    return features(not run.metered, run.documented, slow_experts, run.half and not run.steady, mfu)


def features(unmetered: bool, documented: bool, slow_experts: bool, half: bool, mfu: float) -> Vector:
    """The vector that NAMES names."""
    flags = (True, not unmetered, not documented, slow_experts, half)
    return (*(float(f) for f in flags), log(mfu / USUAL_MFU))


def fit(observations: Iterable[Observation]) -> Residual:
    """Posterior mean and covariance of the constants by weighted least squares with the priors above."""
    rows = [o for o in observations if not o.model.startswith(WORKED_EXAMPLE)]
    sizes = Counter(o.study for o in rows)
    n = len(NAMES)
    precision = [[(1 / PRIOR_SD[i] ** 2 if i == j else 0.0) for j in range(n)] for i in range(n)]
    target = [PRIOR[i] / PRIOR_SD[i] ** 2 for i in range(n)]
    for row in rows:
        noise = (SD_STEADY if row.steady else SD_WHOLE) ** 2 + row.spread**2
        weight = 1 / noise / sizes[row.study]
        for i in range(n):
            target[i] += weight * row.features[i] * row.slowness
            for j in range(n):
                precision[i][j] += weight * row.features[i] * row.features[j]
    covariance = inverse(precision)
    mean = tuple(sum(c * t for c, t in zip(line, target, strict=True)) for line in covariance)
    return Residual(mean, covariance, len(rows))


def inverse(matrix: Sequence[Sequence[float]]) -> Matrix:
    """Gauss-Jordan; the matrix is positive definite by its priors."""
    n = len(matrix)
    work = [[*row, *(1.0 if i == j else 0.0 for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        work[i] = [x / work[i][i] for x in work[i]]
        for k in range(n):
            if k != i:
                work[k] = [a - work[k][i] * b for a, b in zip(work[k], work[i], strict=True)]
    return tuple(tuple(row[n:]) for row in work)


@dataclass(frozen=True, slots=True)
class Interval:
    """An 80% interval around a middle value."""

    low: float
    mid: float
    high: float

    def scaled(self, by: float) -> Interval:
        return Interval(self.low * by, self.mid * by, self.high * by)

    def to_dict(self) -> dict[str, float]:
        return {"low": self.low, "mid": self.mid, "high": self.high}


def interval(value: float, centre: float, sd: float, *, inverse: bool = False) -> Interval:
    """`value` slowed by exp(centre +- 1.28 sd); a rate rather than a time is divided."""
    sign = -1 if inverse else 1
    ends = sorted(value * exp(sign * (centre + z * sd)) for z in (-Z80, Z80))
    return Interval(ends[0], value * exp(sign * centre), ends[1])
