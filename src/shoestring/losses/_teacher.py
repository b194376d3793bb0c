"""What a teacher says about N target positions, in the three forms it can be kept: hidden states, top-k, samples.

Each kind turns rows of student logits into values and gradients (`open`): the fused loop in `_fused.py` knows none of
them. `index_select` and `to` are what batches need. Source of the sparse forms: facts of Megatron-LM's and
DistillKit's stores, and Random Sampling KD (arXiv 2503.16870).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.losses._targets import Buffers, Form, Opened
from shoestring.nn.head_rows import bend_


def product(name: str, hidden_nD: Tensor, head_VD: Tensor, buffers: Buffers) -> Tensor:
    """Logits [n, V] of a chunk, in the dtype of `hidden_nD`."""
    return torch.mm(hidden_nD, head_VD.t(), out=buffers.get(name, hidden_nD, head_VD.shape[0]))


def accurate_rows(name: str, logits_nV: Tensor, rows: slice, buffers: Buffers) -> Tensor:
    """Some rows of a chunk's logits in fp32 (or fp64): themselves when they are so already, else a copy in a buffer."""
    some_nV = logits_nV[rows]
    accurate = torch.promote_types(some_nV.dtype, torch.float32)
    return some_nV if some_nV.dtype == accurate else buffers.get(name, some_nV, dtype=accurate).copy_(some_nV)


class _Rows:
    """Selecting and moving, field by field; a field named head_* belongs to all rows."""

    def __len__(self) -> int:
        first: Tensor = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return first.shape[0]

    def _each(self, change: Callable[[Tensor], Tensor], heads: bool) -> Self:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        for name, value in found.items():
            if isinstance(value, Tensor) and (heads or not name.startswith("head")):
                found[name] = change(value)
        return type(self)(**found)

    def index_select(self, rows_N: Tensor) -> Self:
        return self._each(lambda x: x.index_select(0, rows_N.to(x.device)), heads=False)

    def to(self, device: torch.device) -> Self:
        return self._each(lambda x: x.to(device), heads=True)


@dataclass(slots=True)
class Hidden(_Rows):
    """The teacher's hidden states before its head: the whole distribution at any temperature. Online and offline.

    `vocab`: rows of the head that are tokens; padded rows beyond it are left out of both softmaxes.
    """

    hidden_NC: Tensor
    head_VC: Tensor
    vocab: int | None = None
    softcap: float = 0.0  # c of logits c tanh(U h / c); 0: they are U h

    def width(self, vocab: int) -> int:
        return max(vocab, self.vocab or self.head_VC.shape[0])

    def _head(self) -> Tensor:
        return self.head_VC[: self.vocab].to(self.hidden_NC.dtype)

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        plain = temperature == 1 or bool(self.softcap)
        hidden_nC = self.hidden_NC[chunk] if plain else self.hidden_NC[chunk] / temperature
        logits_nV = product("teacher chunk", hidden_nC, buffers.once("head", self._head), buffers)

        def divergence(rows: slice, z_nV: Tensor, form: Form) -> Tensor:
            t_nV = logits_nV[rows]
            if z_nV.dtype != logits_nV.dtype:
                t_nV = accurate_rows("teacher", logits_nV, rows, buffers).to(z_nV.dtype)
            return form(z_nV, bend_(t_nV, self.softcap, temperature) if self.softcap else t_nV, buffers)

        return divergence

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        logits_NV = F.linear(self.hidden_NC, self._head()).to(logq_NV.dtype)
        logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap) if self.softcap else logits_NV
        return value(torch.log_softmax(logits_NV / temperature, dim=-1), logq_NV)


@dataclass(slots=True)
class TopK(_Rows):
    """The k likeliest ids with their log-probabilities, and the log of the mass on all others: a (k+1)-way divergence.

    With the tail as one more outcome the optimum is the teacher's own head and tail mass; truncating or renormalising
    moves it (facts: distillation section 6). Both sides must be at the temperature of capture.
    """

    ids_NK: Tensor  # int64, distinct within a row
    logp_NK: Tensor
    tail_N: Tensor  # ln(1 - mass of the k), taken from full logits

    def width(self, vocab: int) -> int:
        return vocab

    def _outcomes(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Log-probabilities of the k+1 outcomes; rounding in the store is spread over all of them."""
        joined = torch.cat([self.logp_NK[rows].to(dtype), self.tail_N[rows, None].to(dtype)], dim=1)
        return torch.log_softmax(joined, dim=-1)

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        ids_cK = self.ids_NK[chunk]

        def divergence(rows: slice, z_nV: Tensor, form: Form) -> Tensor:
            ids_nK = ids_cK[rows]
            head_nK = z_nV.gather(1, ids_nK)
            rest_nV = z_nV.scatter_(1, ids_nK, float("-inf"))
            share_nV = torch._softmax(rest_nV, 1, False, out=buffers.get("share", z_nV))  # of each id in the tail
            tail_n1 = rest_nV.amax(1, keepdim=True) - share_nV.amax(1, keepdim=True).log_()
            z_nk = torch.log_softmax(torch.cat([head_nK, tail_n1], dim=1), dim=-1)
            start = chunk.start + rows.start
            told_nk = self._outcomes(slice(start, start + len(z_nk)), z_nk.dtype)
            value_n = form(z_nk, told_nk, Buffers())
            # d/dz = G_i on the k ids, G_tail · q_i/q_tail elsewhere: the G sum to zero, so the normaliser drops out
            torch.mul(share_nV, z_nk[:, -1:], out=z_nV)
            z_nV.scatter_(1, ids_nK, z_nk[:, :-1])
            return value_n

        return divergence

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        mask_NV = torch.zeros_like(logq_NV).scatter_(1, self.ids_NK, float("-inf"))
        head_NK = logq_NV.gather(1, self.ids_NK)
        tail_N1 = torch.logsumexp(logq_NV + mask_NV, dim=1, keepdim=True)
        return value(self._outcomes(slice(None), logq_NV.dtype), torch.cat([head_NK, tail_N1], dim=1))


@dataclass(slots=True)
class Sampled(_Rows):
    """Ids drawn from the teacher with their shares: an unbiased cross-entropy, so for forward KL only.

    The gradient q - c/n has the expectation of forward KL's; the value is the cross-entropy, not the divergence.
    """

    ids_NK: Tensor  # int64; an id may stand in a row several times
    share_NK: Tensor  # sums to 1 in a row

    def width(self, vocab: int) -> int:
        return vocab

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        ids_cK, share_cK = self.ids_NK[chunk], self.share_NK[chunk]

        def divergence(rows: slice, z_nV: Tensor, form: Form) -> Tensor:
            if not getattr(form, "linear_in_teacher", False):
                raise ValueError("sampled teacher tokens are unbiased for forward_kl only")
            ids_nK, share_nK = ids_cK[rows], share_cK[rows].to(z_nV.dtype)
            said_n = (z_nV.gather(1, ids_nK) * share_nK).sum(1)
            q_nV = torch._softmax(z_nV, 1, False, out=buffers.get("share", z_nV))
            lse_n = z_nV.amax(1) - q_nV.amax(1).log_()
            z_nV.copy_(q_nV).scatter_add_(1, ids_nK, -share_nK)
            return lse_n - said_n

        return divergence

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        return -(logq_NV.gather(1, self.ids_NK) * self.share_NK.to(logq_NV.dtype)).sum(1)


@dataclass(slots=True)
class Spans(_Rows):
    """For each student token the span of text it belongs to, and the teacher's log-probability of that whole span."""

    span_N: Tensor  # int64; equal numbers are one span, wherever they stand
    logp_N: Tensor

    def width(self, vocab: int) -> int:
        return vocab

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        raise ValueError("spans carry likelihoods, not distributions: use span_likelihood")

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        raise ValueError("spans carry likelihoods, not distributions: use span_likelihood")
