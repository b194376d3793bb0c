"""The vocabulary head without its logits: logprobs and cross-entropy of chosen tokens, in chunks of rows.

For N tokens, width D and vocabulary V the logits [N, V] exist only `chunk` rows at a time, in forward and in
backward, so memory is O(chunk·V + N·D + V·D) for any vocabulary.

`cross_entropy_sum` makes its gradients in the forward pass (as Liger and Cut-Cross-Entropy do): the weights of
the tokens are known there, which saves computing the logits a second time. `token_logprobs` serves losses whose
gradient is known only later (policy gradients): it recomputes the logits chunk by chunk in the backward.
Products run in the dtype of `hidden_ND`, everything after them in fp32 (fp64 if the input is). The plain twins
`plain_*` materialise everything; tests compare values and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # logits alive at a time: 8 MB in fp32, about what a core's caches hold


def _chunk_rows(vocab: int) -> int:
    return max(16, CHUNK_ELEMENTS // vocab)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, weight_N: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        accurate = _accurate(hidden_ND.dtype)
        table_VD = weight_VD.to(hidden_ND.dtype)
        weight_N = weight_N.to(accurate)
        logp_N = torch.empty(hidden_ND.shape[0], dtype=accurate, device=hidden_ND.device)
        want_hidden, want_table = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if want_table else None
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_nV = F.linear(hidden_ND[rows], table_VD).to(accurate)
            lse_n = torch.logsumexp(logits_nV, dim=-1)
            ids_n1 = ids_N[rows, None]
            logp_N[rows] = logits_nV.gather(1, ids_n1).squeeze(1) - lse_n
            if not (want_hidden or want_table):
                continue
            # d(-w·logp)/dlogits = w·(softmax - onehot), written over the logits
            grad_nV = logits_nV.sub_(lse_n[:, None]).exp_()
            grad_nV.scatter_add_(1, ids_n1, torch.full_like(ids_n1, -1, dtype=accurate))
            grad_nV = grad_nV.mul_(weight_N[rows, None]).to(hidden_ND.dtype)
            if grad_ND is not None:
                torch.mm(grad_nV, table_VD, out=grad_ND[rows])
            if grad_VD is not None:
                grad_VD += grad_nV.t() @ hidden_ND[rows]
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.mark_non_differentiable(logp_N)
        return -(logp_N * weight_N).sum(), logp_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        return (
            None if grad_ND is None else grad_ND * grad.to(grad_ND.dtype),
            None if grad_VD is None else grad_VD * grad.to(grad_VD.dtype),
            None,
            None,
            None,
        )


def cross_entropy_sum(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, weight_N: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(Σ_n weight_n · -log p(ids_n), the detached logprobs [N] in fp32). Rows of weight 0 cost no gradient."""
    rows = chunk or _chunk_rows(weight_VD.shape[0])
    loss, logp_N = _CrossEntropySum.apply(hidden_ND, weight_VD, ids_N, weight_N, rows)
    return loss, logp_N


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        accurate = _accurate(hidden_ND.dtype)
        table_VD = weight_VD.to(hidden_ND.dtype)
        logp_N = torch.empty(hidden_ND.shape[0], dtype=accurate, device=hidden_ND.device)
        entropy_N = torch.empty_like(logp_N)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            logp_nV = torch.log_softmax(F.linear(hidden_ND[rows], table_VD).to(accurate) / temperature, dim=-1)
            logp_N[rows] = logp_nV.gather(1, ids_N[rows, None]).squeeze(1)
            entropy_N[rows] = -(logp_nV.exp() * logp_nV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        table_VD = weight_VD.to(hidden_ND.dtype)
        grad_ND, grad_VD = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
        for start in range(0, hidden_ND.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits_nV = F.linear(hidden_ND[rows], table_VD).to(grad_N.dtype) / ctx.temperature
            grad_nV = torch.softmax(logits_nV, dim=-1).neg_()  # dlogp/dlogits = (onehot - softmax) / temperature
            grad_nV.scatter_add_(1, ids_N[rows, None], torch.ones_like(ids_N[rows, None], dtype=grad_nV.dtype))
            grad_nV = grad_nV.mul_((grad_N[rows] / ctx.temperature)[:, None]).to(hidden_ND.dtype)
            torch.mm(grad_nV, table_VD, out=grad_ND[rows])
            grad_VD += grad_nV.t() @ hidden_ND[rows]
        return grad_ND, grad_VD, None, None, None


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log p(ids_n) [N] with gradient, the detached entropy [N] in nats), both at `temperature`, in fp32."""
    rows = chunk or _chunk_rows(weight_VD.shape[0])
    logp_N, entropy_N = _TokenLogprobs.apply(hidden_ND, weight_VD, ids_N, temperature, rows)
    return logp_N, entropy_N


def plain_token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The plain twin of `token_logprobs`: all logits at once."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).to(_accurate(hidden_ND.dtype)) / temperature
    return torch.log_softmax(logits_NV, dim=-1).gather(1, ids_N[:, None]).squeeze(1)


def plain_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, weight_N: Tensor) -> Tensor:
    """The plain twin of `cross_entropy_sum`."""
    return -(plain_token_logprobs(hidden_ND, weight_VD, ids_N) * weight_N).sum()
