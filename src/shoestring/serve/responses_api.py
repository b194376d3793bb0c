"""/v1/responses by conversion: the request becomes a chat, the chat's deltas become items and their events.

Nothing is stored, so `previous_response_id` is refused (protocol.UNSUPPORTED) and `store` is answered false. Left out:
built-in tools (web search, files, computer), images, background mode.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from shoestring.core.nouns import Event
from shoestring.serve.errors import ApiError, bad
from shoestring.serve.generation import Tally
from shoestring.serve.protocol import ChatRequest, Effort, Fields, read
from shoestring.serve.shape import Cost, Writer
from shoestring.serve.shapes import tight, usage

PASSED = (
    "model", "temperature", "top_p", "stream", "user", "seed", "stop", "top_k", "min_p", "repetition_penalty",
    "chat_template_kwargs", "thinking", "logit_bias", "cache_salt", "parallel_tool_calls",
)  # fmt: skip


class Reasoning(Fields):
    effort: Effort | None = None
    summary: str | None = None


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Fields):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Fields):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    top_logprobs: int | None = Field(None, ge=0)
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None


def chat_of(raw: Mapping[str, Any]) -> tuple[ChatRequest, ResponsesRequest]:
    """The chat request that asks the same. Raises ApiError 400."""
    asked = read(ResponsesRequest, raw)
    chat = {name: raw[name] for name in PASSED if raw.get(name) is not None}
    chat["messages"] = list(_messages(asked))
    if asked.max_output_tokens is not None:
        chat["max_tokens"] = asked.max_output_tokens
    if asked.tools:
        chat["tools"] = [_tool(tool) for tool in asked.tools]
    choice = asked.tool_choice
    if choice is not None and asked.tools:
        named = isinstance(choice, dict)
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}} if named else choice  # type: ignore[union-attr]
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        chat["reasoning_effort"] = asked.reasoning.effort
    if asked.text is not None and asked.text.format is not None:
        wanted: dict[str, Any] = {"type": asked.text.format.type}
        if asked.text.format.type == "json_schema":
            wanted["json_schema"] = {
                "name": asked.text.format.name or "schema",
                "schema": asked.text.format.schema_ or {},
            }
        chat["response_format"] = wanted
    if "message.output_text.logprobs" in (asked.include or []) or asked.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
    return read(ChatRequest, chat), asked


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad(f'tools of type "{tool.get("type")}" are not supported; only functions are.', "tools")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _messages(asked: ResponsesRequest) -> Iterator[dict[str, Any]]:
    if asked.instructions:
        yield {"role": "system", "content": asked.instructions}
    if isinstance(asked.input, str):
        yield {"role": "user", "content": asked.input}
        return
    thought: str | None = None
    for place, item in enumerate(asked.input):
        kind = item.get("type", "message")
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            if thought is not None and item.get("role") == "assistant":
                message["reasoning_content"], thought = thought, None
            yield message
        elif kind == "reasoning":
            thought = _thought(item.get("content"), f"input.{place}.content")
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            yield {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": item.get("call_id"), "function": function}],
            }
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
        else:
            raise bad(f'input items of type "{kind}" are not supported.', f"input.{place}.type")


def _thought(content: Any, where: str) -> str:
    parts = content or []
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        raise bad("the content of a reasoning item is a list of parts with a text.", where)
    return "".join(part["text"] for part in parts)


class _Item:
    """One output item while it grows."""

    def __init__(self, kind: str, index: int, call: Mapping[str, Any] | None = None) -> None:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        self.kind, self.index, self.id = kind, index, f"{prefix}_{secrets.token_hex(12)}"
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []
        self._call = dict(call or {})

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def document(self, status: str) -> dict[str, Any]:
        found: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return found | {**self._call, "arguments": self.text}
        content = [self.part()] if status != "in_progress" else []
        return found | (
            {"summary": [], "content": content}
            if self.kind == "reasoning"
            else {"role": "assistant", "content": content}
        )


class ResponsesShape:
    """A chat's deltas as the events of /v1/responses."""

    def __init__(self, asked: ResponsesRequest, writer: Writer, answer_id: str, cost: Cost) -> None:
        self.writer, self._cost = writer, cost
        self._asked, self._id = asked, answer_id
        self._created = int(time.time())
        self._number = 0
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._finish = ""

    def _event(self, kind: str, **fields: Any) -> bytes:
        document = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {tight(document)}\n\n".encode()

    def opening(self, tally: Tally) -> bytes:
        self.writer.begin()
        response = self._document("in_progress", None, tally)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def fold(self, index: int, event: Event, tally: Tally) -> None:
        self.feed(index, event, tally)

    def feed(self, index: int, event: Event, tally: Tally) -> bytes:
        found: list[bytes] = []
        for entry in self.writer.feed(index, event, tally):
            delta = entry["delta"]
            logprobs = (entry["logprobs"] or {}).get("content", [])
            self._finish = entry["finish_reason"] or self._finish
            if delta.get("reasoning_content"):
                found += self._say("reasoning", delta["reasoning_content"], [])
            elif delta.get("content"):
                found += self._say("message", delta["content"], logprobs)
            for piece in delta.get("tool_calls", []):
                found += self._call(piece)
        return b"".join(found)

    def _begin(self, kind: str, call: Mapping[str, Any] | None = None) -> list[bytes]:
        found = self._end()
        item = self._open = _Item(kind, len(self._items), call)
        self._items.append(item)
        found.append(
            self._event("response.output_item.added", output_index=item.index, item=item.document("in_progress"))
        )
        if kind != "function_call":
            found.append(
                self._event(
                    "response.content_part.added",
                    item_id=item.id,
                    output_index=item.index,
                    content_index=0,
                    part=item.part(),
                )
            )
        return found

    def _say(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        found = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        item = self._open
        assert item is not None
        item.text += text
        item.logprobs += logprobs
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0, "delta": text}
        if kind == "reasoning":
            return [*found, self._event("response.reasoning_text.delta", **place)]
        return [*found, self._event("response.output_text.delta", **place, logprobs=logprobs)]

    def _call(self, piece: Mapping[str, Any]) -> list[bytes]:
        function = piece["function"]
        if "id" in piece:
            return self._begin("function_call", {"call_id": piece["id"], "name": function["name"]})
        item = self._open
        assert item is not None
        item.text += function["arguments"]
        where = {"item_id": item.id, "output_index": item.index}
        return [self._event("response.function_call_arguments.delta", **where, delta=function["arguments"])]

    def _end(self) -> list[bytes]:
        item, self._open = self._open, None
        if item is None:
            return []
        found, where = [], {"item_id": item.id, "output_index": item.index}
        if item.kind == "function_call":
            found.append(self._event("response.function_call_arguments.done", **where, arguments=item.text,
                                     name=item.document("completed").get("name")))  # fmt: skip
        else:
            where["content_index"] = 0
            kind = "reasoning_text" if item.kind == "reasoning" else "output_text"
            more = {} if item.kind == "reasoning" else {"logprobs": item.logprobs}
            found.append(self._event(f"response.{kind}.done", **where, text=item.text, **more))
            found.append(self._event("response.content_part.done", **where, part=item.part()))
        found.append(self._event("response.output_item.done", output_index=item.index, item=item.document("completed")))
        return found

    def closing(self, tally: Tally) -> bytes:
        found = b"".join(self._end())
        status = "incomplete" if self._finish == "length" else "completed"
        return found + self._event(f"response.{status}", response=self._document(status, None, tally))

    def broken(self, error: ApiError) -> bytes:
        body = error.body()["error"]
        failure = {"code": body["code"] or body["type"], "message": body["message"]}
        response = self._document("failed", failure, Tally())
        return self._event("error", **failure, param=body["param"]) + self._event("response.failed", response=response)

    def whole(self, tally: Tally) -> dict[str, Any]:
        self._open = None
        return self._document("incomplete" if self._finish == "length" else "completed", None, tally)

    def _document(self, status: str, error: dict[str, Any] | None, tally: Tally) -> dict[str, Any]:
        asked, counts = self._asked, usage(tally, self._cost(tally))
        text = asked.text.model_dump(exclude_none=True, by_alias=True) if asked.text else {"format": {"type": "text"}}
        done = status != "in_progress"
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens, "model": asked.model,
            "output": [item.document("completed") for item in self._items] if done else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": False, "temperature": 1.0 if asked.temperature is None else asked.temperature, "text": text,
            "tool_choice": asked.tool_choice or "auto", "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p, "truncation": "disabled",
            "metadata": asked.metadata or {}, "user": asked.user,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
                "cost_usd": counts["cost_usd"],
            } if done else None,
        }  # fmt: skip
