"""Drop answers that run in circles: too many of their runs of words stood there before.

The share of repeated runs of `n` words among all of them, as the repetition reward counts tokens (arXiv 2502.03373);
short texts repeat nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._words import said, words_in

STATELESS = True
SHORTEST = 50  # words; a shorter answer is no loop


def judge(traces: Iterable[Trace], *, n: int = 8, most: float = 0.3) -> Iterator[str]:
    """Yield "repeats itself" where more than `most` of the runs of `n` words are repeats. Raises UserError."""
    if n < 1 or not 0 <= most <= 1:
        raise UserError(f"repeated: n is {n} and most is {most}; n must be at least 1 and most from 0 to 1.")
    for trace in traces:
        words = words_in(said(trace))
        total = len(words) - n + 1
        if len(words) < SHORTEST or total < 1:
            yield ""
            continue
        runs = zip(*(words[i : total + i] for i in range(n)), strict=True)
        share = 1 - len({hash(run) for run in runs}) / total  # of 10 MB of text the runs themselves would be 1 GB
        yield "repeats itself" if share > most else ""
