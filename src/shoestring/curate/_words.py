"""Texts as numbers: each word a 64-bit hash, each run of n words another, many texts in one array.

Words are runs of letters and digits in one case, and every Chinese, Japanese or Korean letter is one; however they are
encoded: accents apart or not, full-width or not, with invisible marks or without (Unicode's NFKC and case folding). A
word's hash is BLAKE2b's, so that two processes agree; it is computed once a word. All else is numpy over the batch.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shoestring.core.nouns import Trace

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
MOST_KNOWN = 2_000_000  # words remembered before all are forgotten: 200 MB at most
MIX = np.uint64(0x9E3779B97F4A7C15)


def words_in(text: str) -> list[str]:
    """The words of a text, in order."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()
    return WORD.findall(text.lower())


class Words:
    """Hashes of the words of texts; `known` words are looked up."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(hashes of all words in order, where each text begins and the last one ends)."""
        known, flat, ends = self._known, list[int](), [0]
        for text in texts:
            words = words_in(text)
            try:
                flat += [known[word] for word in words]
            except KeyError:
                flat += [self._hash(word) for word in words]
            ends.append(len(flat))
        return np.array(flat, np.uint64), np.array(ends, np.int64)

    def _hash(self, word: str) -> int:
        found = self._known.get(word)
        if found is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            found = self._known[word] = int.from_bytes(digest, "little")
        return found


def runs(words: NDArray[np.uint64], ends: NDArray[np.int64], n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of every run of `n` words within a text, and (like `ends`) where each text's runs begin.

    A text of fewer words has none.
    """
    counts = np.maximum(np.diff(ends) - n + 1, 0)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    if len(words) < n or not counts.any():
        return np.zeros(0, np.uint64), bounds
    with np.errstate(over="ignore"):
        mixed = words[: len(words) - n + 1].copy()
        for place in range(1, n):
            mixed = (mixed ^ (mixed >> np.uint64(29))) * MIX + words[place : len(words) - n + 1 + place]
    inside = np.ones(len(mixed), bool)
    for start, end in pairwise(ends):  # runs that begin in the last n - 1 words cross over
        inside[max(int(start), int(end) - n + 1) : int(end)] = False
    return mixed[inside], bounds


def question(trace: Trace) -> str:
    """What the user asked last, as text."""
    content = trace.messages[-1].get("content") if trace.messages else ""
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def said(trace: Trace) -> str:
    """Thinking and answer."""
    return f"{trace.thinking}\n{trace.answer}" if trace.thinking else trace.answer
