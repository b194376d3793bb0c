"""The OpenAPI document: what each endpoint takes and answers, from the very models that read the requests."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from shoestring.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Fields, TokenizeRequest
from shoestring.serve.responses_api import ResponsesRequest

BODIES: dict[str, type[Fields]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SUMMARIES = {
    "/v1/chat/completions": "Answer a conversation, streamed or whole.",
    "/v1/completions": "Go on with a text or token ids; with echo, score them.",
    "/v1/responses": "OpenAI's responses, by conversion to a chat.",
    "/tokenize": "A text's or conversation's token ids.",
    "/detokenize": "The text of token ids.",
    "/tokenizer_info": "Special tokens and chat template.",
    "/v1/models": "The models served.",
    "/v1/models/{name}": "One model.",
    "/health": "200 when every model answers, else 503.",
    "/version": "The server's version.",
    "/metrics": "Prometheus metrics under vLLM's names.",
    "/user/balance": "What is left of a key's credit.",
}
STATUSES = {
    "400": "a mistake in the request", "401": "no such key", "402": "credit used up", "403": "not allowed to this key",
    "404": "unknown model or path", "405": "another method", "408": "the body came too slowly",
    "409": "Idempotency-Key used for another request", "413": "too large", "429": "this key's own limits",
    "502": "the upstream failed", "503": "full, draining or without its engine", "504": "took too long",
}  # fmt: skip
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def described(path: str) -> dict[str, Any]:
    """Arguments of a route's decorator."""
    wanted = list(STATUSES) if path in GENERATING else ["400", "401", "403", "404", "408", "413"]
    if path == "/health":
        wanted = ["503"]
    elif path in ("/version", "/metrics"):
        wanted = []
    found: dict[str, Any] = {
        "summary": SUMMARIES[path],
        "responses": {int(status): {"description": STATUSES[status]} for status in wanted},
    }
    if path in GENERATING:
        found["responses"][200] = {
            "description": "The answer, or a stream of it.",
            "content": {"application/json": {}, "text/event-stream": {}},
        }
    if path == "/metrics":
        found["responses"][200] = {"description": "Text format 0.0.4.", "content": {"text/plain": {}}}
    if path in BODIES:
        schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
        found["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        }
    return found


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document; made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes, summary="An OpenAI-compatible API")
        pairs = [(model, "validation") for model in dict.fromkeys(BODIES.values())]
        _, schemas = models_json_schema(pairs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        components = found.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas.get("$defs", {}))
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema
