"""Span likelihood: (ln q(span) - ln p(span))², over spans of text that both tokenizers cut at the same places.

The log-probability of a span is the sum over its tokens in each side's own tokenization, a lower bound on the string's.
Works across tokenizers. Left out: the binary KL of the span probabilities, which underflows on long spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.losses._teacher import Spans
from shoestring.losses._tokens import Tokens
from shoestring.nn.head import token_logprobs

SPANS = True  # what it reads of a teacher


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, *, temperature: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over spans in nats², a span weighing as its heaviest token; the metric "divergence" is the same sum.

    Raises ValueError when `tokens.teacher` holds no spans.
    """
    if not isinstance(tokens.teacher, Spans):
        raise ValueError("span_likelihood needs the teacher's log-probability of every span (tokens.teacher: Spans)")
    spans: Spans = tokens.teacher
    logp_N, _ = token_logprobs(
        hidden_ND, weight_VD[:vocab], tokens.ids_N, temperature=temperature, softcap=tokens.softcap
    )
    _, span_N = torch.unique(spans.span_N, return_inverse=True)
    weight_N = tokens.weight_N.to(logp_N.dtype)
    count = int(span_N.max()) + 1 if len(span_N) else 0
    ours_S = logp_N.new_zeros(count).index_add(0, span_N, logp_N * (weight_N != 0))
    theirs_S = logp_N.new_zeros(count).scatter(0, span_N, spans.logp_N.to(logp_N.dtype))
    weight_S = logp_N.new_zeros(count).scatter_reduce(0, span_N, weight_N, "amax")
    total = (weight_S * (ours_S - theirs_S).square()).sum()
    return total, {"divergence": total.detach()}
