"""Drop answers that mix scripts: a chain of thought that changes from one language into another and back.

R1's cold start removed them (arXiv 2501.12948 section 2.3.3). Letters are counted by script, which tells English from
Chinese or Russian and not from French; Greek is let pass beside any, for formulas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._words import said

STATELESS = True
SCRIPTS = {
    "Latin": r"A-Za-zÀ-ɏ",
    "Cyrillic": r"Ѐ-ӿ",
    "Chinese or Japanese": r"぀-ヿ㐀-鿿",
    "Korean": r"가-힣",
    "Arabic": r"؀-ۿ",
    "Hebrew": r"֐-׿",
    "Devanagari": r"ऀ-ॿ",
    "Thai": r"฀-๿",
}
FOUND = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}


def judge(traces: Iterable[Trace], *, most: float = 0.02) -> Iterator[str]:
    """Yield "mixes ..." where more than `most` of the letters are not of the commonest script. Raises UserError."""
    if not 0 <= most < 1:
        raise UserError(f"one_language: most is {most}; it must be from 0 to 1.")
    for trace in traces:
        text = said(trace)
        if text.isascii():
            yield ""
            continue
        counts = {name: len(pattern.findall(text)) for name, pattern in FOUND.items()}
        main = max(counts, key=lambda name: counts[name])
        other = max((name for name in counts if name != main), key=lambda name: counts[name])
        whole = sum(counts.values())
        mixed = whole and (whole - counts[main]) / whole > most
        yield f"mixes {main} and {other}" if mixed else ""
