"""The pieces of OpenAI's answers that several endpoints share: usage, logprobs, frames of a stream."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from shoestring.core.nouns import Completion, TokenLogprobs
from shoestring.serve.generation import Tally
from shoestring.serve.tokens import TokenTexts

FLOOR = -9999.0  # JSON has no minus infinity
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


# made once: json.dumps makes one each time
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def tight(document: Any) -> str:
    """JSON on one line, whatever a reader takes for a line's end: many split streams as `str.splitlines` does."""
    text = _encode(document)
    if text.isascii():
        return text
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def frame(document: dict[str, Any]) -> bytes:
    """One event of a stream. Never with an `id:` line: OpenAI's decoder then chokes on comments."""
    return f"data: {tight(document)}\n\n".encode()


def usage(tally: Tally, usd: float) -> dict[str, Any]:
    """OpenAI's usage, DeepSeek's cache counts, and what the call cost."""
    return {
        "prompt_tokens": tally.prompt,
        "completion_tokens": tally.completion,
        "total_tokens": tally.prompt + tally.completion,
        "prompt_tokens_details": {"cached_tokens": tally.cached},
        "completion_tokens_details": {"reasoning_tokens": tally.reasoning},
        "prompt_cache_hit_tokens": tally.cached,
        "prompt_cache_miss_tokens": tally.prompt - tally.cached,
        "cost_usd": round(usd, 10),
    }


def timings(tally: Tally) -> dict[str, Any]:
    """llama.cpp's names: what was computed, in what time."""
    first, last = tally.first or tally.began, tally.last or tally.began
    prompt_ms = 1000 * (first - (tally.started or tally.began))
    predicted_ms = 1000 * (last - first)
    later = max(0, tally.completion - max(1, len(tally.finish)))  # the first tokens came with the prompt
    return {
        "cache_n": tally.cached,
        "prompt_n": tally.prompt - tally.cached,
        "prompt_ms": round(prompt_ms, 3),
        "predicted_n": tally.completion,
        "predicted_ms": round(predicted_ms, 3),
        "predicted_per_second": round(1000 * later / predicted_ms, 2) if predicted_ms > 0 else None,
        "queue_ms": round(1000 * ((tally.started or tally.began) - tally.began), 3),
        "first_token_ms": round(1000 * (first - tally.began), 3),
    }


def finite(value: float) -> float:
    """A logprob that JSON can hold."""
    return value if math.isfinite(value) else FLOOR


def _entry(index: int, logprob: float, texts: TokenTexts, as_ids: bool) -> dict[str, Any]:
    data = texts.bytes(index)
    return {
        "token": f"token_id:{index}" if as_ids else texts.text(index),
        "logprob": finite(logprob),
        "bytes": list(data),
    }


def chat_logprobs(
    ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TokenLogprobs] | None, count: int,
    texts: TokenTexts, as_ids: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """`logprobs.content` of chats. Thinking and the stop token are tokens like others: one entry for each in usage."""
    return [
        _entry(index, logprob, texts, as_ids)
        | {"top_logprobs": [_entry(i, p, texts, as_ids) for i, p in (top[place][:count] if top and count else [])]}
        for place, (index, logprob) in enumerate(zip(ids, logprobs, strict=True))
    ]


class LegacyLogprobs:
    """`logprobs` of /v1/completions, token by token; offsets count characters of the choice's text."""

    def __init__(self, texts: TokenTexts, *, count: int, as_ids: bool, offset: int = 0) -> None:
        self._texts, self._count, self._as_ids, self._offset = texts, count, as_ids, offset
        self.fields: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

    def _name(self, index: int) -> str:
        return f"token_id:{index}" if self._as_ids else self._texts.text(index)

    def add(self, index: int, logprob: float | None, top: TokenLogprobs | None) -> None:
        """One token; `logprob` None for the first of a prompt."""
        fields, name = self.fields, self._name(index)
        fields["tokens"].append(name)
        fields["text_offset"].append(self._offset)
        self._offset += len(self._texts.text(index))
        fields["token_logprobs"].append(None if logprob is None else finite(logprob))
        if logprob is None:
            fields["top_logprobs"].append(None)
            return
        best: dict[str, float] = {name: finite(logprob)}
        for other, value in (top or [])[: self._count]:
            key = self._name(other)  # ids that decode alike share a key: the likelier one keeps it
            best[key] = max(best.get(key, -math.inf), finite(value))
        fields["top_logprobs"].append(best)


def prompt_logprobs(found: Sequence[TokenLogprobs | None] | None, texts: TokenTexts) -> list[Any] | None:
    """In vLLM's shape: per prompt token {id: {logprob, rank, decoded_token}}, null for the first. The rank of a token
    below the best ones is not known: null."""
    if found is None:
        return None
    rows: list[Any] = []
    for pairs in found:
        if pairs is None:
            rows.append(None)
            continue
        best = dict(pairs[1:])
        row = {}
        for index, value in pairs:
            rank = sum(p > value for p in best.values()) + 1 if index in best else None
            row[str(index)] = {"logprob": finite(value), "rank": rank, "decoded_token": texts.text(index)}
        rows.append(row)
    return rows


def routed_experts(completion: Completion) -> str | None:
    """In vLLM's shape: base64 of an .npy array (tokens - 1, layers, experts per token)."""
    if completion.routed_experts is None:
        return None
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.asarray(completion.routed_experts, dtype=np.int16))
    return base64.b64encode(buffer.getvalue()).decode()
