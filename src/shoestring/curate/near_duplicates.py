"""Drop near repeats: answers to any question whose runs of words are nearly those of an earlier one.

MinHash-LSH (Broder 1997; Indyk and Motwani 1998) over runs of 5 words of question, thinking and answer; the hashes are
the library rensa's, the bands are found equal by sorting. `bands` of `rows` hashes each meet, for a pair of Jaccard
similarity s, with probability 1 - (1 - s^rows)^bands: 0.998 at 0.8 with 21 x 6. A pair that meets is a repeat when the
similarity estimated from all hashes is at least `threshold` less two and a half standard errors: hardly a pair at the
threshold is missed, and some a little below it are taken too. Words are compared as they read, not as they are encoded.
A trace takes 0.7 kB of memory. Shorter texts are left to `dedup`; in a bucket a text is compared with the bucket's
first and with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._words import Words, question, runs, said

STATELESS = False
CHUNK = 1000
SEED = 42


def judge(
    traces: Iterable[Trace], *, threshold: float = 0.8, n: int = 5, bands: int = 21, rows: int = 6
) -> Iterator[str]:
    """Yield "near repeat" for all but the first of texts that are alike. Raises UserError."""
    if not 0 < threshold <= 1 or min(n, bands, rows) < 1:
        raise UserError("near_duplicates: threshold must be above 0 and at most 1; n, bands and rows at least 1.")
    hashes, short = _hashes(traces, n, bands * rows)
    if not len(hashes):
        return
    cut = threshold - 2.5 * sqrt(threshold * (1 - threshold) / (bands * rows))
    repeats = find_repeats(hashes, bands, cut) & ~short
    yield from ("near repeat" if repeat else "" for repeat in repeats)


def find_repeats(hashes: NDArray[np.uint32], bands: int, cut: float) -> NDArray[np.bool_]:
    """Which rows of `hashes` [texts, hashes] are alike to an earlier one that shares a band."""
    texts = len(hashes)
    repeats = np.zeros(texts, bool)
    width = hashes.shape[1] // bands
    weights = np.random.default_rng(SEED).integers(1, 2**63, width, dtype=np.uint64) | np.uint64(1)
    for band in range(bands):
        with np.errstate(over="ignore"):
            keys = (hashes[:, band * width : (band + 1) * width].astype(np.uint64) * weights).sum(
                axis=1, dtype=np.uint64
            )
        order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the texts
        same = keys[order][1:] == keys[order][:-1]
        later, before = order[1:][same], order[:-1][same]
        starts = np.concatenate([[True], ~same])
        first = order[np.maximum.accumulate(np.where(starts, np.arange(texts), 0))][1:][same]
        for other in (before, first):
            open_ = ~repeats[later]
            one, two = later[open_], other[open_]
            for start in range(0, len(one), 1 << 16):
                some = slice(start, start + (1 << 16))
                alike = (hashes[one[some]] == hashes[two[some]]).mean(axis=1) >= cut
                repeats[one[some][alike]] = True
    return repeats


def _hashes(traces: Iterable[Trace], n: int, count: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """MinHashes of every text [texts, count], and which texts are too short to have any."""
    try:
        from rensa import RMinHash
    except ModuleNotFoundError:
        raise UserError('near_duplicates needs rensa: pip install "shoestring[ask]".') from None
    words = Words()
    stream = iter(traces)
    parts, short = [], []
    while chunk := list(islice(stream, CHUNK)):
        found, bounds = runs(*words.of([f"{question(trace)}\n{said(trace)}" for trace in chunk]), n)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(found, bounds.astype(np.uint64), count, SEED)
        parts.append(np.array(matrix.to_rows(), np.uint32))
        short.append(np.diff(bounds) == 0)
    if not parts:
        return np.zeros((0, count), np.uint32), np.zeros(0, bool)
    return np.concatenate(parts), np.concatenate(short)
