"""What clients may send, as pydantic models: OpenAI's fields, and those that vLLM, DeepSeek and SGLang add.

A field nobody knows is ignored, as OpenAI's server does not but every compatible one does; a field that is known and
cannot be honoured is refused (`UNSUPPORTED`), never dropped in silence. Types are strict: "0.5" is not a number.
null means not given. Field by field the meaning is that of OpenAI's reference; the additions are vLLM's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoestring.core.errors import did_you_mean
from shoestring.serve.errors import ApiError, bad

_MAY_BE_INFINITE = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}|\d{300}")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Known, wanted by somebody, and not honoured here: an answer that looked right would be wrong.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field -> values that change nothing
    "audio": (None,), "modalities": (None, ["text"]), "prediction": (None,), "web_search_options": (None,),
    "functions": (None,), "function_call": (None,), "suffix": (None, ""), "best_of": (None, 1),
    "use_beam_search": (None, False), "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,),
    "guided_grammar": (None,), "bad_words": (None, []), "allowed_token_ids": (None,), "logprob_token_ids": (None,),
    "priority": (None, 0), "length_penalty": (None, 1, 1.0), "truncate_prompt_tokens": (None,), "typical_p": (None, 1),
    "background": (None, False), "previous_response_id": (None,), "conversation": (None,), "prompt": (None,),
    "truncation": (None, "disabled"), "skip_special_tokens": (None, True, False),
    "include_stop_str_in_output": (None, False), "kv_transfer_params": (None,), "prompt_embeds": (None,),
}  # fmt: skip
INSTEAD = {
    "functions": "send `tools`", "function_call": "send `tool_choice`", "guided_json": "send `response_format`",
    "guided_regex": "send `structured_outputs`", "previous_response_id": "send the conversation as `input`",
    "best_of": "send `n`",
}  # fmt: skip


class Fields(BaseModel):
    """Base of every request: strict types, unknown fields ignored, no NaN."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=Fields)


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class FunctionSpec(Fields):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: FunctionName


class SchemaSpec(Fields):
    name: str = "schema"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaSpec | None = None


class StructuredOutputs(Fields):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


class ThinkingSwitch(Fields):
    type: Literal["enabled", "disabled"]


class FunctionCall(Fields):
    name: str
    arguments: str = ""


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(Fields):
    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string; raises ApiError for parts that are not text."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise bad(f'content of type "{part.type}" is not supported; send text.', "messages")
        return "".join(part.text or part.refusal or "" for part in self.content)


class SamplingFields(Fields):
    """What both kinds of completion share."""

    model: str
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    thinking_token_budget: int | None = Field(None, ge=0)
    cache_salt: str | None = Field(None, max_length=256)
    routed_experts: bool | None = None
    user: str | None = None


class ChatRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    thinking: ThinkingSwitch | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Fields):
    """A prompt or messages; `add_special_tokens` is accepted, for nothing is ever added here but by templates."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: list[int]


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError 400 for what is none, and for a number that is none by its place."""
    try:
        found = pydantic_core.from_json(body)
    except ValueError as error:
        raise bad(f"the body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise bad("the body must be a JSON object.", code="invalid_json")
    if _MAY_BE_INFINITE.search(body) and (where := _infinite(found)):
        raise bad(f"`{where}` is NaN or infinite: input should be a finite number.", where, "invalid_value")
    return found


def _infinite(value: Any, where: str = "") -> str | None:
    """The path of a number that JSON has no way to write, which an answer that repeats it could not be read for."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_infinite(item, f"{where}.{name}".removeprefix(".")) for name, item in items)
    return next((path for path in found if path is not None), None)


def asks_logprobs(raw: Mapping[str, Any]) -> bool:
    """Whether a request of any endpoint wants a log-probability; with `logprobs: 0` a text tells each token's own."""
    asked = (raw.get(name) for name in ("logprobs", "prompt_logprobs", "logprob_token_ids"))
    if any(value is not None and value is not False for value in asked):  # 0 is something else than False here
        return True
    include = raw.get("include")
    return bool(raw.get("top_logprobs")) or (isinstance(include, list) and "message.output_text.logprobs" in include)


def read(kind: type[Model], raw: Mapping[str, Any]) -> Model:
    """Validate a request. Raises ApiError 400 with the field and how to mend it."""
    for name, harmless in UNSUPPORTED.items():
        if name in raw and raw[name] not in harmless and name not in kind.model_fields:
            hint = f"; {INSTEAD[name]}" if name in INSTEAD else "; leave it out"
            raise bad(f"`{name}` is not supported here{hint}.", name, "unsupported_parameter")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _explained(kind, raw, error) from None


def _explained(kind: type[Fields], raw: Mapping[str, Any], error: ValidationError) -> ApiError:
    """The first complaint as a sentence. For a union, the branch that came furthest."""
    found = max(error.errors(include_url=False, include_context=False), key=lambda item: len(item["loc"]))
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "missing":
        name = str(first["loc"][-1])
        near = did_you_mean(name, [key for key in raw if key not in kind.model_fields])
        hint = near if near.startswith(" Did") else ""
        return bad(f"`{_path(first['loc'])}` is required.{hint}", _path(first["loc"]), "missing_parameter")
    item = found if found["loc"][:1] == first["loc"][:1] else first
    given = item["input"]
    shown = "NaN or infinite" if item["type"] == "finite_number" else _short(given)
    where = _path(tuple(part for part in item["loc"] if not str(part).startswith(("list[", "function-"))))
    message = item["msg"][:1].lower() + item["msg"][1:]
    return bad(f"`{where}` is {shown}: {message}.", where, "invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """messages.0.content; names of union branches (`str`, `list[str]`, model names) left out."""
    parts = [str(part) for part in loc if isinstance(part, int) or (str(part).islower() and str(part) != "str")]
    return ".".join(parts)


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
