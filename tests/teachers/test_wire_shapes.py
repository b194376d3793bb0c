"""What a teacher may send in place of a reply: each is a Trouble with its kind, never an error of the program."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoestring.teachers._pace import seconds_of
from shoestring.teachers._wire import Trouble, read_reply, read_stream, refusal

DONE = b"data: [DONE]\n\n"
FINE = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}


def stream(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + DONE


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": ["a"]}, {"choices": {"index": 0}}, {"choices": 5}, {"choices": [{"index": "first"}]},
        {"choices": [{"index": [0], "delta": {"content": "a"}}]}, {"choices": [{"index": 0, "delta": ["a"]}]},
        {"choices": [{"index": 1e400, "delta": {}}]}, [FINE], 5, "text",
    ],
)  # fmt: skip
def test_events_of_another_shape(chunk: Any) -> None:
    with pytest.raises(Trouble) as caught:
        read_stream(stream(chunk, FINE))
    assert caught.value.doubt and caught.value.turn and caught.value.then == "again"


def test_a_stream_that_is_fine() -> None:
    assert read_stream(stream(FINE)).choices[0].answer == "a"


@pytest.mark.parametrize("content", [[{"text": 5}], [{"text": ["a"]}], [{"text": None}], 5, {"text": "a"}])
def test_contents_that_are_no_text(content: Any) -> None:
    body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    with pytest.raises(Trouble, match="holds no text"):
        read_reply(json.dumps(body).encode())


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"error": {"message": {"a": 1}, "code": [5]}}', b"\xff\xfe", b"5"])
@pytest.mark.parametrize(("status", "then"), [(400, "never"), (429, "pause"), (500, "again"), (401, "stop")])
def test_refusals_of_any_shape(body: bytes, status: int, then: str) -> None:
    assert refusal(status, {}, body, None).then == then


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "Infinity", "1e999", "soon", "5 apples"])
def test_a_wait_that_has_no_end_is_none(text: str) -> None:
    assert seconds_of(text) is None
