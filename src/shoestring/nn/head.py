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

from shoestring.nn import elements, multiply
from shoestring.nn.room import Room, cast, empty

CHUNK_ELEMENTS = 1 << 21  # logits alive at a time: 8 MB in fp32, about what a core's caches hold
MIN_ROWS = 128  # fewer, and the pass over the gradient of a wide table costs more than the products (LOG.md, entry 9)

Terms = Callable[[Tensor, slice], Tensor]
PACKED = 8192  # rows of a table up to which our own products pack it anew for each chunk
SLICE_ELEMENTS = 1 << 19  # of the table's gradient that are multiplied and added at a time


def _chunk_rows(hidden_ND: Tensor, vocab: int, native: bool) -> int:
    """Twice as many where no fp32 lies beside logits of two bytes: less memory still, and faster products."""
    rows = max(MIN_ROWS, CHUNK_ELEMENTS // vocab)
    return 2 * rows if elements.usable(native, hidden_ND) and hidden_ND.element_size() == 2 else rows


def _multiplied(native: bool, hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether products with the table are nn/multiply.py's."""
    return len(weight_VD) <= PACKED and multiply.usable(native, hidden_ND, (weight_VD,))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def add_outer(
    grad_VD: Tensor, dz_nV: Tensor, hidden_nD: Tensor, *, first: bool = False, native: bool = False
) -> None:  # fmt: skip
    """Add dzᵀ h; on a CPU some rows of the table at a time, whose product is in cache still when it is added.

    `first`: write it, whatever was there. `native`: the sum without a copy of the product in the table's dtype.
    """
    if grad_VD.dtype == torch.float32 and _multiplied(native, hidden_nD, grad_VD):
        return multiply.gradients(dz_nV, hidden_nD, (grad_VD,), add=not first)
    step = max(1024, SLICE_ELEMENTS // hidden_nD.shape[1]) if grad_VD.device.type == "cpu" else len(grad_VD)
    for part_vD, dz_nv in zip(grad_VD.split(step), dz_nV.split(step, dim=1), strict=True):
        product_vD = dz_nv.t() @ hidden_nD
        if native and part_vD.dtype == torch.float32:
            if first:
                part_vD.zero_()
            elements.call("add_to", product_vD.dtype, product_vD, product_vD.numel(), part_vD)
        elif first:
            part_vD.copy_(product_vD)
        else:
            part_vD.add_(product_vD)


def bend_(z_nV: Tensor, softcap: float, temperature: float = 1.0, slope_nV: Tensor | None = None) -> Tensor:
    """In place the logits that a softcap makes of products z: c tanh(z / c), at the temperature.

    `slope_nV` receives the derivative of c tanh(z / c). Source: Gemma 2 (arXiv 2408.00118) section 2.
    """
    z_nV.div_(softcap).tanh_()
    if slope_nV is not None:
        torch.square(z_nV, out=slope_nV).neg_().add_(1)
    return z_nV.mul_(softcap / temperature)


def _unwritten(weight_VD: Tensor, hidden_ND: Tensor, room: Room | None) -> Tensor:
    """The table's gradient before the first chunk is written to it; zero when there will be none."""
    return empty(room, weight_VD) if len(hidden_ND) else torch.zeros_like(weight_VD)


def scaled(gradient: Tensor | None, grad: Tensor) -> Tensor | None:
    """The gradient made in the forward pass times the one that arrives: the same tensor, no copy, where that is 1."""
    if gradient is None or (grad.device.type == "cpu" and grad == 1):
        return gradient
    return gradient * grad.to(gradient.dtype)


class _Rows:
    """Chunks of rows against the table [V, D], in memory that every chunk uses again."""

    native = False

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, room: Room | None
    ):  # fmt: skip
        self.hidden_ND, self.ids_N1, self.temperature = hidden_ND, ids_N[:, None], temperature
        self.table_VD = cast(room, weight_VD, hidden_ND.dtype)
        chunk = min(chunk, len(hidden_ND))
        self.wide_nV = empty(room, hidden_ND, (chunk, len(weight_VD)), _accurate(hidden_ND.dtype))
        same = self.wide_nV.dtype == hidden_ND.dtype
        self.narrow_nV = self.wide_nV if same else empty(room, hidden_ND, (chunk, len(weight_VD)))
        self.slices = [slice(start, start + chunk) for start in range(0, len(hidden_ND), chunk)] if chunk else []

    def product(self, rows: slice) -> Tensor:
        """The chunk times the table, in the accurate dtype."""
        hidden_nD = self.hidden_ND[rows]
        narrow_nV, wide_nV = self.narrow_nV[: len(hidden_nD)], self.wide_nV[: len(hidden_nD)]
        torch.mm(hidden_nD, self.table_VD.t(), out=narrow_nV)
        if self.narrow_nV is not self.wide_nV:
            wide_nV.copy_(narrow_nV)
        return wide_nV

    def logits(self, rows: slice) -> Tensor:
        """The same at the temperature."""
        wide_nV = self.product(rows)
        return wide_nV if self.temperature == 1.0 else wide_nV.div_(self.temperature)

    def slopes(self, rows: slice) -> tuple[Tensor, Tensor]:
        """((softmax - onehot) in the dtype of products, logprobs of the ids)."""
        p_nV, logp_n = self.softmax(rows)
        return self.slope(p_nV, logp_n, rows), logp_n

    def logprobs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Logprobs of the ids, and the entropy."""
        logp_nV = torch.log_softmax(self.logits(rows), dim=-1)
        logp_n = logp_nV.gather(1, self.ids_N1[rows]).squeeze(1)
        p_nV = torch.exp(logp_nV, out=self.wide_nV[: len(logp_nV)])
        return logp_n, -p_nV.mul_(logp_nV).sum(-1)

    def slopes_and_entropy(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Both, and the entropy."""
        p_nV, logp_n = self.softmax(rows)
        entropy_n = torch.special.entr(p_nV).sum(-1)
        return self.slope(p_nV, logp_n, rows), logp_n, entropy_n

    def softmax(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(probabilities, logprobs of the ids). Every pass over the vocabulary but one reads only: from the largest
        logit x and its probability p, log Σ exp = x - log p, exactly enough because p >= 1/V."""
        wide_nV = self.logits(rows)
        target_n, top_n = wide_nV.gather(1, self.ids_N1[rows]).squeeze(1), wide_nV.amax(-1)
        torch.softmax(wide_nV, dim=-1, out=wide_nV)
        return wide_nV, target_n - (top_n - wide_nV.amax(-1).log_())

    def slope(self, p_nV: Tensor, logp_n: Tensor, rows: slice) -> Tensor:
        """(softmax - onehot), over p, in the dtype of products; p - 1 of a likely target keeps its digits."""
        p_nV.scatter_(1, self.ids_N1[rows], logp_n.expm1()[:, None])
        return p_nV if self.narrow_nV is self.wide_nV else self.narrow_nV[: len(p_nV)].copy_(p_nV)

    def back(self, slope_nV: Tensor, out_nD: Tensor) -> Tensor:
        """Slopes times the table."""
        return torch.mm(slope_nV, self.table_VD, out=out_nD)

    def add_gradients(
        self, slope_nV: Tensor, factor_n: Tensor, rows: slice, grad_ND: Tensor | None, grad_VD: Tensor | None
    ) -> None:
        """Gradients of Σ factor · logit where dlogit = slope. The factor goes onto the D side, the narrow one."""
        factor_n1 = factor_n[:, None]
        if grad_ND is not None:
            self.back(slope_nV, grad_ND[rows]).mul_(factor_n1)
        if grad_VD is not None:
            scaled_nD = (self.hidden_ND[rows] * factor_n1).to(slope_nV.dtype)
            add_outer(grad_VD, slope_nV, scaled_nD, first=rows.start == 0, native=self.native)


class _NativeRows(_Rows):
    """The same in C: a row's logits are read once, and its slope written over them; no fp32 copy of the chunk."""

    native = True

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, room: Room | None
    ):  # fmt: skip
        self.hidden_ND, self.ids_N, self.temperature = hidden_ND, ids_N.contiguous(), temperature
        N = len(hidden_ND)
        count = -(-N // chunk)
        self.slices = [slice(N * i // count, N * (i + 1) // count) for i in range(count)]  # even: none of a few rows
        self.multiplied = chunk >= 16 and _multiplied(True, hidden_ND, weight_VD)
        self.table_VD = weight_VD.contiguous() if self.multiplied else cast(room, weight_VD, hidden_ND.dtype)
        self.narrow_nV = empty(room, hidden_ND, (-(-N // count) if count else 0, len(weight_VD)))

    def _read(self, rows: slice, entropy_n: Tensor | None, slope: bool) -> tuple[Tensor, Tensor]:
        hidden_nD = self.hidden_ND[rows]
        (n, V), narrow_nV = (len(hidden_nD), self.narrow_nV.shape[1]), self.narrow_nV[: len(hidden_nD)]
        if self.multiplied:
            multiply.forward(hidden_nD, (self.table_VD,), narrow_nV)
        else:
            torch.mm(hidden_nD, self.table_VD.t(), out=narrow_nV)
        logp_n = torch.empty(n)
        elements.call(
            "vocabulary", narrow_nV.dtype, narrow_nV, self.ids_N[rows], self.temperature, n, V, logp_n, entropy_n, slope
        )  # fmt: skip
        return narrow_nV, logp_n

    def back(self, slope_nV: Tensor, out_nD: Tensor) -> Tensor:
        if self.multiplied:
            return multiply.inputs(slope_nV, (self.table_VD,), out_nD)
        return super().back(slope_nV, out_nD)

    def slopes(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self._read(rows, None, True)

    def logprobs(self, rows: slice) -> tuple[Tensor, Tensor]:
        entropy_n = torch.empty(len(self.hidden_ND[rows]))
        return self._read(rows, entropy_n, False)[1], entropy_n

    def slopes_and_entropy(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        entropy_n = torch.empty(len(self.hidden_ND[rows]))
        return *self._read(rows, entropy_n, True), entropy_n


class _BentRows(_Rows):
    """The same behind a softcap."""

    softcap = 0.0

    def logits(self, rows: slice) -> Tensor:
        wide_nV = self.product(rows)
        self.bend_nV = torch.empty_like(wide_nV)
        return bend_(wide_nV, self.softcap, self.temperature, self.bend_nV)

    def slope(self, p_nV: Tensor, logp_n: Tensor, rows: slice) -> Tensor:
        return super().slope(p_nV, logp_n, rows).mul_(self.bend_nV)


def _rows(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, native: bool,
    room: Room | None, softcap: float,
) -> _Rows:  # fmt: skip
    if softcap:
        bent = _BentRows(hidden_ND, weight_VD, ids_N, temperature, chunk, room)
        bent.softcap = softcap
        return bent
    way = _NativeRows if elements.usable(native, hidden_ND) else _Rows
    return way(hidden_ND, weight_VD, ids_N, temperature, chunk, room)


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
        chunks = _rows(hidden_ND, weight_VD, ids_N, 1.0, chunk, native, room, softcap)
        weight_N = weight_N.to(_accurate(hidden_ND.dtype))
        logp_N = torch.empty_like(weight_N)
        want_hidden, want_table = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_VD = _unwritten(weight_VD, hidden_ND, room) if want_table else None
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
    rows = chunk or _chunk_rows(hidden_ND, weight_VD.shape[0], native)
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
        chunks = _rows(hidden_ND, weight_VD, ids_N, temperature, chunk, native, room, softcap)
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=_accurate(hidden_ND.dtype))
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
        chunks = _rows(hidden_ND, weight_VD, ids_N, ctx.temperature, ctx.chunk, ctx.native, ctx.room, ctx.softcap)
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_VD = _unwritten(weight_VD, hidden_ND, ctx.room) if ctx.needs_input_grad[1] else None
        factor_N = grad_N / -ctx.temperature  # dlogp/dlogits = (onehot - softmax) / temperature
        for rows in chunks.slices:
            chunks.add_gradients(chunks.slopes(rows)[0], factor_N[rows], rows, grad_ND, grad_VD)
        return grad_ND, grad_VD, *[None] * 6


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, *, temperature: float = 1.0, chunk: int | None = None,
    native: bool = False, room: Room | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log p(ids_n) [N] with gradient, the detached entropy [N] in nats), both at `temperature`, in fp32."""
    rows = chunk or _chunk_rows(hidden_ND, weight_VD.shape[0], native)
    logp_N, entropy_N = _TokenLogprobs.apply(hidden_ND, weight_VD, ids_N, temperature, rows, native, room, softcap)
    return logp_N, entropy_N


class _TermsSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, terms: Terms, temperature: float, chunk: int,
        native: bool, room: Room | None, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        chunks = _rows(hidden_ND, weight_VD, ids_N, temperature, chunk, native, room, softcap)
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=_accurate(hidden_ND.dtype))
        entropy_N, total = torch.empty_like(logp_N), logp_N.new_zeros(())
        want_hidden, want_table = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_VD = _unwritten(weight_VD, hidden_ND, room) if want_table else None
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
    rows = chunk or _chunk_rows(hidden_ND, weight_VD.shape[0], native)
    found: tuple[Tensor, Tensor, Tensor] = _TermsSum.apply(
        hidden_ND, weight_VD, ids_N, terms, temperature, rows, native, room, softcap
    )
    return found


def plain_token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, *, temperature: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """The plain twin of `token_logprobs`: all logits at once."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).to(_accurate(hidden_ND.dtype))
    logits_NV = softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV
    return torch.log_softmax(logits_NV / temperature, dim=-1).gather(1, ids_N[:, None]).squeeze(1)


def plain_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, weight_N: Tensor) -> Tensor:
    """The plain twin of `cross_entropy_sum`."""
    return -(plain_token_logprobs(hidden_ND, weight_VD, ids_N) * weight_N).sum()
