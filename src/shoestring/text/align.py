"""Tokenizations of one text side by side: the smallest groups of tokens that cover the same bytes.

`align` takes sides that are that text; `align_pieces` finds it in what each side writes around it (end tokens, spaces
and thinking tags of another chat template), word by word where a side has changed some of it (a normaliser, unknown
characters).

Ends are compared in bytes, so characters that a byte-level vocabulary splits are no special case. A vocabulary is read
as byte-level (GPT-2's stand-ins) when its tokenizer decodes so, else as SentencePiece's (a low bar for a space, <0xAB>
for a byte).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from shoestring.core.errors import UserError
from shoestring.text.tokenizer import Tokenizer

Group = tuple[range, ...]  # of each side's tokens
REACH = 64  # bytes that one side may have written differently before a word is looked for no further


@cache
def _stand_ins() -> dict[str, int]:
    """GPT-2's table: printable character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """What each id of the vocabulary stands for; added tokens stand for their own spelling."""
    tree = json.loads(tokenizer.backend())
    byte_level = "ByteLevel" in json.dumps(tree.get("decoder"))
    added = {token["id"]: token["content"] for token in tree["added_tokens"]}
    found = [b""] * tokenizer.vocab_size
    for token, index in tokenizer.vocabulary.items():
        if index in added:
            found[index] = added[index].encode()
        elif byte_level:
            found[index] = bytes(_stand_ins()[char] for char in token)
        elif (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)) is not None:
            found[index] = bytes.fromhex(byte[1])
        else:
            found[index] = token.replace("▁", " ").encode()
    return found


def align(*sides: Sequence[bytes]) -> list[Group]:
    """Groups (tokens of each side) in order; every token is in exactly one, and all sides of a group are one text.

    Raises UserError when the sides are not the same text.
    """
    if len({b"".join(side) for side in sides}) > 1:
        raise UserError(
            "student and teacher write the same answer as different text (their chat templates differ inside it), so "
            "their tokens cannot be aligned; give both the same template for answers."
        )
    return _between([0] * len(sides), len(b"".join(sides[0])), [_bounds(side) for side in sides])


def align_pieces(pieces: Sequence[bytes], *sides: Sequence[bytes]) -> tuple[list[Group], int, list[int]]:
    """(groups, bytes of the pieces that they cover, where the last piece ends in each side's tokens).

    The pieces stand in this order in each side. A word that a side does not hold where it should is left out; a group
    lies within a piece, so a token that reaches over its edge is in none, unless all it has there is white space.
    """
    wholes, bounds = [b"".join(side) for side in sides], [_bounds(side) for side in sides]
    at, groups, covered = [0] * len(sides), list[Group](), 0
    for piece in pieces:
        starts = _found(piece, wholes, at, reach=None)
        parts = [piece] if starts else re.findall(rb"\s*\S+", piece)
        for part in parts:
            starts = starts or _found(part, wholes, at, reach=REACH + len(part))
            if starts:
                for whole, each, start in zip(wholes, bounds, starts, strict=True):
                    _widen(whole, each, start, start + len(part))
                groups += (found := _between(starts, len(part), bounds))
                covered += sum(len(sides[0][token]) for group in found for token in group[0])
                at = [start + len(part) for start in starts]
            starts = None
    return groups, covered, [sum(end <= here for end in _every_end(side)) for side, here in zip(sides, at, strict=True)]


def _found(text: bytes, wholes: Sequence[bytes], at: Sequence[int], reach: int | None) -> list[int] | None:
    """Where `text` begins in every side, at most `reach` bytes on; None when one does not hold it."""
    ends = [None if reach is None else start + reach for start in at]
    starts = [whole.find(text, start, end) for whole, start, end in zip(wholes, at, ends, strict=True)]
    return None if -1 in starts else starts


def _widen(whole: bytes, bounds: dict[int, int], start: int, end: int) -> None:
    """Let tokens that reach over the edges of a text by white space alone begin and end there."""
    before, behind = start, end
    while before not in bounds:
        before -= 1
    while behind not in bounds:
        behind += 1
    if not whole[before:start].strip():
        bounds.setdefault(start, bounds[before])
    if not whole[end:behind].strip():
        bounds.setdefault(end, bounds[behind])


def _between(starts: Sequence[int], length: int, bounds: Sequence[dict[int, int]]) -> list[Group]:
    """The groups of a text of this length that begins there in each side."""
    sides = list(zip(starts, bounds, strict=True))
    places = [place for place in range(length + 1) if all(start + place in each for start, each in sides)]
    return [
        tuple(range(each[start + first], each[start + last]) for start, each in sides)
        for first, last in pairwise(places)
    ]


def _bounds(tokens: Sequence[bytes]) -> dict[int, int]:
    """Where a token begins or ends, in bytes -> number of tokens up to there, empty ones with the one before them."""
    return dict(zip(_every_end(tokens), range(1, len(tokens) + 1), strict=True)) | {0: 0}


def _every_end(tokens: Sequence[bytes]) -> list[int]:
    return list(accumulate(map(len, tokens)))
