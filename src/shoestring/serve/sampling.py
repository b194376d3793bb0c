"""From a request's fields to the engine's Sampling, with the server's limits.

Defaults: temperature 1, top_p 1, everything else off, as OpenAI's; a chat without max_tokens may go on to the end of
the context, a completion has 16 tokens, as OpenAI's. Logprobs are of the distribution that was sampled from (after
temperature and restrictions; at temperature 0 of the model's own).
"""

from __future__ import annotations

import math
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.serve.errors import ApiError, bad
from shoestring.serve.protocol import SamplingFields
from shoestring.serve.settings import ServeConfig

COMPLETION_TOKENS = 16
MAX_STOPS = 16  # OpenAI allows 4; lm-eval's tasks have more


def new_tokens(asked: int | None, *, prompt: int, positions: int, default: int | None, param: str) -> int:
    """How many tokens may be generated. Raises ApiError 400 when prompt and answer do not fit the context."""
    if asked is None:
        asked = positions - prompt if default is None else min(default, positions - prompt)
        asked = max(asked, 1)
    if prompt + asked > positions:
        raise bad(
            f"This model's maximum context length is {positions} tokens. However, you requested {prompt + asked} "
            f"tokens ({prompt} in the prompt, {asked} in the completion); shorten one of them.",
            param,
            "context_length_exceeded",
        )
    return asked


def to_sampling(
    fields: SamplingFields, config: ServeConfig, *, max_new_tokens: int, vocab_size: int, end_id: int | None,
    top_logprobs: int, prompt_logprobs: int | None, grammar: dict[str, Any], budget: int | None,
) -> Sampling:  # fmt: skip
    """Raises ApiError 400 naming what is out of range."""
    n = fields.n or 1
    if n > config.max_n:
        raise bad(f"`n` is {n}; at most {config.max_n} here.", "n")
    for name, asked in (("top_logprobs", top_logprobs), ("prompt_logprobs", prompt_logprobs or 0)):
        if asked > config.max_logprobs:
            raise bad(f"`{name}` is {asked}; at most {config.max_logprobs} here.", name)
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stops) > MAX_STOPS:
        raise bad(f"`stop` has {len(stops)} strings; at most {MAX_STOPS} here.", "stop")
    if "" in stops:
        raise bad("`stop` holds an empty string, which would stop at once; remove it.", "stop")
    for index in fields.stop_token_ids or []:
        _known(index, vocab_size, "stop_token_ids")
    try:
        return Sampling(
            n=n,
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_p=_top_p(fields.top_p),
            top_k=max(0, fields.top_k or 0),
            min_p=fields.min_p or 0.0,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(fields.min_tokens or 0, max_new_tokens),
            stop=tuple(stops),
            stop_ids=_stop_ids(fields, end_id),
            ignore_eos=bool(fields.ignore_eos),
            seed=fields.seed,
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            repetition_penalty=fields.repetition_penalty or 1.0,
            logit_bias=_bias(fields.logit_bias, vocab_size),
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            thinking_budget=budget,
            routed_experts=bool(fields.routed_experts),
            **grammar,
        )
    except UserError as error:
        raise ApiError(400, str(error).replace("sampling.", ""), code="invalid_value") from None


def grammar_of(fields: SamplingFields) -> dict[str, Any]:
    """`response_format` or vLLM's `structured_outputs` as the engine's json_schema or regex."""
    found: dict[str, Any] = {}
    wanted = fields.response_format
    if wanted is not None and wanted.type == "json_object":
        found["json_schema"] = {"type": "object"}
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise bad("`response_format` is json_schema without a `json_schema`.", "response_format.json_schema")
        found["json_schema"] = wanted.json_schema.schema_
    other = fields.structured_outputs
    if other is not None:
        if found or sum(value is not None for value in (other.json_, other.regex, other.choice)) != 1:
            raise bad(
                "give one of `response_format` and structured_outputs' json, regex, choice.", "structured_outputs"
            )
        if other.choice == []:
            raise bad("`structured_outputs.choice` is empty; give at least one text.", "structured_outputs.choice")
        if other.choice is not None:
            found["regex"] = "|".join(f"({_literal(text)})" for text in other.choice)
        elif other.regex is not None:
            found["regex"] = other.regex
        else:
            found["json_schema"] = other.json_
    return found


def _stop_ids(fields: SamplingFields, end_id: int | None) -> tuple[int, ...]:
    """Stop ids of the request beside the end of turn; the engine's default is the latter alone."""
    given = tuple(fields.stop_token_ids or ())
    return (*given, end_id) if given and end_id is not None and not fields.ignore_eos else given


def _literal(text: str) -> str:
    return "".join(f"\\{char}" if char in r"\.^$|?*+()[]{}/-" else char for char in text)


def _top_p(value: float | None) -> float:
    """0 is allowed on the wire and means the most likely token alone."""
    return 1.0 if value is None else max(value, 1e-9)


def _bias(given: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not given:
        return None
    found = {}
    for key, value in given.items():
        if not key.isdecimal() or not key.isascii() or len(key) > 10:
            raise bad(f'`logit_bias` has the key "{key[:40]}"; keys are token ids.', "logit_bias")
        if not -100 <= value <= 100 or math.isnan(value):
            raise bad(f"`logit_bias.{key}` is {value}; it must be between -100 and 100.", "logit_bias")
        _known(int(key), vocab_size, "logit_bias")
        found[int(key)] = -math.inf if value == -100 else value
    return found


def _known(index: int, vocab_size: int, param: str) -> None:
    if not 0 <= index < vocab_size:
        raise bad(f"`{param}` holds {index}, which is no token id (0 to {vocab_size - 1}).", param)
