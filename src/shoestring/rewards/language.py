"""The share of the thinking's words that are written in the script of the wanted language.

R1's language consistency (2501.12948, section 2.3.2) is the share of words in the target language. Here a word belongs
to a language when its letters belong to its script, which tells English from Chinese or Russian and not from French:
the mixing R1 fought is seen, and no model or word list is needed. Chinese, Japanese and Korean letters count as a
word each. Thinking without any word (digits and signs) mixes nothing and scores 1; no thinking scores 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.nouns import Rollout
from shoestring.text.chat import split_thinking

RANGE = (0.0, 1.0)
JUDGES_CORRECTNESS = False

SCRIPTS = {  # language: how the Unicode names of its letters begin
    **dict.fromkeys(("en", "de", "es", "fr", "it", "nl", "pl", "pt", "tr", "vi"), ("LATIN",)),
    **dict.fromkeys(("bg", "ru", "uk"), ("CYRILLIC",)),
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "th": ("THAI",),
    "zh": ("CJK",),
}
ALONE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")  # written without spaces, or nearly: each letter is a word
WORD = re.compile(r"[^\W\d_]+")


def reward(
    rollouts: Sequence[Rollout], *, grade: Callable[..., Any] | None = None, language: str = "en"
) -> list[float]:
    """A number in [0, 1] for each rollout; `grade` is not used. Raises UserError for an unknown language."""
    if language not in SCRIPTS:
        raise UserError(f'language "{language}" is not known to the language reward.{did_you_mean(language, SCRIPTS)}')
    return [_share(rollout.completion.text, SCRIPTS[language]) for rollout in rollouts]


def _share(text: object, scripts: tuple[str, ...]) -> float:
    thinking = split_thinking(text)[0] if isinstance(text, str) else None
    if not thinking:
        return 0.0
    words = [word for run in WORD.findall(thinking) for word in _words(run)]
    return sum(all(_script(letter) in scripts for letter in word) for word in words) / len(words) if words else 1.0


def _words(run: str) -> list[str]:
    """A run of letters as words: cut around every letter that stands alone."""
    words, current = [], ""
    for letter in run:
        if _script(letter) in ALONE:
            words += [current, letter] if current else [letter]
            current = ""
        else:
            current += letter
    return [*words, current] if current else words


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0]
