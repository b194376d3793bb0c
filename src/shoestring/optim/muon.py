"""Muon (Jordan et al. 2024) for hidden matrices, with Moonlight's scaling so that AdamW's learning rates carry over.

    M ← β M + (1-β) G;   U = (1-β) G + β M  (Nesterov);   O = NewtonSchulz5(U)
    W ← (1 - lr·wd) W - lr · 0.2·sqrt(max(rows, cols)) · O            (Moonlight, arXiv 2502.16982, eq. 4)

Stacks of experts [E, rows, cols] are E matrices. Matrices of one shape are orthogonalised together in one batched
product: tiny models have many tiny matrices, and the calls would cost more than the arithmetic. Everything that is
not a hidden matrix (embeddings, head, router, norms, biases) goes to AdamW, as in Moonlight.
Left out: QK-clip, distributed sharding. `torch.optim.Muon` is the oracle of the tests (2-D only, one by one).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shoestring.optim.base import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


def orthogonalise(update_bNM: Tensor, steps: int = 5) -> Tensor:
    """Each matrix of the batch replaced by about U Vᵀ of its SVD (singular values in roughly [0.7, 1.2])."""
    a, b, c = NEWTON_SCHULZ
    tall = update_bNM.shape[-2] > update_bNM.shape[-1]
    x = update_bNM.mT if tall else update_bNM
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon for parameters of two or three dimensions; see `muon` for the usual split with AdamW."""

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of them, not shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape)].append(p)
            for shape, params in by_shape.items():
                self._update(shape, params, group)

    def _update(self, shape: tuple[int, ...], params: list[Tensor], group: dict[str, Any]) -> None:
        beta, nesterov = group["momentum"], []
        for p in params:
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - beta)
            nesterov.append(p.grad.lerp(buffer, beta).reshape(-1, *shape[-2:]))
        ortho = orthogonalise(torch.cat(nesterov)).split([n.shape[0] for n in nesterov])
        scale = 0.2 * max(shape[-2:]) ** 0.5
        for p, o in zip(params, ortho, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(o.reshape(shape), alpha=-group["lr"] * scale)
