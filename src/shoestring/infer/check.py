"""What a request must be before it is queued: one sentence for each mistake, before anything is computed.

And of its temperature, as far as fp32 can tell: `warmth` is what is drawn at, and what given tokens are scored at.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import index
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling

COLD, HOT = 1e-30, 1e30  # beyond these a temperature draws what it draws here, but 1 / T leaves fp32


def check_ids(config: Any, ids: Sequence[int], what: str, new_tokens: int) -> None:
    """Raise UserError for no ids, ids outside the vocabulary, or more positions than the model has.

    A single new token is drawn from the last position and needs none of its own.
    """
    vocab, positions = config.vocab_size, config.max_position_embeddings
    if len(ids) == 0:
        raise UserError(f"{what} is empty; it needs at least one token.")
    if set(map(type, ids)) != {int} and (wrong := [token for token in ids if not _is_whole(token)]):
        raise UserError(f"{what} holds {wrong[0]!r}, which is no token id; encode it to whole numbers.")
    if min(ids) < 0 or max(ids) >= vocab:
        raise UserError(
            f"{what} holds a token id outside the model's vocabulary (0 to {vocab - 1}); "
            "encode it with the model's own tokenizer."
        )
    if len(ids) + (new_tokens if new_tokens > 1 else 0) > positions:
        more = f" and asks for {new_tokens} new ones" if new_tokens else ""
        raise UserError(f"{what} has {len(ids)} tokens{more}, but the model has {positions} positions; shorten it.")


def _is_whole(token: Any) -> bool:
    try:
        index(token)
    except TypeError:
        return False
    return not isinstance(token, bool)


def check_sampling(
    sampling: Sampling, config: Any, stop_ids: Collection[int], *, tokenizer: bool, routes: bool
) -> None:
    """Raise UserError for options that this model, or an engine without a tokenizer, cannot follow."""
    vocab = config.vocab_size
    if outside := [t for t in (*sampling.stop_ids, *(sampling.logit_bias or {})) if not 0 <= t < vocab]:
        raise UserError(f"sampling: token id {outside[0]} is outside the model's vocabulary (0 to {vocab - 1}).")
    banned = {token for token, bias in (sampling.logit_bias or {}).items() if bias == float("-inf")}
    if len(banned) == vocab:
        raise UserError("sampling.logit_bias bans every token; leave at least one.")
    if sampling.min_new_tokens and len(banned.union(stop_ids)) == vocab:
        raise UserError("sampling.min_new_tokens leaves no token that does not stop; give fewer stop_ids.")
    if sampling.routed_experts and not routes:
        raise UserError("sampling.routed_experts is on, but the model has no routed experts; turn it off.")
    if not tokenizer:
        for name in ("stop", "thinking_budget", "json_schema", "regex"):
            if getattr(sampling, name) not in (None, ()):
                raise UserError(f"sampling.{name} needs a tokenizer; give the engine one.")


def warmth(temperature: float) -> float:
    """`temperature` within what fp32 can divide by; 0 stays 0, which is greedy."""
    return min(max(temperature, COLD), HOT) if temperature else 0.0
