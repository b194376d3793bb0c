"""The OpenAI-compatible wire: what is sent, and what a reply says or why it says nothing.

Read: every `choices[i]`, `content`, `reasoning_content` (DeepSeek, SGLang, llama.cpp) or `reasoning` (vLLM),
`finish_reason`, `usage` with its reasoning and cached tokens in either vendor's names, the model that answered,
`system_fingerprint`, `id`; streams as server-sent events up to `[DONE]`. What is not a complete reply raises
`Trouble` with its kind, which says whether to ask again. Source: docs/asking.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

STOP_STATUS = {401: "key refused", 402: "no credit", 403: "key refused"}
FINAL_STATUS = {400: "bad request", 404: "not found", 405: "not found", 413: "too long", 422: "bad request"}
NO_CREDIT = ("insufficient_quota", "insufficient_balance", "billing_hard_limit_reached", "insufficient balance")


@dataclass(slots=True, eq=False)
class Trouble(Exception):
    """No answer. `then`: "pause" (not an attempt; wait), "again" (a few times), "never" (this row fails), "stop" (the
    whole job does). `doubt`: perhaps billed. `turn`: the next attempt is another request to a server that remembers
    keys, because this one was replied to."""

    kind: str
    told: str
    then: str = "again"
    doubt: bool = False
    turn: bool = False
    wait: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.told}"


@dataclass(slots=True)
class Choice:
    """One answer of a reply."""

    answer: str
    thinking: str | None
    finish: str
    logprobs: Any = None


@dataclass(slots=True)
class Reply:
    """What a complete reply says. Token counts are None where the server's are missing or absurd."""

    choices: list[Choice]
    model: str
    id: str
    fingerprint: str
    tokens_in: int | None
    tokens_out: int | None
    cached: int = 0
    reasoning: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Body:
    """Request bodies for one way of asking: everything but messages, seed and n is encoded once.

    raw: text completions; the prompt is the content of the one message.
    """

    def __init__(self, model: str, decoding: Mapping[str, Any], *, stream: bool = False, raw: bool = False) -> None:
        values = {"model": model, **{key: value for key, value in decoding.items() if key != "seed"}}
        if stream:
            values |= {"stream": True, "stream_options": {"include_usage": True}}
        self._raw = raw
        self._head = json.dumps(values, ensure_ascii=False)[:-1] + (', "prompt": ' if raw else ', "messages": ')
        self._seed = decoding.get("seed")

    def encode(self, messages: str, sample: int = 0, n: int = 1) -> bytes:
        """The body for `messages` (JSON text). Sample i is asked with seed + i, so that samples differ."""
        tail = f', "n": {n}' if n > 1 else ""
        if self._seed is not None:
            tail += f', "seed": {self._seed + sample}'
        asked = json.dumps(json.loads(messages)[0]["content"], ensure_ascii=False) if self._raw else messages
        return f"{self._head}{asked}{tail}}}".encode()


def read_reply(body: bytes, asked: int = 1) -> Reply:
    """The reply in a complete 200 body. Raises Trouble for HTML, half a JSON, an error object, nothing."""
    if not body.strip():
        raise Trouble("empty reply", "the reply has no body", doubt=True, turn=True)
    try:
        document = orjson.loads(body)
    except ValueError:
        raise Trouble("not JSON", f"the reply is {_kind_of(body)}", doubt=True, turn=True) from None
    if not isinstance(document, dict) or document.get("error") or not isinstance(document.get("choices"), list):
        raise _unreadable(document)
    return _reply(document, [_choice(choice) for choice in document["choices"]], asked)


def read_stream(body: bytes, asked: int = 1) -> Reply:
    """The reply in a whole event stream. Raises Trouble for one that breaks off, carries an error or is no chat's."""
    try:
        return _of_events(body, asked)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise Trouble("broken stream", "its events are not those of a chat", doubt=True, turn=True) from None


def _of_events(body: bytes, asked: int) -> Reply:
    deltas: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    usage, done = None, False
    for event in _events(body):
        if event == b"[DONE]":
            done = True
            continue
        try:
            chunk = orjson.loads(event)
        except ValueError:
            raise Trouble("broken stream", "an event is not JSON", doubt=True, turn=True) from None
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise _unreadable(chunk)
        usage = chunk.get("usage") or usage
        last = last | {key: chunk[key] for key in ("id", "model", "system_fingerprint") if chunk.get(key)}
        for choice in chunk.get("choices") or ():
            _add(deltas.setdefault(int(choice.get("index") or 0), {}), choice)
    if not done or not deltas or not all(choice.get("finish_reason") for choice in deltas.values()):
        raise Trouble("broken stream", "the stream ended before its [DONE]", doubt=True, turn=True)
    whole = [{**choice, "message": choice} for _, choice in sorted(deltas.items())]
    return _reply(last | {"usage": usage}, [_choice(choice) for choice in whole], asked)


def refusal(status: int, headers: Mapping[str, str], body: bytes, wait: float | None) -> Trouble:
    """What a reply that is not a 200 means."""
    words, code = _words(body)
    told = f"HTTP {status}{f', {words}' if words else ''}"
    if 300 <= status < 400:
        return Trouble("redirect", f"it redirects to {headers.get('location', 'nowhere')}; give that address", "stop")
    if status in STOP_STATUS:
        return Trouble(STOP_STATUS[status], told, "stop")
    if status == 429 and any(mark in f"{code} {words}".lower() for mark in NO_CREDIT):
        return Trouble("no credit", told, "stop")
    if status == 429:
        return Trouble("rate limit", told, "pause", wait=wait)
    if status in FINAL_STATUS:
        return Trouble(FINAL_STATUS[status], told, "never")
    if status == 408 or status >= 500:
        return Trouble("server error", told, turn=True, wait=wait)
    return Trouble("bad request", told, "never")


def answer_body(choice: Choice, reply: Reply) -> str:
    """What a row keeps of its answer beside the columns."""
    kept: dict[str, Any] = {"answer": choice.answer, "model": reply.model}
    if choice.thinking is not None:
        kept["thinking"] = choice.thinking
    if reply.id:
        kept["id"] = reply.id
    if reply.fingerprint:
        kept["fingerprint"] = reply.fingerprint
    if reply.cached:
        kept["cached"] = reply.cached
    if reply.reasoning is not None:
        kept["reasoning"] = reply.reasoning
    if choice.logprobs is not None:
        kept["logprobs"] = choice.logprobs
    if reply.extra:
        kept.update(reply.extra)
    return orjson.dumps(kept).decode()


def _reply(document: Mapping[str, Any], choices: list[Choice], asked: int) -> Reply:
    if not choices or not any(c.answer or c.thinking or c.finish != "stop" for c in choices):
        raise Trouble("empty reply", "the reply holds no text", doubt=True, turn=True)
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details_in, details_out = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    tokens_in, tokens_out = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    cached = _count(details_in.get("cached_tokens") if isinstance(details_in, dict) else None)
    cached = _count(usage.get("prompt_cache_hit_tokens")) if cached is None else cached
    if tokens_out == 0 and any(choice.answer or choice.thinking for choice in choices):
        tokens_out = None  # it said something and counts nothing
    return Reply(
        choices[:asked], str(document.get("model") or ""), str(document.get("id") or ""),
        str(document.get("system_fingerprint") or ""), tokens_in, tokens_out, min(cached or 0, tokens_in or 0),
        _count(details_out.get("reasoning_tokens")) if isinstance(details_out, dict) else None,
    )  # fmt: skip


def _choice(choice: Any) -> Choice:
    message = choice.get("message") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and isinstance(choice.get("text"), str) and message is None:
        message = {"content": choice["text"]}  # of a text completion
    if not isinstance(message, dict):
        raise _unreadable(choice)
    thinking = message.get("reasoning_content") or message.get("reasoning")
    return Choice(
        _text(message.get("content")), _text(thinking) if thinking else None,
        str(choice.get("finish_reason") or "stop"), choice.get("logprobs"),
    )  # fmt: skip


def _add(whole: dict[str, Any], choice: Mapping[str, Any]) -> None:
    """Add a stream's piece to what came before it."""
    delta = choice.get("delta") or {}
    for key in ("content", "reasoning_content", "reasoning"):
        if isinstance(delta.get(key), str):
            whole[key] = whole.get(key, "") + delta[key]
    if choice.get("finish_reason"):
        whole["finish_reason"] = choice["finish_reason"]
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        whole.setdefault("logprobs", {"content": []})["content"] += logprobs["content"]


def _events(body: bytes) -> Iterable[bytes]:
    """The data of each event; comments (keep-alives) and other fields are passed over."""
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if data:
            yield b"\n".join(data)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        said = [part.get("text") for part in value if isinstance(part, dict)]
        return "".join(text for text in said if isinstance(text, str))
    return ""


def _count(value: Any) -> int | None:
    """A token count, or None for what cannot be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else None


def _words(body: bytes) -> tuple[str, str]:
    """(message, code) of an error body, in whatever form it comes."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return (f"with {_kind_of(body)}" if body.strip() else ""), ""
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        words = error.get("message") or error.get("detail") or ""
        return str(words)[:300], f"{error.get('code') or ''} {error.get('type') or ''}".strip()
    return str(error)[:300], ""


def _unreadable(document: Any) -> Trouble:
    if isinstance(document, dict) and document.get("error"):
        words, code = _words(json.dumps(document).encode())
        if any(mark in f"{code} {words}".lower() for mark in NO_CREDIT):
            return Trouble("no credit", f"HTTP 200 with an error: {words}", "stop")
        return Trouble("error in the reply", f"HTTP 200 with an error: {words}", doubt=True, turn=True)
    return Trouble("not a reply", "the JSON has no choices with messages", doubt=True, turn=True)


def _kind_of(body: bytes) -> str:
    start = body.lstrip()[:20].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page (HTML), not an API's"
    return "cut-off or broken JSON" if start.startswith((b"{", b"[")) else f"no JSON: {body[:40]!r}"
