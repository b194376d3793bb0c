"""Several teachers of one vocabulary as one: their distributions pooled, a block of rows at a time.

    probabilities   p = Σ_k w_k p_k          the forward KL to it is Σ_k w_k KL(p_k | q) but for a constant
    logits          ln p = Σ_k w_k t_k - ln Z    the reverse KL to it is Σ_k w_k KL(q | p_k) but for a constant
    divergences     Σ_k w_k D(p_k, q)            nothing is pooled: for accounts of any kind, stores among them

with Σ w = 1, all at the temperature. Linear and logarithmic opinion pools: Genest and Zidek (Statistical Science 1986).
Each teacher keeps its own width; logits of each exist for one chunk only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoestring.losses._targets import Buffers, Form, Opened, Targets

Pool = Literal["probabilities", "logits", "divergences"]


@dataclass(slots=True)
class Several:
    """`teachers` cover the same tokens and the same vocabulary, each with logits of its own; `shares` sum to 1."""

    teachers: list[Targets]
    shares: tuple[float, ...]
    pool: Pool = "probabilities"

    def __len__(self) -> int:
        return len(self.teachers[0])

    def index_select(self, rows_N: Tensor) -> Several:
        return Several([teacher.index_select(rows_N) for teacher in self.teachers], self.shares, self.pool)

    def to(self, device: torch.device) -> Several:
        return Several([teacher.to(device) for teacher in self.teachers], self.shares, self.pool)

    def width(self, vocab: int) -> int:
        return max(teacher.width(vocab) for teacher in self.teachers)

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        opened = []
        for number, teacher in enumerate(self.teachers):  # scratch rows of its own: all are alive at once
            own: Buffers = buffers.once(f"teacher {number}", Buffers)
            opened.append((teacher.open(chunk, temperature, own), own))

        def summed(rows: slice, z_nV: Tensor, form: Form) -> Tensor:
            slope_nV, value_n = buffers.get("summed slopes", z_nV).zero_(), z_nV.new_zeros(len(z_nV))
            for share, (open_, own) in zip(self.shares, opened, strict=True):
                own_nV = own.get("own logits", z_nV).copy_(z_nV)  # the gradient takes their place
                value_n += share * open_(rows, own_nV, form)
                slope_nV.add_(own_nV, alpha=share)
            z_nV.copy_(slope_nV)
            return value_n

        def divergence(rows: slice, z_nV: Tensor, form: Form) -> Tensor:
            pooled_nV: Tensor | None = None
            for share, (open_, own) in zip(self.shares, opened, strict=True):
                said_nV = open_(rows, z_nV, _logits)
                if self.pool == "logits":
                    said_nV.mul_(share)
                    pooled_nV = said_nV if pooled_nV is None else pooled_nV.add_(said_nV)
                    continue
                logp_nV = torch._log_softmax(said_nV, 1, False, out=own.get("pooled", said_nV)).add_(math.log(share))
                pooled_nV = logp_nV if pooled_nV is None else torch.logaddexp(pooled_nV, logp_nV, out=pooled_nV)
            assert pooled_nV is not None
            return form(z_nV, pooled_nV, buffers)

        return summed if self.pool == "divergences" else divergence

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        if self.pool == "divergences":
            pairs = zip(self.shares, self.teachers, strict=True)
            return torch.stack([share * teacher.plain(logq_NV, value, temperature) for share, teacher in pairs]).sum(0)
        said: list[Tensor] = []
        for teacher in self.teachers:
            teacher.plain(logq_NV, lambda logp_NV, _: said.append(logp_NV) or logp_NV, temperature)  # type: ignore[func-returns-value]
        shares_K = torch.tensor(self.shares, dtype=logq_NV.dtype, device=logq_NV.device)[:, None, None]
        logp_KNV = torch.stack(said)
        if self.pool == "logits":
            return value(torch.log_softmax((shares_K * logp_KNV).sum(0), dim=-1), logq_NV)
        return value(torch.logsumexp(shares_K.log() + logp_KNV, dim=0), logq_NV)


def _logits(z_nV: Tensor, t_nV: Tensor, buffers: Buffers) -> Tensor:
    """As a form: the teacher's logits themselves."""
    return t_nV
