"""How an answer is laid out on the wire: chunks and wholes of the two kinds of completions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from shoestring.core.nouns import Event
from shoestring.serve.errors import ApiError
from shoestring.serve.generation import Tally
from shoestring.serve.protocol import SamplingFields
from shoestring.serve.shapes import DONE, frame, tight, timings, usage

Entries = list[dict[str, Any]]
Cost = Callable[[Tally], float]  # dollars


class Writer(Protocol):
    """Events to the `choices` of chunks, and the whole of them; `extras` is what stands beside `choices`."""

    def begin(self) -> Entries: ...
    def feed(self, index: int, event: Event, tally: Tally) -> Entries: ...
    def whole(self) -> Entries: ...
    def extras(self) -> dict[str, Any]: ...
    def texts(self) -> tuple[str, ...]: ...


class Shape(Protocol):
    """What an exchange sends: of a stream the bytes, of a whole answer (`fold` each event, then `whole`) the JSON."""

    writer: Writer

    def opening(self, tally: Tally) -> bytes: ...
    def feed(self, index: int, event: Event, tally: Tally) -> bytes: ...
    def closing(self, tally: Tally) -> bytes: ...
    def broken(self, error: ApiError) -> bytes: ...
    def fold(self, index: int, event: Event, tally: Tally) -> None: ...
    def whole(self, tally: Tally) -> dict[str, Any]: ...


class ChunkShape:
    """/v1/chat/completions and /v1/completions: `data:` chunks, [DONE], or one object."""

    def __init__(
        self, request: SamplingFields, writer: Writer, *, chat: bool, answer_id: str, cost: Cost
    ) -> None:  # fmt: skip
        self.writer, self._cost = writer, cost
        options = request.stream_options
        self._usage = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)
        self._kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": answer_id, "created": int(time.time()), "model": request.model, "system_fingerprint": None}
        # Written once: a chunk is this, its entry, and the end.
        head = self._head | {"object": "chat.completion.chunk" if chat else "text_completion"}
        self._begun = f'data: {tight(head)[:-1]},"choices":['

    def _chunks(self, entries: Entries, tally: Tally) -> bytes:
        end = ',"usage":null' if self._usage else ""
        if self._always and entries:
            end = f',"usage":{tight(usage(tally, self._cost(tally)))}'
        return "".join([f"{self._begun}{tight(entry)}]{end}}}\n\n" for entry in entries]).encode()

    def opening(self, tally: Tally) -> bytes:
        return self._chunks(self.writer.begin(), tally)

    def feed(self, index: int, event: Event, tally: Tally) -> bytes:
        return self._chunks(self.writer.feed(index, event, tally), tally)

    def closing(self, tally: Tally) -> bytes:
        """What stands beside the choices, where it was asked for."""
        found = self.writer.extras()
        if self._usage:
            found |= {"usage": usage(tally, self._cost(tally)), "timings": timings(tally)}
        return f"{self._begun}],{tight(found)[1:]}\n\n".encode() + DONE if found else DONE

    def broken(self, error: ApiError) -> bytes:
        return frame(error.body()) + DONE

    def fold(self, index: int, event: Event, tally: Tally) -> None:
        self.writer.feed(index, event, tally)

    def whole(self, tally: Tally) -> dict[str, Any]:
        return {
            **self._head,
            "object": self._kind,
            "choices": self.writer.whole(),
            "usage": usage(tally, self._cost(tally)),
            "timings": timings(tally),
            **self.writer.extras(),
        }
