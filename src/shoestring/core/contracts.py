"""The contracts between parts, as types. Their contract tests live in tests/contracts.

No torch here: a model is `Any`, token ids are sequences of int, logprobs lists of float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from shoestring.core.nouns import Completion, Message, Problem, Sampling, Trace


@runtime_checkable
class Generator(Protocol):
    """The engine's contract: token ids in and out, logprobs defined at the sampling temperature."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in order. Raises UserError for an empty or over-long prompt,
        or ids outside the vocabulary. The same seed gives the same completions."""
        ...

    def score(self, token_ids: Sequence[Sequence[int]], *, temperature: float = 1.0) -> list[list[float]]:
        """For each sequence of length T the T-1 logprobs of tokens 1..T-1 given what stands before them."""
        ...

    def update_weights(self, model: Any) -> None:
        """Use `model`'s weights from the next call on; anything cached from the old ones is dropped."""
        ...

    def let_go(self) -> None:
        """Free what was made ready of the weights, and what is cached: the next `generate` makes it anew."""
        ...


@dataclass(slots=True, frozen=True)
class Question:
    """What a teacher is asked: the messages, and the problem behind them when there is one."""

    messages: tuple[Message, ...]
    problem: Problem | None = None
    id: str = ""


@runtime_checkable
class Teacher(Protocol):
    """Who answers. `answer` yields traces as they arrive, in any order; every yielded trace is complete."""

    name: str
    licence: str

    def answer(self, questions: Iterable[Question], sampling: Sampling) -> Iterator[Trace]: ...


@dataclass(slots=True, frozen=True)
class LedgerEntry:
    """One line of runs/ledger.jsonl: an attempt at a stage, failed ones too. Written when the attempt ends."""

    run: str  # directory name under runs/
    stage: str
    recipe: str
    status: str  # finished | failed | interrupted
    attempt: int
    started: str  # ISO 8601, UTC
    ended: str
    seconds: float
    tokens: int
    flops: float
    usd: float
    headline: bool  # part of the final run, as against an ablation, a control or an evaluation
    detail: dict[str, Any] = field(default_factory=dict)
    sampled_tokens: int = 0  # of `tokens`, those that sampling read and wrote
    schema: int = 1
