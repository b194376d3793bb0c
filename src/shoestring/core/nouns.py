"""The nouns every package shares: Problem, Message, Completion, Rollout, Sampling, Trace.

Slotted dataclasses without tensors (core loads no torch): token ids are lists of int, logprobs lists of
float. A Completion carries the ids and the sampler's logprobs of exactly what was sampled; nothing
downstream decodes and encodes it again (DESIGN rule 3).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from shoestring.core.errors import UserError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]
TRACE_SCHEMA = 1


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

    Logprobs are those of the distribution the token was drawn from (after temperature, top-k and top-p).
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    routed_experts: bool = False  # record the experts each token was routed to

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"sampling.n is {self.n}; it must be at least 1.")
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"sampling.top_p is {self.top_p}; it must be in (0, 1].")
        if self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError("sampling.top_k must be 0 (off) or positive, and sampling.max_new_tokens at least 1.")


@dataclass(slots=True)
class Completion:
    """What was sampled after a prompt: `token_ids` and `logprobs` have the same length, the stop id included.

    `text` is the decoded ids without the stop token. `routed_experts[t][layer]` lists the experts chosen.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    routed_experts: list[list[list[int]]] | None = None


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
        if missing := sorted(known - set(row)):
            raise UserError(f"trace {row.get('id', '?')} lacks field(s) {', '.join(missing)}.")
        return cls(**row)
