"""From what is asked to what can be queued: a request, checked, and its samples with all that follows their text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from operator import index
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.infer.check import check_ids, check_sampling
from shoestring.infer.detokenise import StopStrings, TextStream
from shoestring.infer.grammar import Grammar, Grammars
from shoestring.infer.sequence import Request, Sequence, Thinking

if TYPE_CHECKING:
    from shoestring.text.tokenizer import Tokenizer


KEPT = 8  # vocabularies laid out for grammars, by the tokens that end an answer: whoever asks chooses those


class Intake:
    """Requests for one architecture and tokenizer. `room`: positions of the whole cache."""

    def __init__(self, model: Any, tokenizer: Tokenizer | None, room: int):
        self._config, self._routes = model.config, model.n_experts > 0
        self._tokenizer, self._room = tokenizer, room
        self._grammars: dict[frozenset[int], Grammars] = {}

    def check(self, prompt_ids: Seq[int], sampling: Sampling, what: str) -> None:
        """Raise UserError for what can never be answered; `what` names the prompt."""
        check_ids(self._config, prompt_ids, what, sampling.max_new_tokens)
        has, stop_ids = self._tokenizer is not None, self._stop_ids(sampling)
        check_sampling(sampling, self._config, stop_ids, tokenizer=has, routes=self._routes)
        wanted = len(prompt_ids) + (sampling.max_new_tokens if sampling.max_new_tokens > 1 else 0)
        if wanted > self._room:
            raise UserError(
                f"{what} has {len(prompt_ids)} tokens and asks for {sampling.max_new_tokens} new ones, but the cache "
                f"holds {self._room}; shorten it or raise cache_tokens."
            )

    def request(
        self, name: str, prompt_ids: Seq[int], sampling: Sampling, *, salt: str = "", stream: int = 0,
        silent: bool = False,
    ) -> Request:  # fmt: skip
        """A checked request with its samples. Raises UserError for a grammar that cannot be followed."""
        request = Request(
            name, [index(token) for token in prompt_ids], sampling, self._stop_ids(sampling), salt, stream, silent
        )
        request.samples = [self._sequence(request, sample) for sample in range(sampling.n)]
        if sampling.guided and self._tokenizer is not None:
            grammar = self._grammar(self._tokenizer, request)  # compiled once
            for sequence in request.samples:
                sequence.grammar = grammar.copy()
        return request

    def _stop_ids(self, sampling: Sampling) -> frozenset[int]:
        end = None if self._tokenizer is None or sampling.ignore_eos else self._tokenizer.end_id
        return frozenset(sampling.stop_ids or (() if end is None else (end,)))

    def _sequence(self, request: Request, index: int) -> Sequence:
        sequence, sampling, tokenizer = Sequence(request, index), request.sampling, self._tokenizer
        if tokenizer is None:
            return sequence
        if sampling.stop or not request.silent:
            sequence.stream = TextStream(tokenizer)
            sequence.stops = StopStrings(sampling.stop) if sampling.stop else None
        if sampling.thinking_budget is not None or sampling.guided:
            sequence.thinking = Thinking.of(tokenizer, request.prompt_ids)
        return sequence

    def _grammar(self, tokenizer: Tokenizer, request: Request) -> Grammar:
        """The vocabulary is laid out once for all requests that end at the same tokens, and kept for the last few."""
        made = self._grammars.pop(request.stop_ids, None)
        if made is None:
            if len(self._grammars) == KEPT:
                del self._grammars[next(iter(self._grammars))]  # the one that was not asked for the longest
            made = Grammars(tokenizer, self._config.vocab_size, request.stop_ids)
        self._grammars[request.stop_ids] = made
        return made.make(request.sampling)
