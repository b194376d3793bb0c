"""Tool calls out of text, whatever the pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.serve.protocol import Tool
from shoestring.serve.tools import BARE, DEEPSEEK, HERMES, CallParser, Writing, call_schema

ADD = '{"name": "add", "arguments": {"a": 3, "b": {"c": "}\\"{"}}}'
CASES = [
    (HERMES, f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", '{"a": 3, "b": {"c": "}\\"{"}}')]),
    (HERMES, f"Sure.\n<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>", "Sure.", [("add",)] * 2),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, "no <tool at all", "no <tool at all", []),
    (HERMES, "<tool_call>not a call</tool_call> so", "<tool_call>not a call</tool_call> so", []),
    (HERMES, "<tool_call>{cut", "<tool_call>{cut", []),
    (HERMES, '<tool_call>{"name": "add", "arguments": {}}', "", [("add", "{}")]),
    (BARE, '{"name": "add", "arguments": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (DEEPSEEK, "ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
     '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "ok", [("add", '{"a": 1}')]),
    (DEEPSEEK, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
     '<｜tool▁call▁begin｜>sub<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "", [("add",), ("sub", "{}")]),
]  # fmt: skip


def run(writing: Writing, text: str, cuts: set[int], **more: Any) -> tuple[str, list[tuple[str, str]]]:
    parser, said, calls = CallParser(writing, **more), "", []
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(text)), len(text)]
    for start, end in pairwise(edges):
        parsed = parser.feed(text[start:end], last=end == len(text))
        said += parsed.text
        for piece in parsed.calls:
            if "id" in piece:
                calls.append([piece["function"]["name"], ""])
            else:
                calls[piece["index"]][1] += piece["function"]["arguments"]
    return said, [tuple(call) for call in calls]  # type: ignore[misc]


@pytest.mark.parametrize(("writing", "text", "said", "calls"), CASES)
@settings(max_examples=40)
@given(cuts=st.sets(st.integers(0, 200)))
def test_calls(writing: Writing, text: str, said: str, calls: list[tuple[str, ...]], cuts: set[int]):
    found = run(writing, text, cuts)
    assert found[0] == said
    assert [call[: len(wanted)] for call, wanted in zip(found[1], calls, strict=True)] == calls


def test_arguments_stream_before_the_call_is_whole():
    parser = CallParser(HERMES)
    parser.feed('<tool_call>{"name": "add", "arguments": {"a": 1')
    assert parser.feed("2").calls == [{"index": 0, "function": {"arguments": "2"}}]


def test_only_one_call_when_parallel_ones_are_off():
    text = f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>"
    assert len(run(HERMES, text, set(), limit=1)[1]) == 1


def test_the_schema_of_a_forced_call():
    tool = Tool.model_validate({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}})
    schema = call_schema([tool])
    assert schema["properties"]["name"] == {"const": "add"}
    assert json.loads(json.dumps(call_schema([tool, tool])))["anyOf"] == [schema, schema]
