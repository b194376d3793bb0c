"""Hidden states of a student against those of its teacher, through a projection that is learnt with it and thrown away.

    mse      Σ_n w_n · mean_c (W h_n - t_n)²        TinyBERT (arXiv 1909.10351) eq. 8
    cosine   Σ_n w_n · (1 - cos(W h_n, t_n))        DistilBERT (arXiv 1910.01108), with a projection

W is [C, D]: the student's width to the teacher's. Sums over tokens, as every loss here; a term beside a divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoestring.losses._targets import Buffers, Opened, Targets

Measure = Literal["mse", "cosine"]


@dataclass(slots=True)
class WithStates:
    """What a teacher says about N tokens, and its hidden states there: one [N, C] for each layer that is matched."""

    targets: Targets
    states: list[Tensor]

    def __len__(self) -> int:
        return len(self.targets)

    def index_select(self, rows_N: Tensor) -> WithStates:
        return WithStates(self.targets.index_select(rows_N), [s.index_select(0, rows_N) for s in self.states])

    def to(self, device: torch.device) -> WithStates:
        return WithStates(self.targets.to(device), [state.to(device) for state in self.states])

    def width(self, vocab: int) -> int:
        return self.targets.width(vocab)

    def open(self, chunk: slice, temperature: float, buffers: Buffers) -> Opened:
        return self.targets.open(chunk, temperature, buffers)

    def plain(self, logq_NV: Tensor, value: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
        return self.targets.plain(logq_NV, value, temperature)


def states_sum(h_ND: Tensor, t_NC: Tensor, projection_CD: Tensor, weight_N: Tensor, measure: Measure) -> Tensor:
    """Σ_n w_n · distance(W h_n, t_n), in fp32 at least; gradients reach `h_ND` and the projection."""
    accurate = torch.promote_types(h_ND.dtype, torch.float32)
    said_NC = h_ND.to(accurate) @ projection_CD.to(accurate).t()
    told_NC = t_NC.to(accurate)
    if measure == "mse":
        apart_N = (said_NC - told_NC).square().mean(-1)
    else:
        apart_N = 1 - torch.cosine_similarity(said_NC, told_NC, dim=-1)
    return (apart_N * weight_N.to(accurate)).sum()
