"""How an answer is laid out on the wire: chunks and wholes of the two kinds of completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from shoestring.core.nouns import Event
from shoestring.serve.errors import ApiError
from shoestring.serve.generation import Tally
from shoestring.serve.protocol import SamplingFields
from shoestring.serve.shapes import DONE, frame, timings, usage

Entries = list[dict[str, Any]]


class Writer(Protocol):
    """Events to the `choices` of chunks, and the whole of them."""

    def begin(self) -> Entries: ...
    def feed(self, index: int, event: Event, tally: Tally) -> Entries: ...
    def whole(self) -> Entries: ...
    def extras(self) -> dict[str, Any]: ...
    def texts(self) -> tuple[str, ...]: ...


class Shape(Protocol):
    """What an exchange sends."""

    writer: Writer

    def opening(self, tally: Tally) -> list[bytes]: ...
    def feed(self, index: int, event: Event, tally: Tally, usd: float) -> list[bytes]: ...
    def closing(self, tally: Tally, usd: float) -> list[bytes]: ...
    def broken(self, error: ApiError) -> list[bytes]: ...
    def whole(self, tally: Tally, usd: float) -> dict[str, Any]: ...


class ChunkShape:
    """/v1/chat/completions and /v1/completions: `data:` chunks, [DONE], or one object."""

    def __init__(self, request: SamplingFields, writer: Writer, *, chat: bool, answer_id: str) -> None:
        self.writer = writer
        self._names = ("chat.completion.chunk", "chat.completion") if chat else ("text_completion", "text_completion")
        options = request.stream_options
        self._usage = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)
        self._head = {"id": answer_id, "created": int(time.time()), "model": request.model}

    def _chunk(self, entries: Sequence[dict[str, Any]], tally: Tally, usd: float, *, last: bool = False) -> bytes:
        document = {**self._head, "object": self._names[0], "choices": list(entries), "system_fingerprint": None}
        if last or self._always:
            document["usage"] = usage(tally, usd)
        elif self._usage:
            document["usage"] = None
        if last:
            document |= {"timings": timings(tally)}
        return frame(document)

    def opening(self, tally: Tally) -> list[bytes]:
        return [self._chunk([entry], tally, 0.0) for entry in self.writer.begin()]

    def feed(self, index: int, event: Event, tally: Tally, usd: float) -> list[bytes]:
        return [self._chunk([entry], tally, usd) for entry in self.writer.feed(index, event, tally)]

    def closing(self, tally: Tally, usd: float) -> list[bytes]:
        return [self._chunk([], tally, usd, last=True), DONE] if self._usage else [DONE]

    def broken(self, error: ApiError) -> list[bytes]:
        return [frame(error.body()), DONE]

    def whole(self, tally: Tally, usd: float) -> dict[str, Any]:
        return {
            **self._head,
            "object": self._names[1],
            "choices": self.writer.whole(),
            "usage": usage(tally, usd),
            "system_fingerprint": None,
            "timings": timings(tally),
            **self.writer.extras(),
        }
