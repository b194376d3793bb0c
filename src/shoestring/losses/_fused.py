"""The fused head-to-head divergence: student hidden states against a teacher's, with no logits for all tokens.

For N tokens and vocabulary V the logits of student and teacher exist only a chunk of rows at a time, and what is
computed of them in fp32 only a few rows at a time, small enough for a core's cache. The gradients are
made in the forward pass, chunk by chunk (as `nn/head.py` does for cross-entropy); the backward only scales them:

    z = U h / τ,  t = U_T h_T / τ;   value and dz from the form;   dh = w/τ · dz U,   dU += dzᵀ (w/τ · h)

Weights and 1/τ are applied on the narrow side, so no pass over [n, V] is spent on them. Products run in the dtype of
the hidden states, everything else in fp32 (fp64 if they are); dU accumulates in the dtype of the head.
The plain twin, `plain_divergence_sum`, materialises everything; tests compare values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.losses._native import native_form
from shoestring.losses._slices import sliced_kl
from shoestring.losses._targets import Buffers, Form, Targets
from shoestring.losses._teacher import Hidden, accurate_rows, product
from shoestring.losses._tokens import Tokens
from shoestring.nn import elements
from shoestring.nn.head_rows import add_outer, bend_, scaled
from shoestring.nn.room import Room, cast, empty
from shoestring.nn.slices import worth_it

CHUNK_ELEMENTS = 1 << 22  # logits of one model alive at a time, in the dtype of products
MIN_ROWS = 128  # fewer rows a chunk, and the products are slow and the pass over dU costs more than they do
BLOCK_ELEMENTS = 1 << 17  # logits in fp32 at a time: 512 KB a buffer, so that a form's passes stay in a core's cache


def chunk_rows(vocab: int) -> int:
    """Rows of a chunk, the unit of products, for logits of this width."""
    return max(MIN_ROWS, CHUNK_ELEMENTS // vocab)


def block_rows(vocab: int) -> int:
    """Rows of a block, the unit of everything between products."""
    return max(1, BLOCK_ELEMENTS // vocab)


def _kept(
    ctx: Any, value_N: Tensor, weight_N: Tensor, grad_ND: Tensor | None, grad_VD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients laid by for the backward; what the forward returns."""
    ctx.save_for_backward(grad_ND, grad_VD)
    ctx.mark_non_differentiable(value_N)
    return (value_N * weight_N).sum(), value_N


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, weight_N: Tensor, targets: Targets, form: Form,
        temperature: float, vocab: int, chunk: int, native: bool, room: Room | None, softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N, dtype = hidden_ND.shape[0], hidden_ND.dtype
        grad_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_VD = empty(room, weight_VD) if ctx.needs_input_grad[1] else None
        if grad_VD is not None:
            grad_VD[vocab if N else 0 :].zero_()  # the rest is written by the first chunk
        quick = native_form(form, hidden_ND, vocab, targets) if native and not softcap else None
        if quick is not None and isinstance(targets, Hidden) and worth_it(native, hidden_ND, weight_VD[:vocab]):
            part_VD = None if grad_VD is None else grad_VD[:vocab]
            reverse = form.native == "reverse_kl"  # type: ignore[attr-defined]
            value_N = sliced_kl(
                hidden_ND, weight_VD[:vocab], weight_N, targets, reverse, temperature, grad_ND, part_VD, room
            )  # fmt: skip
            return _kept(ctx, value_N, weight_N, grad_ND, grad_VD)
        accurate = torch.promote_types(dtype, torch.float32)
        table_VD = cast(room, weight_VD[:vocab], dtype)
        scale_N1 = (weight_N.to(accurate) / temperature)[:, None]
        value_N = torch.zeros(N, dtype=accurate, device=hidden_ND.device)
        buffers = Buffers(room)
        block = chunk if quick is not None else block_rows(targets.width(vocab))
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            hidden_nD = hidden_ND[rows] if temperature == 1 or softcap else hidden_ND[rows] / temperature
            z_nV = product("student chunk", hidden_nD, table_VD, buffers)
            divergence = targets.open(rows, temperature, buffers)
            for first in range(0, len(z_nV), block):
                some = slice(first, min(first + block, len(z_nV)))
                z_bV = z_nV if quick is not None else accurate_rows("student", z_nV, some, buffers)
                bend_bV = buffers.get("bend", z_bV) if softcap else None
                if bend_bV is not None:
                    bend_(z_bV, softcap, temperature, bend_bV)
                value_N[start + some.start : start + some.stop] = divergence(some, z_bV, quick or form)
                if bend_bV is not None:
                    z_bV.mul_(bend_bV)
                if z_bV.dtype != dtype:
                    z_nV[some] = z_bV
            if grad_ND is not None:
                grad_ND[rows] = torch.mm(z_nV, table_VD) * scale_N1[rows]
            if grad_VD is not None:
                add_outer(
                    grad_VD[:vocab], z_nV, (hidden_ND[rows] * scale_N1[rows]).to(dtype), first=start == 0,
                    native=elements.usable(native, z_nV),
                )  # fmt: skip
        return _kept(ctx, value_N, weight_N, grad_ND, grad_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = (scaled(g, grad) for g in ctx.saved_tensors)
        return grad_ND, grad_VD, *[None] * 9


def divergence_sum(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, form: Form, *, temperature: float = 1.0,
    vocab: int | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(Σ_n weight_n · value_n, the detached values [N] in nats) of `form` against `tokens.teacher`.

    `vocab`: head rows that are tokens, the rest is padding and takes no part. The sum is not multiplied by τ².
    Raises ValueError when there is no teacher, or when it does not cover the tokens.
    """
    targets = _teacher(tokens)
    vocab = weight_VD.shape[0] if vocab is None else vocab
    rows = chunk or min(chunk_rows(targets.width(vocab)), max(1, len(tokens.ids_N)))
    total, value_N = _DivergenceSum.apply(
        hidden_ND,
        weight_VD,
        tokens.weight_N,
        targets,
        form,
        temperature,
        vocab,
        rows,
        tokens.native,
        tokens.room,
        tokens.softcap,
    )
    return total, value_N


def divergence_loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, form: Form, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`divergence_sum` as an objective: (sum, {"divergence": the same sum, detached}). `how`: its keywords."""
    total, _ = divergence_sum(hidden_ND, weight_VD, tokens, form, **how)
    return total, {"divergence": total.detach()}


def plain_divergence_sum(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, value: Callable[[Tensor, Tensor], Tensor], *,
    temperature: float = 1.0, vocab: int | None = None,
) -> Tensor:  # fmt: skip
    """The plain twin: `value(log p [N, V], log q [N, V]) -> [N]` under autograd."""
    logits_NV = F.linear(hidden_ND, weight_VD[:vocab].to(hidden_ND.dtype))
    logits_NV = logits_NV.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    if tokens.softcap:
        logits_NV = tokens.softcap * torch.tanh(logits_NV / tokens.softcap)
    logq_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    return (_teacher(tokens).plain(logq_NV, value, temperature) * tokens.weight_N).sum()


def _teacher(tokens: Tokens) -> Targets:
    if tokens.teacher is None:
        raise ValueError("a divergence needs the teacher's side (tokens.teacher) of every token")
    if len(tokens.teacher) != tokens.ids_N.shape[0]:
        raise ValueError(f"the teacher covers {len(tokens.teacher)} tokens of {tokens.ids_N.shape[0]}")
    return tokens.teacher


# ---- what the forms are made of


def softmax(z_nV: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [n, V] in `out`, log-sum-exp [n]): the normaliser is read off the largest entry, not summed again."""
    p_nV = torch._softmax(z_nV, 1, False, out=out)
    return p_nV, z_nV.amax(1).sub_(p_nV.amax(1).log_())


def log_ratio(z_nV: Tensor, t_nV: Tensor, work: Tensor) -> Tensor:
    """ln(q/p) in `t_nV`; `z_nV` stays. The difference of two softmaxes in logs, zero where the logits agree."""
    logp_nV = torch._log_softmax(t_nV, 1, False, out=work)
    return torch._log_softmax(z_nV, 1, False, out=t_nV).sub_(logp_nV)


def through_softmax(q_nV: Tensor, g_nV: Tensor, out: Tensor) -> Tensor:
    """dL/dz = q ∘ (g - <q, g>) in `out`, from g = dL/dq, which is overwritten. Returns <q, g>."""
    mean_n = torch.linalg.vecdot(q_nV, g_nV)
    torch.mul(q_nV, g_nV.sub_(mean_n[:, None]), out=out)
    return mean_n
