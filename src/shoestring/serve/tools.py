"""Tool calls out of what a model writes, while it streams.

Two ways of writing them are read: Hermes' (Qwen and most open models), `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>`, and DeepSeek-V3's, between its own markers. Which one follows from the chat template. A model whose
template knows no tools is told of them in a system turn, in Hermes' way. A call that must be made (`tool_choice`
required or by name) is held to the function's schema by the sampler and written without markers.

Arguments are streamed as they come; what turns out not to be a call is given back as text. Left out: Llama's and
Mistral's ways of writing calls.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoestring.core.errors import UserError
from shoestring.serve.protocol import Tool


@dataclass(frozen=True)
class Writing:
    """How a family of models writes calls."""

    begin: str  # what opens one call
    end: str  # what closes it
    around: tuple[str, ...] = ()  # marks around the whole list, dropped
    head: str = ""  # regex of what stands before the arguments; group "name"


_NAME_FIRST = r'\s*\{\s*"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
HERMES = Writing("<tool_call>", "</tool_call>", head=_NAME_FIRST)
DEEPSEEK = Writing(
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    head=r"\s*(?:function<｜tool▁sep｜>(?P<old>[^\n]+)\n```json\n|(?P<name>[^\n<]+)<｜tool▁sep｜>)",
)  # fmt: skip
BARE = Writing("", "", head=_NAME_FIRST)


def writing_of(template: str | None) -> Writing:
    """The writing that a chat template uses."""
    return DEEPSEEK if "tool▁call▁begin" in (template or "") else HERMES


def told_in_words(tools: Sequence[Tool]) -> str:
    """What a model is told whose template knows no tools."""
    lines = "\n".join(json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools)
    return (
        f"These functions may be called:\n<tools>\n{lines}\n</tools>\nTo call one, write\n"
        '<tool_call>\n{"name": "its name", "arguments": {"parameter": "value"}}\n</tool_call>'
    )


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of a call to one of `tools`."""
    for tool in tools:
        if "$ref" in json.dumps(tool.function.parameters or {}):
            raise UserError(f"the parameters of {tool.function.name} use $ref, which a forced call cannot; inline it.")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object", "properties": {}},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


@dataclass
class Parsed:
    """What a piece of text added: plain text, and pieces of calls as OpenAI streams them."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class CallParser:
    """One sample's answer text in, plain text and calls out."""

    def __init__(self, writing: Writing, *, limit: int | None = None) -> None:
        self._writing = writing
        self._head = re.compile(writing.head)
        self._buffer = ""
        self._inside = writing is BARE
        self._arguments: _Value | None = None
        self._limit = limit  # calls beyond it are dropped (parallel_tool_calls: false)
        self.count = 0

    def feed(self, text: str, *, last: bool = False) -> Parsed:
        self._buffer += text
        parsed = Parsed()
        while self._inside_step(parsed, last) if self._inside else self._outside_step(parsed, last):
            pass
        if last and self._inside and self._arguments is None and self._buffer:
            if not self._complete(self._buffer, parsed):
                parsed.text += self._writing.begin + self._buffer
            self._buffer = ""
        return parsed

    def _outside_step(self, parsed: Parsed, last: bool) -> bool:
        """Text up to the next mark; True when something changed and more can be read."""
        marks = (self._writing.begin, *self._writing.around)
        found = [(place, mark) for mark in marks if (place := self._buffer.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            parsed.text += self._buffer[:place].rstrip("\n")
            self._buffer = self._buffer[place + len(mark) :]
            self._inside = mark == self._writing.begin
            return True
        if self.count and not self._buffer.strip():  # white space between and after calls is not said
            self._buffer = "" if last else self._buffer
            return False
        held = 0 if last else max(overlap(self._buffer, mark) for mark in marks)
        sure = self._buffer[: len(self._buffer) - held]
        if not last:
            sure = sure.rstrip("\n")  # line ends before a call are not said either
        parsed.text += sure
        self._buffer = self._buffer[len(sure) :]
        return False

    def _inside_step(self, parsed: Parsed, last: bool) -> bool:
        if self._arguments is not None:
            return self._read_arguments(parsed)
        found = self._head.match(self._buffer)
        if found and self._buffer[found.end() :].startswith("{"):
            self._begin_call(found.groupdict().get("old") or found["name"], parsed)
            self._arguments = _Value()
            self._buffer = self._buffer[found.end() :]
            return True
        end = self._writing.end
        if end and (place := self._buffer.find(end)) >= 0:
            whole, self._buffer = self._buffer[:place], self._buffer[place + len(end) :]
            self._inside = False
            if not self._complete(whole, parsed):
                parsed.text += self._writing.begin + whole + end
            return True
        return False

    def _read_arguments(self, parsed: Parsed) -> bool:
        assert self._arguments is not None
        if not self._arguments.done:
            taken = self._arguments.take(self._buffer)
            self._buffer = self._buffer[taken:]
            self._add_arguments(self._arguments.last, parsed)
        if not self._arguments.done:
            return False
        end = self._writing.end
        if not end:
            self._buffer = ""
            return False
        place = self._buffer.find(end)
        if place < 0:
            self._buffer = self._buffer[-len(end) :]
            return False
        self._buffer = self._buffer[place + len(end) :]
        self._inside, self._arguments = False, None
        return True

    def _complete(self, whole: str, parsed: Parsed) -> bool:
        """A call given as one JSON object, its keys in any order."""
        try:
            call = json.loads(whole)
            name = call["name"]
            arguments = call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        if not isinstance(name, str):
            return False
        self._begin_call(name, parsed)
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._add_arguments(text, parsed)
        return True

    def _begin_call(self, name: str, parsed: Parsed) -> None:
        self.count += 1
        if self._limit is None or self.count <= self._limit:
            parsed.calls.append(
                {
                    "index": self.count - 1,
                    "id": f"call_{secrets.token_hex(12)}",
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            )

    def _add_arguments(self, text: str, parsed: Parsed) -> None:
        if text and (self._limit is None or self.count <= self._limit):
            parsed.calls.append({"index": self.count - 1, "function": {"arguments": text}})


class _Value:
    """Where a JSON object that streams by ends: depth of braces outside strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escape = False
        self.done = False
        self.last = ""

    def take(self, text: str) -> int:
        """How many characters of `text` belong to the object; they are in `last`."""
        for place, char in enumerate(text):
            if self._escape:
                self._escape = False
            elif self._string:
                self._escape, self._string = char == "\\", char != '"'
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done, self.last = True, text[: place + 1]
                    return place + 1
        self.last = text
        return len(text)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
