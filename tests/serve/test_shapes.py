"""What streams are made of."""

from __future__ import annotations

import json

from shoestring.serve.shapes import frame


def test_an_event_is_one_line_to_every_reader():
    """httpx and others end lines where Unicode does; what was said stays what it was."""
    document = {"content": "a\x85b\u2028c\u2029d\ne\x1c你好"}
    event = frame(document).decode()
    assert len(event.splitlines()) == 2 and event.endswith("\n\n") and "你好" in event
    assert json.loads(event.removeprefix("data: ")) == document
