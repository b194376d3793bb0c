"""Output that follows a JSON schema or a regular expression, by `llguidance` (an optional extra).

The mask of allowed tokens is applied before the softmax, so logprobs are those of the constrained distribution. The
grammar begins after the thinking: while <think> stands open it does not look, and as the very first token <think>
itself is allowed too. The end token is allowed where the grammar may end.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling

FUEL = 500_000  # of a matcher's lexer; an expression that needs more would hold up everybody's step for seconds

if TYPE_CHECKING:
    from shoestring.infer.sequence import Sequence
    from shoestring.text.tokenizer import Tokenizer


class Grammars:
    """Compiles grammars for one tokenizer. Raises UserError when llguidance is missing, or there is no end token."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: frozenset[int]):
        try:
            import llguidance
        except ImportError as error:
            raise UserError("json_schema and regex need llguidance; pip install 'shoestring[guided]'.") from error
        end_ids = frozenset(index for index in end_ids if index < tokenizer.vocab_size)  # padding is no token
        if not end_ids:
            raise UserError("json_schema and regex need a token that ends the answer; give stop_ids.")
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(tokenizer.backend(), n_vocab=vocab, eos_token=sorted(end_ids))

    def make(self, sampling: Sampling) -> Grammar:
        """A matcher at its beginning. Raises UserError for what cannot be compiled or can never be satisfied."""
        matcher = self._library.LLMatcher
        if sampling.regex is not None:
            what, source = "regex", matcher.grammar_from_regex(sampling.regex)
        else:
            what, source = "json_schema", matcher.grammar_from_json_schema(_schema_text(sampling.json_schema))
        wrong, messages = matcher.validate_grammar_with_warnings(source, self._tokenizer)
        if wrong:
            raise UserError(f"sampling.{what} cannot be followed: {_first_line(messages)}.")
        limits = self._library.LLParserLimits(initial_lexer_fuel=FUEL)
        made = matcher(self._tokenizer, source, limits=limits, log_level=0)
        grammar = Grammar(made, self._tokenizer.vocab_size, what)
        if made.is_error() or not grammar.any_allowed():
            raise UserError(
                f"sampling.{what} cannot be satisfied: {_first_line([made.get_error() or 'no text fits'])}."
            )
        return grammar


class Grammar:
    """One sequence's place in its grammar. What it has accepted survives a preemption, being outside the cache.

    `error` says why it cannot be followed further (an expression that grows too large as it goes on).
    """

    def __init__(self, matcher: Any, vocab: int, what: str):
        self._matcher, self._vocab, self._what = matcher, vocab, what
        self.error: str | None = None

    def copy(self) -> Grammar:
        """For another sample, from the same place."""
        return Grammar(self._matcher.deep_copy(), self._vocab, self._what)

    def _allowed(self) -> Tensor:
        """One bit a token, as bool [V]."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits_N8 = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits_N8.flatten()[: self._vocab].bool()

    def any_allowed(self) -> bool:
        return bool(self._allowed().any())

    def mask(self, logits_V: Tensor, also: int | None = None) -> None:
        """Ban, in place, what the grammar does not allow here; `also` stays allowed."""
        banned_V = torch.ones(len(logits_V), dtype=torch.bool)
        banned_V[: self._vocab] = ~self._allowed()
        if also is not None:
            banned_V[also] = False
        logits_V.masked_fill_(banned_V.to(logits_V.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Move on by a sampled token."""
        if not self._matcher.consume_token(token) and not self._matcher.is_stopped():
            raise RuntimeError(f"the grammar refuses a token that its own mask allowed: {self._matcher.get_error()}")
        if self._matcher.is_error():
            reason = _first_line([self._matcher.get_error()])
            self.error = f"sampling.{self._what} cannot be followed to its end: {reason}; make it simpler."


def mask_row(logits_V: Tensor, sequence: Sequence) -> None:
    """The grammar's part of a row, unless it is thinking."""
    thinking = sequence.thinking
    if thinking is not None and thinking.is_open:
        return
    may_think = thinking is not None and not thinking.seen and sequence.produced == 0
    sequence.grammar.mask(logits_V, thinking.open_id if thinking is not None and may_think else None)


def _schema_text(schema: str | dict[str, Any] | None) -> str:
    if not isinstance(schema, str):
        return json.dumps(schema)
    try:
        json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UserError(f"sampling.json_schema is not JSON ({error}); pass a JSON schema.") from error
    return schema


def _first_line(messages: list[str]) -> str:
    text = (messages[0] if messages else "unknown reason").strip().splitlines()
    return text[0].rstrip(".") if text else "unknown reason"
