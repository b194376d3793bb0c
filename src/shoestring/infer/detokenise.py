"""From token ids to text that may be shown, while they arrive.

A token may hold part of a character (byte-level BPE splits UTF-8), and decoders may treat the first token of a text
otherwise than the same token further on. So each piece is decoded together with the token before it, and is released
only when it does not end in an incomplete character. Stop strings are found across pieces: what could still become
one waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "�"  # what decoders write for bytes that are no character (yet)
LONGEST = 4  # bytes of a character, and so tokens that may hold one
PENDING = 32  # ids that wait before it is looked for what of them can go: decoding them anew each time is quadratic


class Decodes(Protocol):
    """The one method of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """`push` ids, get the text that they complete; `flush` at the end gives what is left, complete or not."""

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0  # where the context of the pending piece begins
        self._released = 0  # ids whose text has been given out

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        return self._piece(final=False)

    def flush(self) -> str:
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        if self._released == len(self._ids):
            return ""
        context = self._tokenizer.decode(self._ids[self._before : self._released])
        text = self._tokenizer.decode(self._ids[self._before :])
        if final or not (text.endswith(INCOMPLETE) or len(text) <= len(context)):
            self._before, self._released = self._released, len(self._ids)
            return text[len(context) :]
        return self._what_is_certain(context, text) if len(self._ids) - self._released >= PENDING else ""

    def _what_is_certain(self, context: str, text: str) -> str:
        """Of many ids without an end: all but the last few, which may begin a character.

        Of as many borders as a character has bytes, one is not inside a character: up to there the text stands.
        """
        for kept in range(LONGEST, 2 * LONGEST):
            certain = self._tokenizer.decode(self._ids[self._before : len(self._ids) - kept])
            if text.startswith(certain) and len(certain) >= len(context):
                self._before, self._released = self._released, len(self._ids) - kept
                return certain[len(context) :]
        return ""


class StopStrings:
    """Text goes through `push`; what could be the beginning of a stop string is held until it is known not to be."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, *, stopping: bool = True) -> tuple[str, bool]:
        """(text to release, was a stop string found). The text ends before the first stop string.

        With `stopping` False (too early to stop) everything is released.
        """
        text, self._held = self._held + text, ""
        if not stopping or not self._stops:
            return text, False
        found = [where for stop in self._stops if (where := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The end came without a stop string: what was held is ordinary text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
