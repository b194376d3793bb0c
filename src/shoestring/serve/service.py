"""The server without HTTP's details: models, accounts, and what an endpoint does from its JSON to a Reply."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoestring.core.errors import UserError
from shoestring.serve.answers import Remembered
from shoestring.serve.chat_writer import ChatWriter
from shoestring.serve.completion_writer import CompletionWriter
from shoestring.serve.errors import ApiError, bad
from shoestring.serve.exchange import Exchange, Reply
from shoestring.serve.generation import Generation, Part
from shoestring.serve.hooks import Call
from shoestring.serve.limits import Account, Reservation
from shoestring.serve.meter import Meter
from shoestring.serve.prompt import ChatPrompt, chat_prompt, offered
from shoestring.serve.protocol import ChatRequest, CompletionRequest, NamedTool, SamplingFields, asks_logprobs, read
from shoestring.serve.responses_api import ResponsesShape, chat_of
from shoestring.serve.sampling import COMPLETION_TOKENS, grammar_of, new_tokens, to_sampling
from shoestring.serve.served import Served, open_model
from shoestring.serve.settings import ServeConfig
from shoestring.serve.shape import ChunkShape, Shape
from shoestring.serve.tools import call_schema
from shoestring.serve.upstream import Upstream

LONG = 20_000  # characters from which on tokenising leaves the event loop
_log = logging.getLogger("shoestring.serve")


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request, read: who, from where, what."""

    account: Account | None
    client: str
    request_id: str
    user: str | None
    raw: Mapping[str, Any]
    body: bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready for admission."""

    request: SamplingFields
    parts: list[Part]
    shape: Shape


class Service:
    """All there is while a server runs."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.meter = Meter(config)
        self.models = {spec.name: open_model(spec, config) for spec in config.models}
        self.upstream = Upstream(config.upstream, config, self.meter) if config.upstream else None
        self.remembered = Remembered(self.meter.store, self.meter.in_store)
        self.draining = False
        self.started = time.time()

    # ---- life
    async def start(self) -> None:
        """Load every model. Raises UserError when one cannot be loaded."""
        await self.meter.start()
        try:
            await asyncio.gather(*(served.engine.start() for served in self.models.values()))
            if self.upstream is not None:
                await self.upstream.start()
        except RuntimeError as error:
            await self.stop()
            raise UserError(str(error).removeprefix("UserError: ")) from error
        for served in self.models.values():
            served.positions = served.engine.facts["positions"]
            served.vocab_size = served.engine.facts["vocab_size"]

    async def stop(self) -> None:
        await self.remembered.settle(1.0)
        await asyncio.gather(*(served.engine.stop() for served in self.models.values()))
        if self.upstream is not None:
            await self.upstream.stop()
        await self.meter.stop()

    @property
    def busy(self) -> bool:
        """Whether any call is not finished."""
        lines = [served.line for served in self.models.values()]
        upstream = self.upstream is not None and self.upstream.running > 0
        return upstream or any(line.running or line.waiting for line in lines)

    def break_off(self) -> None:
        """End what is running and waiting with an error."""
        error = ApiError(503, "the server is shutting down.", code="draining", retry_after=5)
        for served in self.models.values():
            served.line.close(error)
            served.engine.break_off(error)

    def health(self) -> tuple[int, dict[str, Any]]:
        """(status, document): 503 when draining or when a model's engine is not there."""
        states = {name: served.engine for name, served in self.models.items()}
        well = not self.draining and all(engine.state == "ready" for engine in states.values())
        document: dict[str, Any] = {
            "status": "draining" if self.draining else "ok" if well else "degraded",
            "models": {
                name: {
                    "state": engine.state,
                    "restarts": engine.restarts,
                    **({"reason": engine.reason} if engine.reason else {}),
                    "running": self.models[name].line.running,
                    "waiting": self.models[name].line.waiting,
                }
                for name, engine in states.items()
            },
            "uptime_seconds": round(time.time() - self.started, 1),
        }
        if self.meter.audit is not None and self.meter.audit.failing:
            document["audit"] = {"failing": self.meter.audit.failing, "lost": self.meter.audit.lost}
        if self.meter.failing:
            document["usage"] = {"failing": self.meter.failing}
        return (200 if well else 503), document

    def find(self, name: str | None) -> Served:
        """A model by name. Raises ApiError 404."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None or name not in self.models:
            raise unknown_model(name, self.models)
        return self.models[name]

    def tokens_of(self, name: str | None) -> Served:
        """The model whose tokenizer is asked for; without a name, any when all have the same. Raises ApiError 404."""
        if name is None and len({served.tokenizer.digest() for served in self.models.values()}) == 1:
            return next(iter(self.models.values()))
        return self.find(name)

    async def passes_on(self, name: str | None, account: Account | None) -> bool:
        """Whether tokens of this model are the upstream's to say. Raises ApiError for a key that may not use it."""
        if self.upstream is None or name in self.models or (name is None and self.models):
            return False
        if name is None:
            if account is not None and account.key.models is not None:
                raise bad("`model` is required: this key may use only some.", "model", "missing_parameter")
            return True
        if not await self.upstream.has(name):
            return False
        self.meter.permit(account, name, n=1, logprobs=False)
        return True

    # ---- the endpoints that generate
    async def complete(self, endpoint: str, asked: Asked) -> Reply:
        """/v1/chat/completions, /v1/completions, /v1/responses. Raises ApiError."""
        if self.draining:
            raise ApiError(503, "the server is shutting down; try again.", code="draining", retry_after=5)
        name = asked.raw.get("model")
        if not isinstance(name, str):
            raise bad("`model` is required: the name of a model, as in /v1/models.", "model", "missing_parameter")
        if name not in self.models and self.upstream is not None and await self.upstream.has(name):
            return await self.upstream.complete(endpoint, asked.raw, self._call(endpoint, asked, name), asked.account)
        served = self.find(name)
        long = len(asked.body) > LONG
        prepare = _PREPARE[endpoint]
        prepared = (
            await asyncio.to_thread(prepare, self, served, asked.raw) if long else prepare(self, served, asked.raw)
        )
        return await self._admit(endpoint, asked, served, prepared)

    def _call(self, endpoint: str, asked: Asked, model: str) -> Call:
        key = asked.account.key if asked.account else None
        stream = bool(asked.raw.get("stream"))
        return Call(asked.request_id, endpoint, model, key, asked.user, asked.client, asked.raw, stream=stream)

    async def _admit(self, endpoint: str, asked: Asked, served: Served, prepared: Prepared) -> Reply:
        request, parts = prepared.request, prepared.parts
        first = parts[0].sampling
        call = self._call(endpoint, asked, served.name)
        call.parts, call.max_tokens, call.n = parts, first.max_new_tokens, first.n
        logprobs = asks_logprobs(asked.raw)
        self.meter.permit(asked.account, served.name, n=first.n, logprobs=logprobs)
        served.engine.check()
        prompt = sum(len(part.ids) for part in parts)
        new = sum(part.sampling.max_new_tokens * part.sampling.n for part in parts)
        held: Reservation | None = None
        try:
            if asked.account is not None:
                held = asked.account.reserve(prompt + new, served.usd(prompt, 0, new))
            await self.meter.hooks.before(call)
            line = call.key.id if call.key else asked.client
            place = served.line.enter(line, weight=len(parts) * first.n, tokens=prompt + new)
        except ApiError as error:
            await self.meter.finish(call, error.status, 0.0, held)
            raise
        generation = Generation(
            served.engine, place, call.parts, call.tally, request_id=secrets.token_hex(8),
            salt=f"{call.key.id if call.key else ''}:{request.cache_salt or ''}",
            queue_seconds=self.config.queue_seconds, request_seconds=self.config.request_seconds,
            beat=self.config.keep_alive_seconds,
        )  # fmt: skip
        return await Exchange(call, served, prepared.shape, generation, held, self.meter).open()

    def _chat(self, served: Served, raw: Mapping[str, Any]) -> Prepared:
        request = read(ChatRequest, raw)
        parts, writer = self._chat_parts(served, request)
        return Prepared(
            request, parts, ChunkShape(request, writer, chat=True, answer_id=_name("chatcmpl"), cost=served.cost)
        )

    def _responses(self, served: Served, raw: Mapping[str, Any]) -> Prepared:
        request, asked = chat_of(raw)
        parts, writer = self._chat_parts(served, request)
        return Prepared(request, parts, ResponsesShape(asked, writer, _name("resp"), served.cost))

    def _chat_parts(self, served: Served, request: ChatRequest) -> tuple[list[Part], ChatWriter]:
        self._check_size(served, sum(len(message.text) for message in request.messages))
        prompt = chat_prompt(request, served.tokenizer)
        asked = request.max_completion_tokens or request.max_tokens
        if request.max_tokens == 0:
            raise bad("`max_tokens` is 0; a chat needs at least 1.", "max_tokens")
        new = new_tokens(asked, prompt=len(prompt.ids), positions=served.positions, default=None, param="messages")
        if request.top_logprobs and not request.logprobs:
            raise bad("`top_logprobs` needs `logprobs: true`.", "top_logprobs")
        grammar = grammar_of(request)
        tools = offered(request)
        if tools and (request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)):
            if grammar:
                raise bad("a call that must be made excludes `response_format`.", "response_format")
            try:
                grammar = {"json_schema": call_schema(tools)}
            except UserError as error:
                raise bad(str(error), "tools") from None
        sampling = to_sampling(
            request, self.config, max_new_tokens=new, vocab_size=served.vocab_size, end_id=served.tokenizer.end_id,
            top_logprobs=request.top_logprobs or 0, prompt_logprobs=request.prompt_logprobs, grammar=grammar,
            budget=_budget(request, prompt, new),
        )  # fmt: skip
        writer = ChatWriter(request, prompt, served, alias=self.config.reasoning_alias)
        return [Part(prompt.ids, sampling)], writer

    def _completions(self, served: Served, raw: Mapping[str, Any]) -> Prepared:
        request = read(CompletionRequest, raw)
        prompts, texts = self._prompts(served, request)
        parts = []
        echoed = request.logprobs if request.echo and request.logprobs is not None else None
        about = request.prompt_logprobs if echoed is None else max(echoed, request.prompt_logprobs or 0)
        for ids in prompts:
            new = new_tokens(
                request.max_tokens, prompt=len(ids), positions=served.positions, default=COMPLETION_TOKENS,
                param="prompt",
            )  # fmt: skip
            new = max(1, new)  # the engine reads a prompt by drawing one token, which needs no position
            sampling = to_sampling(
                request, self.config, max_new_tokens=new, vocab_size=served.vocab_size,
                end_id=served.tokenizer.end_id, top_logprobs=request.logprobs or 0, prompt_logprobs=about,
                grammar=grammar_of(request), budget=request.thinking_token_budget,
            )  # fmt: skip
            parts.append(Part(ids, sampling))
        writer = CompletionWriter(request, parts, texts, served)
        return Prepared(
            request, parts, ChunkShape(request, writer, chat=False, answer_id=_name("cmpl"), cost=served.cost)
        )

    def _prompts(self, served: Served, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Ids and texts of a request's prompts; a text is encoded with its special tokens, as vLLM does."""
        given: list[Any]
        if isinstance(request.prompt, str) or (request.prompt and isinstance(request.prompt[0], int)):
            given = [request.prompt]
        else:
            given = list(request.prompt)
        if not given or len(given) > self.config.max_prompts:
            raise bad(f"`prompt` holds {len(given)} prompts; 1 to {self.config.max_prompts} here.", "prompt")
        ids: list[list[int]] = []
        for prompt in given:
            if isinstance(prompt, str):
                self._check_size(served, len(prompt))
                prompt = served.tokenizer.encode(prompt, specials=True)
            if not prompt:
                raise bad("`prompt` is empty; it needs at least one token.", "prompt")
            if min(prompt) < 0 or max(prompt) >= served.vocab_size:
                raise bad(f"`prompt` holds ids that are no tokens (0 to {served.vocab_size - 1}).", "prompt")
            ids.append(prompt)
        texts = [
            prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt) if request.echo else ""
            for prompt in given
        ]
        return ids, texts

    @staticmethod
    def _check_size(served: Served, characters: int) -> None:
        """Refuse what cannot fit before spending time on tokenising it: no token is longer than the longest."""
        least = characters // served.texts.longest
        if least > served.positions:
            raise bad(
                f"This model's maximum context length is {served.positions} tokens. However, your prompt of "
                f"{characters} characters is at least {least} tokens long; shorten it.",
                "messages", "context_length_exceeded",
            )  # fmt: skip


def _budget(request: ChatRequest, prompt: ChatPrompt, new: int) -> int | None:
    if request.thinking_token_budget is not None:
        return request.thinking_token_budget
    return None if prompt.budget_share is None else int(prompt.budget_share * new)


def unknown_model(name: str | None, known: Iterable[str]) -> ApiError:
    """404, with the names there are."""
    message = f'the model "{name}" does not exist; there are: {", ".join(known) or "none here"}.'
    return ApiError(404, message, param="model", code="model_not_found", retry=False)


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


_PREPARE = {
    "/v1/chat/completions": Service._chat,
    "/v1/completions": Service._completions,
    "/v1/responses": Service._responses,
}
