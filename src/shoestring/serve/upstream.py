"""Another provider behind this server's keys, metering and hooks: vLLM, SGLang, DeepSeek, or one of ours.

Requests go on as they came (fields this server does not know may mean something there), only with usage asked for in
streams, because that is what is billed; the extra chunk is taken out again when the client did not ask. Before the
answer the size is guessed from the characters, for the reservation alone. What the upstream answers is passed on;
that it cannot be reached, or breaks off half-way, is 502 or an error event, never an answer that looks whole. An
answer has the time that ours have (`request_seconds`), and is no longer than what was asked for allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from shoestring.serve.errors import ApiError, bad
from shoestring.serve.exchange import GONE, JSON, SSE, STREAM_HEADERS, Reply, begun
from shoestring.serve.hooks import Call
from shoestring.serve.limits import Account, Reservation
from shoestring.serve.protocol import asks_logprobs
from shoestring.serve.settings import ServeConfig, UpstreamSpec
from shoestring.serve.shapes import DONE, KEEP_ALIVE, frame
from shoestring.serve.upstream_wire import LARGEST, UNREADABLE, Most, events, read_body, refusal, unreachable

if TYPE_CHECKING:
    from shoestring.serve.meter import Meter

CHARACTERS = 3.0  # of a token, at least about so many; for reservations only
GUESS = 1024  # tokens of an answer without a limit, for the same
LIST_SECONDS = 60.0  # after which the list of models is asked for again
LIST_PATIENCE = 10.0
WIDEST = 8 << 10  # bytes of a token on the wire, its alternatives included: where more than LARGEST was asked for
PIECES = 2, 256  # a stream of M tokens may come in so many times M pieces, and so many more
_log = logging.getLogger("shoestring.serve")


class Upstream:
    """The other server."""

    def __init__(self, spec: UpstreamSpec, config: ServeConfig, meter: Meter) -> None:
        self.spec, self._meter, self._config = spec, meter, config
        headers = {"authorization": f"Bearer {spec.key}"} if spec.key else {}
        timeout = httpx.Timeout(spec.seconds, connect=5.0)
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self.models: list[dict[str, Any]] = []
        self._asked = 0.0
        self.running = 0

    async def start(self) -> None:
        """Ask for its models; that it is not there yet is no reason not to start."""
        await self.refresh()

    async def stop(self) -> None:
        await self._client.aclose()

    async def refresh(self) -> None:
        self._asked = time.monotonic()
        try:
            async with asyncio.timeout(LIST_PATIENCE):  # of the whole list: one that drips would hold every request up
                request = self._client.build_request("GET", f"{self.spec.url}/models")
                response = await self._client.send(request, stream=True)
                data = await read_body(response)
            response.raise_for_status()
            self.models = [row for row in json.loads(data)["data"] if isinstance(row.get("id"), str)]
        except (httpx.HTTPError, TimeoutError, ApiError, KeyError, *UNREADABLE) as error:
            _log.warning("the upstream's list of models cannot be read: %s", type(error).__name__)

    async def has(self, name: str) -> bool:
        """Whether it serves a model of that name, asking again now and then."""
        if not self._knows(name):
            await self.listed()
        return self._knows(name) or not self.models

    async def listed(self) -> list[dict[str, Any]]:
        """Its models, asked for again where the list is old."""
        if time.monotonic() - self._asked > (1.0 if not self.models else LIST_SECONDS):
            await self.refresh()
        return self.models

    def _knows(self, name: str) -> bool:
        return any(row["id"] == name for row in self.models)

    def _usd(self, prompt: int, cached: int, completion: int) -> float:
        spec = self.spec
        fresh = (prompt - cached) * spec.usd_per_million_prompt + cached * spec.usd_per_million_cached
        return (fresh + completion * spec.usd_per_million_completion) / 1e6

    def _cost(self, call: Call) -> float:
        return self._usd(call.tally.prompt, call.tally.cached, call.tally.completion)

    async def complete(self, endpoint: str, raw: Mapping[str, Any], call: Call, account: Account | None) -> Reply:
        """Send a request on. Raises ApiError with what the upstream said."""
        body = dict(raw)
        call.n = max(_whole_number(body, name) or 1 for name in ("n", "best_of"))
        limits = [_whole_number(body, name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        call.max_tokens = max((value for value in limits if value), default=GUESS)
        answers = call.n * _prompts(body.get("prompt"))
        most = Most(
            asyncio.get_running_loop().time() + self._config.request_seconds,
            max(LARGEST, WIDEST * call.max_tokens * answers),
            PIECES[0] * call.max_tokens * answers + PIECES[1] if any(limits) else None,
        )
        asked = body.get("stream_options")
        shown = endpoint == "/v1/responses" or (isinstance(asked, dict) and bool(asked.get("include_usage")))
        if call.stream and not shown:
            body["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
        self._meter.permit(account, call.model, n=call.n, logprobs=asks_logprobs(raw))
        held: Reservation | None = None
        status = GONE
        self.running += 1
        streaming = False
        try:
            guess = int(len(json.dumps(body, ensure_ascii=False)) / CHARACTERS)  # escapes are longer than what is meant
            if account is not None:
                new = call.max_tokens * answers
                held = account.reserve(guess + new, self._usd(guess, 0, new))
            await self._meter.hooks.before(call)
            call.tally.started = time.monotonic()
            request = self._client.build_request(
                "POST",
                self.spec.url + endpoint.removeprefix("/v1"),
                json=body,
                headers={"x-request-id": call.request_id},
            )
            response, data = await self._answer(request, call, most)
            if data is not None:
                return await self._whole(data, call, held, guess)
            streaming = True
        except httpx.HTTPError as error:
            status = 502
            failure = unreachable(error)
            await self._meter.finish(call, status, 0.0, held)
            raise failure from error
        except ApiError as error:
            await self._meter.finish(call, error.status, 0.0, held)
            raise
        except BaseException:
            await self._meter.finish(call, status, 0.0, held)
            raise
        finally:
            self.running -= not streaming
        return Reply(SSE, await begun(self._frames(response, call, held, shown, guess, most)), dict(STREAM_HEADERS))

    async def tokens(self, path: str, body: Mapping[str, Any] | None, model: str | None) -> bytes:
        """The JSON of its /tokenize, /detokenize, or /tokenizer_info (no body), beside its /v1. Raises ApiError."""
        address = self.spec.url.removesuffix("/v1") + path
        if body is None:
            request = self._client.build_request("GET", address, params={} if model is None else {"model": model})
        else:
            request = self._client.build_request("POST", address, json=dict(body))
        most = Most(asyncio.get_running_loop().time() + self._config.request_seconds, LARGEST, None)
        try:
            _, data = await self._answer(request, None, most)
            json.loads(data or b"")
        except httpx.HTTPError as error:
            raise unreachable(error) from error
        except (ValueError, RecursionError):
            message = f"the upstream's {path} answers no JSON."
            raise ApiError(502, message, code="upstream_broken", retry=False) from None
        except ApiError as error:
            if error.status not in (404, 405):
                raise
            message = f"the upstream has no {path} for this model: {error.message}"
            raise ApiError(404, message, code="unknown_path", retry=False) from None
        return data or b""

    async def _answer(self, request: httpx.Request, call: Call | None, most: Most) -> tuple[Any, bytes | None]:
        """The upstream's answer of 200, and its body unless it streams. Raises ApiError, and httpx's errors."""
        try:
            async with asyncio.timeout_at(most.deadline):
                response = await self._client.send(request, stream=True)
                if response.status_code != 200:
                    raise await refusal(response)
                return response, None if call is not None and call.stream else await read_body(response, most.size)
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> ApiError:
        message = f"the upstream took longer than {self._config.request_seconds:g} s; ask for fewer tokens."
        return ApiError(504, message, code="request_timeout", retry=False)

    async def _whole(self, data: bytes, call: Call, held: Reservation | None, guess: int) -> Reply:
        try:
            document = json.loads(data)
            _count(call, document)
            texts = _texts(document)
        except UNREADABLE:
            message = "the upstream's answer is not whole JSON; try again."
            raise ApiError(502, message, code="upstream_broken", retry_after=1) from None
        _guess(call, guess, "".join(texts))
        usd = self._cost(call)
        if isinstance(document.get("usage"), dict):
            document["usage"]["cost_usd"] = round(usd, 10)
        await self._meter.finish(call, 200, usd, held, texts)
        return Reply(JSON, _one(json.dumps(document, ensure_ascii=False).encode()))

    async def _frames(
        self, response: httpx.Response, call: Call, held: Reservation | None, shown: bool, guess: int, most: Most
    ) -> AsyncGenerator[bytes, None]:
        """The upstream's events, one by one; it ends well only with [DONE] or a finished response."""
        status, done, texts = GONE, False, [""]
        try:
            yield b""  # for `begun`
            async for event in events(response, most):
                if event.startswith(b":"):
                    yield KEEP_ALIVE
                    continue
                data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
                if data == b"[DONE]":
                    done = True
                    break
                if not data:
                    continue
                document = json.loads(data)
                if self._take(document, call, texts) and not shown and not document.get("choices"):
                    continue
                if most.pieces is not None and len(call.tally.gaps) > most.pieces:
                    raise ApiError(502, "the upstream writes more than it was asked for.", code="upstream_broken")
                if document.get("type") in ("response.completed", "response.incomplete", "response.failed"):
                    done = True
                if not shown:
                    document.pop("usage", None)
                elif isinstance(document.get("usage"), dict):
                    document["usage"]["cost_usd"] = round(self._cost(call), 10)
                yield event + b"\n\n" if call.endpoint == "/v1/responses" else frame(document)
            if not done:
                raise ApiError(502, "the upstream broke off in the middle of its answer.", code="upstream_broken")
            status = 200
            yield DONE if "responses" not in call.endpoint else b""
        except TimeoutError:
            status = 504
            yield frame(self._late().body()) + DONE
        except (httpx.HTTPError, *UNREADABLE) as error:
            status = 502
            yield frame(unreachable(error).body()) + DONE
        except ApiError as error:
            status = error.status
            yield frame(error.body()) + DONE
        finally:
            self.running -= 1
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await response.aclose()
            if texts[0]:
                _guess(call, guess, texts[0])
            usd = self._cost(call)
            await self._meter.finish(call, status, usd, held, (texts[0],))

    def _take(self, document: dict[str, Any], call: Call, texts: list[str]) -> bool:
        """Note what a chunk says; True when it carries usage."""
        now = time.monotonic()
        for choice in document.get("choices") or []:
            delta = choice.get("delta") or choice
            said = _words(delta, "reasoning_content", "reasoning") + _words(delta, "content", "text")
            if said:
                texts[0] += said
                call.tally.first = call.tally.first or now
                if call.tally.last is not None:
                    call.tally.gaps.append(now - call.tally.last)
                call.tally.last = now
            if choice.get("finish_reason"):
                call.tally.finish[_number(choice.get("index"))] = str(choice["finish_reason"])
        if document.get("type") == "response.output_text.delta":
            texts[0] += str(document.get("delta") or "")
        source = document.get("response") if isinstance(document.get("response"), dict) else document
        if isinstance(source, dict) and source.get("usage"):
            _count(call, source)
            return True
        return False


def _count(call: Call, document: Mapping[str, Any]) -> None:
    usage = document.get("usage") or {}
    tally = call.tally
    tally.prompt = _number(usage.get("prompt_tokens", usage.get("input_tokens")))
    tally.completion = _number(usage.get("completion_tokens", usage.get("output_tokens")))
    prompt = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    answer = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    tally.cached = min(_number(prompt.get("cached_tokens") or usage.get("prompt_cache_hit_tokens")), tally.prompt)
    tally.reasoning = _number(answer.get("reasoning_tokens"))
    for choice in document.get("choices") or []:
        if choice.get("finish_reason"):
            tally.finish[_number(choice.get("index"))] = str(choice["finish_reason"])


def _whole_number(body: Mapping[str, Any], name: str) -> int | None:
    """A field that says how much may be generated: were it read otherwise there than here, limits would not hold."""
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31):
        return value
    raise bad(f"`{name}` must be a whole number.", name, "invalid_value")


def _prompts(prompt: Any) -> int:
    """How many answers a text completion is asked for: one for each prompt."""
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if many else 1


def _number(value: Any) -> int:
    """A count as somebody else gives it; what is none is 0."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0


def _guess(call: Call, prompt: int, text: str) -> None:
    """What the upstream did not count is billed by its characters: an answer without usage is not free."""
    call.tally.prompt = call.tally.prompt or prompt
    call.tally.completion = call.tally.completion or int(len(text) / CHARACTERS)


def _words(said: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that holds text."""
    return next((value for name in names if isinstance(value := said.get(name), str) and value), "")


def _texts(document: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for choice in document.get("choices") or []:
        message = choice.get("message") or {}
        said = _words(message, "content") or _words(choice, "text")
        found.append(_words(message, "reasoning_content", "reasoning") + said)
    return tuple(found)


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body
