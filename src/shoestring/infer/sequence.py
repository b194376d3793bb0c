"""What the engine knows about a request and about each of its samples.

A sample's random numbers are a function of (request seed, stream, sample, position): whoever else is in the batch,
however often it is preempted, the draw at a position stays the same. `stream` tells apart the prompts of one
`generate` call that share a seed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from shoestring.core.nouns import Completion, Event, FinishReason, Sampling, TokenLogprobs
from shoestring.infer.detokenise import StopStrings, TextStream
from shoestring.infer.uniforms import draw_key


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and how to continue it; `sampling.n` sequences come of it."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    salt: str = ""
    stream: int = 0
    silent: bool = False  # nobody reads its events
    seed: int = 0  # the sampling's, or a fresh one
    samples: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    adjusts: bool = False  # logits before the draw, by what the sampling asks for
    watches: bool = False  # more of a pass than the next token's logits

    def __post_init__(self) -> None:
        s = self.sampling
        self.seed = secrets.randbits(63) if s.seed is None else s.seed
        penalties = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
        self.adjusts = bool(s.logit_bias or penalties or s.min_new_tokens or s.thinking_budget is not None)
        self.watches = s.routed_experts or s.prompt_logprobs is not None

    def read_anew(self) -> None:
        """Other weights: of a prompt that none of the samples has gone on from, nothing of the old ones is kept."""
        if not any(sample.produced for sample in self.samples):
            self.prompt_logprobs = None
            for sample in self.samples:
                sample.routed = []


@dataclass(slots=True)
class Thinking:
    """Whether the thinking tags stand open, and how many tokens this turn has thought so far.

    Opening the tags again, inside them or after they closed, gives no new budget: else a model that repeats the tag
    would think for ever.
    """

    open_id: int
    close_id: int
    is_open: bool = False
    tokens: int = 0
    seen: bool = False  # whether a tag came after the last turn's beginning

    @classmethod
    def of(cls, tokenizer: Any, prompt_ids: list[int]) -> Thinking | None:
        """As it stands after the prompt; None for a tokenizer without the tags."""
        tags = tokenizer.specials
        if "<think>" not in tags or "</think>" not in tags:
            return None
        thinking = cls(tags["<think>"], tags["</think>"])
        for token in prompt_ids:
            if token == thinking.open_id:
                thinking.tokens = 0
            thinking.see(token)
        thinking.seen = thinking.is_open  # thinking of earlier turns is not this one's
        if not thinking.is_open:
            thinking.tokens = 0
        return thinking

    def see(self, token: int) -> None:
        if token == self.open_id:
            self.tokens += self.is_open
            self.is_open = self.seen = True
        elif token == self.close_id:
            self.is_open = False
        elif self.is_open:
            self.tokens += 1

    def concerns(self, token: int) -> bool:
        """Whether a token about to be seen belongs to the thinking, its tags included."""
        return self.is_open or token == self.open_id

    def forced(self, budget: int | None) -> int | None:
        return self.close_id if budget is not None and self.is_open and self.tokens >= budget else None


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request: its ids so far, and everything that must survive a preemption."""

    request: Request
    sample: int
    ids: list[int] = field(default_factory=list)  # prompt, then what was sampled
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it cannot go on
    key: int = 0
    text: str = ""
    stream: TextStream | None = None
    stops: StopStrings | None = None
    cached_tokens: int = 0
    thinking: Thinking | None = None
    grammar: Any = None  # infer/grammar.py, when the sampling asks for one
    blocks: list[int] | None = None  # of the cache; None while it waits
    table: int = -1  # which state its block table is in
    computed: int = 0  # tokens whose keys are in the cache
    draft: int | None = None  # a guess at the token after the newest one
    names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they are known
    followers: list[Sequence] = field(default_factory=list)  # samples that wait for this one to read the prompt
    routed: list[Any] = field(default_factory=list)  # experts of the computed tokens, in pieces
    _plain: bool = False

    def __post_init__(self) -> None:
        request = self.request
        self.ids = list(request.prompt_ids)
        self.key = draw_key(request.seed, request.stream, self.sample)
        s = request.sampling
        looks = s.stop or s.thinking_budget is not None or s.guided
        self._plain = request.silent and not looks and not s.top_logprobs and not s.min_new_tokens

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    def token(self, index: int) -> int:
        """The token at a position; the draft stands after the last one."""
        if index < len(self.ids):
            return self.ids[index]
        assert self.draft is not None and index == len(self.ids)
        return self.draft

    @property
    def may_draft(self) -> bool:
        """Whether a draft can be of use: there is one, and place for two more tokens."""
        return self.draft is not None and self.decodes and self.produced + 2 <= self.sampling.max_new_tokens

    @property
    def plain(self) -> bool:
        """Whether `take` is enough: silent, and no option looks at the tokens as they come."""
        return self._plain

    def record(self, start: int, routed_nLA: Any) -> None:
        """Keep the experts of the tokens from `start` on; those that were computed before (preempted) are there."""
        known = sum(map(len, self.routed))
        if start + len(routed_nLA) > known:
            self.routed.append(routed_nLA[known - start :])

    def take(self, token: int, logprob: float) -> None:
        """`append` for a sequence whose events nobody reads and that only ids can stop."""
        request = self.request
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in request.stop_ids:
            self.finish_reason = "stop"
        elif len(self.logprobs) >= request.sampling.max_new_tokens:
            self.finish_reason = "length"

    @property
    def decodes(self) -> bool:
        """Whether only its newest token is not in the cache."""
        return self.computed == len(self.ids) - 1

    @property
    def new_ids(self) -> list[int]:
        return self.ids[len(self.request.prompt_ids) :]

    @property
    def produced(self) -> int:
        """Tokens sampled so far."""
        return len(self.logprobs)

    def forced_token(self) -> int | None:
        """The token that must come next, because the thinking budget is spent."""
        return None if self.thinking is None else self.thinking.forced(self.sampling.thinking_budget)

    def append(self, token: int, logprob: float, top: TokenLogprobs | None) -> Event:
        """Take a sampled token in; the event says what is new. Sets `finish_reason` when it was the last."""
        sampling = self.sampling
        if self.grammar is not None and (self.thinking is None or not self.thinking.concerns(token)):
            self.grammar.accept(token)
            self.error = self.grammar.error
        if self.thinking is not None:
            self.thinking.see(token)
        self.ids.append(token)
        self.logprobs.append(logprob)
        if sampling.top_logprobs:
            self.top_logprobs.append(top or [])
        if token in self.request.stop_ids and self.produced >= sampling.min_new_tokens:
            self.finish_reason = "stop"
            text = self._release([])
        else:
            text = self._release([token])
            if self.finish_reason is None and self.produced >= sampling.max_new_tokens:
                self.finish_reason = "length"
        if self.error is not None:  # what has been written is not what was asked for
            self.finish_reason = "cancelled"
        if self.finish_reason is not None:
            text += self._rest()
        return self._event([token], text, [logprob], [top or []] if sampling.top_logprobs else None)

    def cancel(self) -> Event:
        """End here; the completion holds what there is."""
        self.finish_reason = "cancelled"
        return self._event([], self._rest(), [], None)

    def _event(self, token_ids: list[int], text: str, logprobs: list[float], top: list[TokenLogprobs] | None) -> Event:
        self.text += text
        done, first = self.finish_reason is not None, 0 < self.produced == len(token_ids)
        return Event(
            self.request.id, self.sample, token_ids, text, logprobs, top, self.finish_reason,
            self.completion() if done else None, self.cached_tokens, self.request.prompt_logprobs if first else None,
            self.error,
        )  # fmt: skip

    def _release(self, ids: list[int]) -> str:
        """Text that may be shown after these ids; a stop string in it ends the sequence."""
        if self.stream is None or not ids:
            return ""
        text = self.stream.push(ids)
        if self.stops is not None:
            text, found = self.stops.push(text, stopping=self.produced >= self.sampling.min_new_tokens)
            if found:
                self.finish_reason = "stop"
                self.stream = None  # nothing after a stop string is text
        return text

    def _rest(self) -> str:
        """What was held back and turned out to be ordinary text."""
        if self.stream is None:
            return ""
        text, self.stream = self.stream.flush(), None
        if self.stops is None:
            return text
        text, found = self.stops.push(text, stopping=self.finish_reason != "cancelled")
        if found:
            self.finish_reason = "stop"
            return text
        return text + self.stops.flush()

    def _routed(self) -> list[list[list[int]]] | None:
        """Experts of every token that was fed: all but the last."""
        if not self.sampling.routed_experts:
            return None
        pieces: list[list[list[int]]] = []
        for piece_nLA in self.routed:
            pieces += piece_nLA.tolist()
        return pieces[: len(self.ids) - 1]

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            text=self.text, token_ids=self.new_ids, logprobs=self.logprobs, finish_reason=self.finish_reason,
            top_logprobs=self.top_logprobs if self.sampling.top_logprobs else None,
            prompt_logprobs=self.request.prompt_logprobs, cached_tokens=self.cached_tokens,
            routed_experts=self._routed(),
        )  # fmt: skip
