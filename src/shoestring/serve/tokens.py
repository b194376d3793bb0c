"""What each token id stands for, in bytes: logprobs carry them, because a token need not be whole characters.

Byte-level vocabularies (GPT-2 and all that follow it) spell the 256 bytes as printable characters; SentencePiece ones
spell unknown bytes <0x0A> and a space as U+2581. The table of the former is GPT-2's, built, not copied.
"""

from __future__ import annotations

import re
from functools import cache

from shoestring.text.tokenizer import Tokenizer

Bytes = bytes  # the name of a method below
_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _stand_ins() -> dict[str, int]:
    """Character -> byte. Printable latin characters stand for themselves; the others for 256, 257, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


class TokenTexts:
    """Bytes and shown text of the ids of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, Bytes] = {}
        self._special = set(tokenizer.specials.values())
        space = tokenizer.encode(" x")
        self._byte_level = any("Ġ" in (tokenizer.piece(index) or "") for index in space)
        self.longest = max((len(self.bytes(index)) for index in range(tokenizer.vocab_size)), default=1)

    def bytes(self, index: int) -> Bytes:
        """What the id adds to the text; b"" for an id without a token."""
        found = self._known.get(index)
        if found is None:
            found = self._known[index] = self._make(index)
        return found

    def _make(self, index: int) -> Bytes:
        piece = self.tokenizer.piece(index)
        if piece is None:
            return b""
        if index in self._special:
            return piece.encode()
        if self._byte_level:
            table = _stand_ins()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
            return piece.encode()
        if found := _HEX.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("▁", " ").encode()

    def text(self, index: int) -> str:
        """The bytes as text; what is not whole characters shows U+FFFD."""
        return self.bytes(index).decode("utf-8", "replace")
