"""pass@k, cons@k, and the standard error of a mean over problems.

pass@k is the unbiased estimator of Chen et al. (arXiv 2107.03374): of n samples of a problem c are right, and

    pass@k = 1 - C(n - c, k) / C(n, k)

cons@k is R1's (arXiv 2501.12948): the answer that most of k samples agree on is right. Standard errors are over
problems (standard deviation of the per-problem values / sqrt(problems)): the samples of one problem are not
independent evidence about the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples, drawn from n of which c are right, is right."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def cons_at_k(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Whether the majority's answer is right: 1 or 0, and the share of right ones among answers that tie.

    Equal text (surrounding white space apart) is one answer; an empty one, no answer at all, has no vote.
    """
    votes = Counter(stripped for answer in answers if (stripped := answer.strip()))
    if not votes:
        return 0.0
    verdict = {answer.strip(): right for answer, right in zip(answers, correct, strict=True)}
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    return sum(verdict[answer] for answer in leaders) / len(leaders)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over problems and its standard error; the error of a single value is unknown (None)."""
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no problems is undefined")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
