"""The vocabulary head without its logits: logprobs and cross-entropy of chosen tokens, in chunks of rows.

For N tokens, width D and vocabulary V the logits [N, V] exist only `chunk` rows at a time, in forward and in
backward, so memory is O(chunk·V + N·D + V·D) for any vocabulary.

`cross_entropy_sum` makes its gradients in the forward pass (as Liger and Cut-Cross-Entropy do): the weights of
the tokens are known there, which saves computing the logits a second time; `terms_sum` does so for any function of
a token's logprob (policy gradients). `token_logprobs` serves losses whose gradient is known only later: it recomputes
the logits chunk by chunk in the backward.
Products run in the dtype of `hidden_ND`, everything after them in fp32 (fp64 if the input is). The plain twins
`plain_*` materialise everything; tests compare values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.nn.head_rows import accurate, chunk_rows, scaled, unwritten
from shoestring.nn.room import Room
from shoestring.nn.slices import rows_of

Terms = Callable[[Tensor, slice], Tensor]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_N: Tensor,
        weight_N: Tensor,
        chunk: int,
        native: bool,
        room: Room | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        chunks = rows_of(hidden_ND, weight_VD, ids_N, 1.0, chunk, native, room, softcap)
        weight_N = weight_N.to(accurate(hidden_ND.dtype))
        logp_N = torch.empty_like(weight_N)
        want_hidden, want_table = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_VD = unwritten(weight_VD, hidden_ND, room) if want_table else None
        chunks.into(grad_VD)
        for rows in chunks.slices:
            slope_nV, logp_N[rows] = chunks.slopes(rows)
            if want_hidden or want_table:  # d(-w·logp)/dlogits = w·(softmax - onehot)
                chunks.add_gradients(slope_nV, weight_N[rows], rows, grad_ND, grad_VD)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.mark_non_differentiable(logp_N)
        return -(logp_N * weight_N).sum(), logp_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = (scaled(g, grad) for g in ctx.saved_tensors)
        return grad_ND, grad_VD, *[None] * 6


def cross_entropy_sum(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, weight_N: Tensor, *, chunk: int | None = None,
    native: bool = False, room: Room | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(Σ_n weight_n · -log p(ids_n), the detached logprobs [N] in fp32). Rows of weight 0 cost no gradient."""
    rows = chunk or chunk_rows(hidden_ND, weight_VD.shape[0], native)
    loss, logp_N = _CrossEntropySum.apply(hidden_ND, weight_VD, ids_N, weight_N, rows, native, room, softcap)
    return loss, logp_N


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_N: Tensor,
        temperature: float,
        chunk: int,
        native: bool,
        room: Room | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        chunks = rows_of(hidden_ND, weight_VD, ids_N, temperature, chunk, native, room, softcap)
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=accurate(hidden_ND.dtype))
        entropy_N = torch.empty_like(logp_N)
        for rows in chunks.slices:
            logp_N[rows], entropy_N[rows] = chunks.logprobs(rows)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        ctx.temperature, ctx.chunk, ctx.native, ctx.room, ctx.softcap = temperature, chunk, native, room, softcap
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        chunks = rows_of(hidden_ND, weight_VD, ids_N, ctx.temperature, ctx.chunk, ctx.native, ctx.room, ctx.softcap)
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_VD = unwritten(weight_VD, hidden_ND, ctx.room) if ctx.needs_input_grad[1] else None
        chunks.into(grad_VD)
        factor_N = grad_N / -ctx.temperature  # dlogp/dlogits = (onehot - softmax) / temperature
        for rows in chunks.slices:
            chunks.add_gradients(chunks.slopes(rows)[0], factor_N[rows], rows, grad_ND, grad_VD)
        return grad_ND, grad_VD, *[None] * 6


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, *, temperature: float = 1.0, chunk: int | None = None,
    native: bool = False, room: Room | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log p(ids_n) [N] with gradient, the detached entropy [N] in nats), both at `temperature`, in fp32."""
    rows = chunk or chunk_rows(hidden_ND, weight_VD.shape[0], native)
    logp_N, entropy_N = _TokenLogprobs.apply(hidden_ND, weight_VD, ids_N, temperature, rows, native, room, softcap)
    return logp_N, entropy_N


class _TermsSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, terms: Terms, temperature: float, chunk: int,
        native: bool, room: Room | None, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        chunks = rows_of(hidden_ND, weight_VD, ids_N, temperature, chunk, native, room, softcap)
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=accurate(hidden_ND.dtype))
        entropy_N, total = torch.empty_like(logp_N), logp_N.new_zeros(())
        want_hidden, want_table = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_VD = unwritten(weight_VD, hidden_ND, room) if want_table else None
        chunks.into(grad_VD)
        for rows in chunks.slices:
            slope_nV, logp_N[rows], entropy_N[rows] = chunks.slopes_and_entropy(rows)
            with torch.enable_grad():
                logp_n = logp_N[rows].clone().requires_grad_()
                term = terms(logp_n, rows).sum()
                (factor_n,) = torch.autograd.grad(term, logp_n)
            total += term.detach()
            if want_hidden or want_table:  # dlogp/dlogits = (onehot - softmax) / temperature
                chunks.add_gradients(slope_nV, factor_n / -temperature, rows, grad_ND, grad_VD)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.mark_non_differentiable(logp_N, entropy_N)
        return total, logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = (scaled(g, grad) for g in ctx.saved_tensors)
        return grad_ND, grad_VD, *[None] * 7


def terms_sum(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, terms: Terms, *, temperature: float = 1.0,
    chunk: int | None = None, native: bool = False, room: Room | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(Σ_n terms(log p(ids_n)), the detached log p [N] and entropy [N]): as `token_logprobs` with the terms behind it,
    but where a token's term needs no other token its gradient is made in the forward pass, from logits made once.

    `terms(logp_n, rows)`: the terms of a slice of the tokens, differentiable by their logprobs.
    """
    rows = chunk or chunk_rows(hidden_ND, weight_VD.shape[0], native)
    found: tuple[Tensor, Tensor, Tensor] = _TermsSum.apply(
        hidden_ND, weight_VD, ids_N, terms, temperature, rows, native, room, softcap
    )
    return found


def plain_token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, *, temperature: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """The plain twin of `token_logprobs`: all logits at once."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).to(accurate(hidden_ND.dtype))
    logits_NV = softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV
    return torch.log_softmax(logits_NV / temperature, dim=-1).gather(1, ids_N[:, None]).squeeze(1)


def plain_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, weight_N: Tensor) -> Tensor:
    """The plain twin of `cross_entropy_sum`."""
    return -(plain_token_logprobs(hidden_ND, weight_VD, ids_N) * weight_N).sum()
