"""The HTTP side: routes, headers, limits on bodies, and every error in one shape.

FastAPI gives routing and the OpenAPI document; requests are read and validated here (protocol.read), because OpenAI's
clients expect OpenAI's errors.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from shoestring import __version__
from shoestring.serve import pages
from shoestring.serve.answers import ClientGone, Streamed, unless_gone
from shoestring.serve.errors import ApiError, bad
from shoestring.serve.exchange import GONE, SSE, Reply
from shoestring.serve.limits import Account
from shoestring.serve.openapi import described, document
from shoestring.serve.prompt import chat_prompt
from shoestring.serve.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest, parse_json, read
from shoestring.serve.service import Asked, Service, unknown_model
from shoestring.serve.settings import ServeConfig

BODY_SECONDS = 60.0  # in which a body must have come
LONGEST_USER = 256  # characters of the name behind a shared key, which goes into the audit log
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_log = logging.getLogger("shoestring.serve")


def build_app(config: ServeConfig) -> FastAPI:
    """The application; its Service is `app.state.service`. Raises UserError for models that cannot be read."""
    service = Service(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="shoestring", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _failed)
    if config.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.add_middleware(_RequestId)
    _generating(app, service)
    _tokens(app, service)
    _state(app, service)
    pages.mount(app, service)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


def _generating(app: FastAPI, service: Service) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        app.post(path, **described(path))(_endpoint(service, path))


def _endpoint(service: Service, path: str) -> Callable[[Request], Any]:
    async def complete(request: Request) -> Response:
        account = await service.meter.authenticate(request.headers.get("authorization"))
        try:
            return await answer(request, account)
        except ApiError as error:
            if account is not None:
                error.more = account.headers()
            raise

    async def answer(request: Request, account: Account | None) -> Response:
        body = await _body(request, service.config.max_body_bytes)
        raw = parse_json(body)
        headers = request.headers
        user = raw.get("user") or headers.get("x-openwebui-user-id") or headers.get("x-openwebui-user-email")
        client = request.client.host if request.client else "unknown"
        asked = Asked(account, client, request.state.id, str(user)[:LONGEST_USER] if user else None, raw, body)
        key = request.headers.get("idempotency-key")
        if key is None:
            reply = await unless_gone(request, service.complete(path, asked))
        else:
            owner = account.key.id if account else f"open:{hashlib.sha256(client.encode()).hexdigest()[:16]}"
            kept = service.remembered.reply(owner, path, key, body, lambda: service.complete(path, asked))
            reply = await unless_gone(request, kept)
        extra = account.headers() if account else {}
        return await _answer(reply, extra, service.config.reader_seconds)

    return complete


async def _answer(reply: Reply, headers: dict[str, str], reader_seconds: float) -> Response:
    if reply.content_type.startswith(SSE):
        return Streamed(reply, headers, reader_seconds)
    body = b"".join([frame async for frame in reply.frames])
    return Response(body, reply.status, reply.headers | headers, reply.content_type)


def _tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", **described("/tokenize"))
    async def tokenize(request: Request) -> Response:
        account = await service.meter.authenticate(request.headers.get("authorization"))
        raw = parse_json(await _body(request, service.config.max_body_bytes))
        if (passed := await _passed_on(service, "/tokenize", raw, account)) is not None:
            return passed
        asked = read(TokenizeRequest, raw)
        served = service.tokens_of(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad("give either `prompt` or `messages`.", "prompt")

        def ids_of() -> list[int]:
            if asked.prompt is not None:
                return served.tokenizer.encode(asked.prompt, specials=True)
            chat = ChatRequest(model=served.name, messages=asked.messages or [], tools=asked.tools,
                               add_generation_prompt=asked.add_generation_prompt,
                               chat_template_kwargs=asked.chat_template_kwargs)  # fmt: skip
            return chat_prompt(chat, served.tokenizer).ids

        ids = await asyncio.to_thread(ids_of)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": served.positions, "tokens": ids}
        if asked.return_token_strs:
            found["token_strs"] = [served.texts.text(index) for index in ids]
        return JSONResponse(found)

    @app.post("/detokenize", **described("/detokenize"))
    async def detokenize(request: Request) -> Response:
        account = await service.meter.authenticate(request.headers.get("authorization"))
        raw = parse_json(await _body(request, service.config.max_body_bytes))
        if (passed := await _passed_on(service, "/detokenize", raw, account)) is not None:
            return passed
        asked = read(DetokenizeRequest, raw)
        served = service.tokens_of(asked.model)
        if any(not 0 <= index < served.vocab_size for index in asked.tokens):
            raise bad(f"`tokens` holds ids that are no tokens (0 to {served.vocab_size - 1}).", "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(served.tokenizer.decode, asked.tokens)})

    @app.get("/tokenizer_info", **described("/tokenizer_info"))
    async def tokenizer_info(request: Request) -> Response:
        account = await service.meter.authenticate(request.headers.get("authorization"))
        name = request.query_params.get("model")
        if (passed := await _passed_on(service, "/tokenizer_info", None, account, name)) is not None:
            return passed
        tokenizer = service.tokens_of(name).tokenizer
        special = tokenizer.special_tokens
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return JSONResponse(
            {
                **{name: special.get(name) for name in names},
                "chat_template": tokenizer.chat_template,
                "tokenizer_class": tokenizer.config.get("tokenizer_class"),
                "vocab_size": tokenizer.vocab_size,
            }
        )


async def _passed_on(
    service: Service, path: str, raw: dict[str, Any] | None, account: Account | None, model: str | None = None
) -> Response | None:
    """The upstream's answer where the tokens of its models are asked about."""
    given = model if raw is None else raw.get("model")
    name = given if isinstance(given, str) else None
    if service.upstream is None or not await service.passes_on(name, account):
        return None
    return Response(await service.upstream.tokens(path, raw, name), media_type="application/json")


def _state(app: FastAPI, service: Service) -> None:
    async def cards(request: Request) -> list[dict[str, Any]]:
        """The models that this request's key may use."""
        account = await service.meter.authenticate(request.headers.get("authorization"))
        found = [served.card() for served in service.models.values()]
        if service.upstream is not None:
            found += await service.upstream.listed()
        allowed = account.key.models if account else None
        return [card for card in found if allowed is None or card["id"] in allowed]

    @app.get("/v1/models", **described("/v1/models"))
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await cards(request)})

    @app.get("/v1/models/{name:path}", **described("/v1/models/{name}"))
    async def model(request: Request, name: str) -> Response:
        known = {card["id"]: card for card in await cards(request)}
        if name not in known:
            raise unknown_model(name, known)
        return JSONResponse(known[name])

    @app.get("/health", **described("/health"))
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        status, found = service.health()
        return JSONResponse(found, status, {"retry-after": "5"} if status == 503 else None)

    @app.get("/version", **described("/version"))
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics", **described("/metrics"))
    async def metrics() -> Response:
        for name, served in service.models.items():
            service.meter.metrics.engine(name, served.engine.stats, waiting=served.line.waiting)
        return PlainTextResponse(service.meter.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/user/balance", **described("/user/balance"))
    async def balance(request: Request) -> Response:
        account = await service.meter.authenticate(request.headers.get("authorization"))
        left = account.credit_left if account else None
        found: dict[str, Any] = {"is_available": left is None or left > 0, "balance_infos": []}
        if left is not None:
            found["balance_infos"] = [{"currency": "USD", "total_balance": f"{left:.6f}"}]
        if account is not None:
            found["spent_usd"] = account.spent_usd
        return JSONResponse(found)


async def _body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes, within BODY_SECONDS. Raises ApiError 413 or 408."""
    too_large = ApiError(
        413, f"the body is larger than {limit} bytes, the limit here.", code="body_too_large", retry=False
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time.", type="timeout_error", retry=False) from None
    return b"".join(pieces)


class _RequestId:
    """X-Request-Id: the client's if it is a decent one, else a new one; in every answer, and in the logs."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        name = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["id"] = name

        async def tagged(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode("latin-1"))]
            await send(message)

        await self._app(scope, receive, tagged)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        found = ApiError(404, f"there is nothing at {request.url.path}; the API is under /v1.", code="unknown_path")
    else:
        found = ApiError(error.status_code, str(error.detail), type="invalid_request_error")
    return JSONResponse(found.body(), found.status, dict(error.headers or {}) | found.headers())


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def _failed(request: Request, error: Exception) -> Response:
    _log.error("request %s failed", getattr(request.state, "id", "?"), exc_info=error)
    found = ApiError(500, "the server failed; it has been logged.", code="internal_error")
    return JSONResponse(found.body(), 500)
