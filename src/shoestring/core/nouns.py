"""The nouns every package shares: Problem, Message, Sampling, Completion, Event, Rollout, Trace.

Slotted dataclasses without tensors (core loads no torch): token ids are lists of int, logprobs lists of
float. A Completion carries the ids and the sampler's logprobs of exactly what was sampled; nothing
downstream decodes and encodes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any, Literal

from shoestring.core.errors import UserError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]
CUT_OFF = ("length", "content_filter", "cancelled")  # how an answer ends that was not over, a provider's too
TRACE_SCHEMA = 1
OPTIONAL = ("prompt_logprobs", "thinking_budget", "seed")
COUNTS = ("n", "top_k", "max_new_tokens", "min_new_tokens", "top_logprobs", *OPTIONAL)
AMOUNTS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
MOST = 1e9  # penalties and biases: beyond it, fp32 logits would not stay finite whatever the temperature


def _is_whole(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool)


@dataclass(slots=True, frozen=True)
class Solution:
    """One worked solution: what is thought (may be empty) and the answer given."""

    thinking: str
    answer: str


@dataclass(slots=True, frozen=True)
class Problem:
    """A verifiable problem. `voices` maps a voice ("short", "long") to its worked Solution.

    `id` is a hash of task, version and what makes the problem itself (never its seed): two problems with the
    same id are the same problem. `meta` holds what the grader needs (hidden tests, ...); JSON values only.
    """

    task: str
    version: str
    id: str
    prompt: str
    gold: str
    difficulty: int
    seed: int
    voices: dict[str, Solution] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Message:
    """One turn of a chat. `thinking` is the reasoning of an assistant turn, without its tags; None = no tags."""

    role: Role
    content: str
    thinking: str | None = None


@dataclass(slots=True, frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy. `seed` makes the draw repeatable; None draws a fresh one.

    Logprobs are those of the distribution the token was drawn from: after bias, penalties, grammar, temperature,
    top-k, top-p and min-p, in this order (greedy: at temperature 1). A token that was forced has logprob 0.
    `stop` strings and the stop token are not part of the text; their tokens are part of `token_ids`.
    Raises UserError for values out of range and for options that contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()  # none: the tokenizer's end token
    seed: int | None = None
    routed_experts: bool = False  # record the experts each token was routed to
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    presence_penalty: float = 0.0  # subtracted from the logit of every token sampled before
    frequency_penalty: float = 0.0  # the same, times how often
    repetition_penalty: float = 1.0  # divides positive logits of prompt and sampled tokens, multiplies negative ones
    min_new_tokens: int = 0  # no stop before
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # the tokenizer's end token does not stop
    logit_bias: dict[int, float] | None = None  # added to the logits by token id; -inf bans
    top_logprobs: int = 0  # per token, the best so many of its distribution
    prompt_logprobs: int | None = None  # per prompt token, its own logprob and so many best ones
    thinking_budget: int | None = None  # tokens inside <think> before </think> is forced
    json_schema: str | dict[str, Any] | None = None  # what follows the thinking is JSON of this schema
    regex: str | None = None  # what follows the thinking matches this

    def __post_init__(self) -> None:
        for complaints in (self._kinds(), self._complaints()):
            for wrong, sentence in complaints:
                if wrong:
                    raise UserError(f"sampling.{sentence}")

    @property
    def guided(self) -> bool:
        """Whether a grammar says what may be written."""
        return self.json_schema is not None or self.regex is not None

    def _kinds(self) -> Iterator[tuple[bool, str]]:
        """What is no number at all would fail in the middle of everybody's step."""
        for name in COUNTS:
            value = getattr(self, name)
            fits = _is_whole(value) or (value is None and name in OPTIONAL)
            yield not fits, f"{name} is {value!r}; it must be a whole number."
        for name in AMOUNTS:
            value = getattr(self, name)
            yield not isinstance(value, Real), f"{name} is {value!r}; it must be a number."
        for token, bias in (self.logit_bias or {}).items():
            fits = _is_whole(token) and isinstance(bias, Real)
            yield not fits, f"logit_bias has {token!r}: {bias!r}; it takes token ids to numbers."
        yield not all(map(_is_whole, self.stop_ids)), f"stop_ids is {self.stop_ids!r}; it must hold token ids."

    def _complaints(self) -> Iterator[tuple[bool, str]]:
        """(does it apply, the sentence): ranges first, then contradictions. Written so that NaN is out of range."""
        inf, most = float("inf"), MOST
        yield self.n < 1, f"n is {self.n}; it must be at least 1."
        in_range = 0.0 <= self.temperature < inf
        yield not in_range, f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number."
        yield not 0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must be in (0, 1]."
        yield not 0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; it must be in [0, 1]."
        yield self.top_k < 0, f"top_k is {self.top_k}; it must be 0 (off) or positive."
        yield self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1."
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            yield not -most <= value <= most, f"{name} is {value}; it must be between -{most:g} and {most:g}."
        repetition, fits = self.repetition_penalty, 1 / most <= self.repetition_penalty <= most
        yield not fits, f"repetition_penalty is {repetition}; it must be between {1 / most:g} and {most:g} (1 is off)."
        for name in ("min_new_tokens", "top_logprobs", "prompt_logprobs", "thinking_budget"):
            value = getattr(self, name)
            yield value is not None and value < 0, f"{name} is {value}; it must not be negative."
        for token, bias in (self.logit_bias or {}).items():
            fits = -most <= bias <= most or bias == -inf
            yield not fits, f"logit_bias[{token}] is {bias}; it must be between -{most:g} and {most:g}, or -inf to ban."
        yield isinstance(self.stop, str), "stop is one string; write a tuple of strings, (text,)."
        yield not all(isinstance(text, str) for text in self.stop), f"stop is {self.stop!r}; it must hold strings."
        yield "" in self.stop, "stop holds an empty string, which would stop at once; remove it."
        shorter = self.min_new_tokens > self.max_new_tokens
        yield shorter, f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}."
        grammar = self.guided
        yield self.json_schema is not None and self.regex is not None, "json_schema and regex exclude each other."
        yield grammar and self.ignore_eos, "ignore_eos excludes json_schema and regex, which end by the end token."
        yield grammar and self.min_new_tokens > 0, "min_new_tokens excludes json_schema and regex, which say the end."


TokenLogprobs = list[tuple[int, float]]  # token id and logprob, best first


@dataclass(slots=True)
class Completion:
    """What was sampled after a prompt: `token_ids` and `logprobs` have the same length, the stop id included.

    `text` is the decoded ids without the stop token, cut before a stop string. `routed_experts[t][layer]` lists the
    experts chosen. `prompt_logprobs`: None for the first token, then the token's own pair followed by the best ones.
    `cached_tokens` of the prompt were not computed again.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    routed_experts: list[list[list[int]]] | None = None
    top_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class Event:
    """What one step of the engine added to one sample of a request. The texts of all events are the completion's text.

    `text` is what may be shown now: characters that are still incomplete, and what could become a stop string, wait.
    The first event of a sample has `prompt_logprobs` where they were asked for, the last one `finish_reason` and the
    whole `completion`. `error` says why a sample that nobody cancelled ends so: it could not be gone on with.
    """

    request_id: str
    sample: int  # < sampling.n
    token_ids: list[int]
    text: str
    logprobs: list[float]
    top_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


@dataclass(slots=True)
class Rollout:
    """A completion on the policy's way to becoming training data."""

    problem: Problem
    prompt_ids: list[int]
    completion: Completion
    rewards: dict[str, float] = field(default_factory=dict)  # by name, unweighted
    reward: float = 0.0  # their weighted sum
    advantage: float = 0.0


@dataclass(slots=True)
class Trace:
    """A teacher's kept answer (schema 1). Everything needed to train on it, to price it and to say where it is from."""

    id: str  # hash of teacher, messages, decoding parameters and sample index
    teacher: str  # name asked for
    teacher_reported: str  # name the teacher gave, or the digest of the run that answered
    messages: list[dict[str, Any]]  # the question, as role/content
    thinking: str | None
    answer: str
    prompt_ids: list[int] | None
    token_ids: list[int] | None  # exactly what was sampled, when the teacher shares our tokenizer
    finish_reason: FinishReason
    task: str | None
    problem_id: str | None
    correct: bool | None  # verdict of the task's grader; None when there is none
    decoding: dict[str, Any]
    usage: dict[str, int]
    cost_usd: float
    licence: str  # licence or terms of the teacher's output; "unknown" is allowed, silence is not
    date: str  # ISO 8601, UTC
    schema: int = TRACE_SCHEMA
    # where it is from, when it came over a wire: endpoint, reply id, fingerprint, price row, terms
    source: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Trace:
        schema = row.get("schema")
        if schema != TRACE_SCHEMA:
            raise UserError(
                f"trace {row.get('id', '?')} has schema {schema!r}; this version reads schema {TRACE_SCHEMA}."
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(row) - known):
            raise UserError(
                f"trace {row.get('id', '?')} has unknown field(s) {', '.join(unknown)}; remove them or re-export it."
            )
        if missing := sorted(known - set(row) - {"source"}):
            raise UserError(f"trace {row.get('id', '?')} lacks field(s) {', '.join(missing)}.")
        return cls(**row)
