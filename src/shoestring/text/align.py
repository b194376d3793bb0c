"""Tokenizations of one text side by side: the smallest groups of tokens that cover the same bytes.

Ends are compared in bytes, so characters that a byte-level vocabulary splits are no special case. A vocabulary is read
as byte-level (GPT-2's stand-ins) when its tokenizer decodes so, else as SentencePiece's (a low bar for a space, <0xAB>
for a byte).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from shoestring.core.errors import UserError
from shoestring.text.tokenizer import Tokenizer

Group = tuple[range, ...]  # of each side's tokens


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
    ends = [_ends(side) for side in sides]
    groups: list[Group] = []
    begins = [0] * len(sides)
    for end in sorted(set.intersection(*(set(each) for each in ends))):
        groups.append(tuple(range(begin, each[end]) for begin, each in zip(begins, ends, strict=True)))
        begins = [each[end] for each in ends]
    return groups


def _ends(tokens: Sequence[bytes]) -> dict[int, int]:
    """End in bytes -> number of tokens up to there, empty tokens with the one before them."""
    found, at = {}, 0
    for count, token in enumerate(tokens, 1):
        at += len(token)
        found[at] = count
    return found
