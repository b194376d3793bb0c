"""Adaptive KL: w forward + (1-w) reverse, w the share of |p - q| that lies in the teacher's head.

w carries no gradient. Head: the teacher's likeliest tokens up to a mass of `head_mass`.
Source: Wu et al. (arXiv 2404.02657).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoestring.losses._fused import divergence_loss, softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens

DETACHED = "w"  # the value changes with it and the gradient does not: no finite difference agrees
FEW = 256  # candidates for the head before all are sorted


def _head_gap(p_nV: Tensor, gap_nV: Tensor, head_mass: float) -> Tensor:
    """Σ |p - q| over the head of each row."""
    V = p_nV.shape[1]
    few = min(FEW, V)
    top_nk, ids_nk = p_nV.topk(few, dim=1)
    if few < V and bool((top_nk.sum(1) < head_mass).any()):
        top_nk, ids_nk = p_nV.sort(dim=1, descending=True)
    inside_nk = top_nk.cumsum(1) <= head_mass * (1 + 1e-6)
    return (gap_nV.gather(1, ids_nk) * inside_nk).sum(1)


def form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers, *, head_mass: float) -> Tensor:
    """Values [n]; the gradient w (q - p) + (1-w) q (ln(q/p) - RKL) takes the place of z."""
    p_nV, lse_t = softmax(t_nV, buffers.get("p", t_nV))
    q_nV, lse_s = softmax(z_nV, buffers.get("q", t_nV))
    r_nV = torch.sub(z_nV, t_nV, out=t_nV).sub_((lse_s - lse_t)[:, None])  # ln(q/p)
    forward_n, reverse_n = -torch.linalg.vecdot(p_nV, r_nV), torch.linalg.vecdot(q_nV, r_nV)
    gap_nV = torch.sub(q_nV, p_nV, out=z_nV)
    size_nV = torch.abs(gap_nV, out=buffers.get("u", t_nV))
    whole_n = size_nV.sum(1)
    w_n = _head_gap(p_nV, size_nV, head_mass).div_(whole_n.clamp_min(torch.finfo(whole_n.dtype).tiny))
    r_nV.sub_(reverse_n[:, None]).mul_(q_nV).mul_((1 - w_n)[:, None])
    gap_nV.mul_(w_n[:, None]).add_(r_nV)
    return w_n * forward_n + (1 - w_n) * reverse_n


def plain(logp_NV: Tensor, logq_NV: Tensor, *, head_mass: float = 0.5) -> Tensor:
    """The plain twin of the values."""
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    gap_NV = (p_NV - q_NV).abs().detach()
    sorted_NV, ids_NV = p_NV.sort(dim=-1, descending=True)
    head_N = (gap_NV.gather(1, ids_NV) * (sorted_NV.cumsum(-1) <= head_mass * (1 + 1e-6))).sum(-1)
    w_N = head_N / gap_NV.sum(-1).clamp_min(torch.finfo(gap_NV.dtype).tiny)
    forward_N, reverse_N = (p_NV * (logp_NV - logq_NV)).sum(-1), (q_NV * (logq_NV - logp_NV)).sum(-1)
    return w_N * forward_N + (1 - w_N) * reverse_N


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, *, head_mass: float = 0.5, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens in nats; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`.

    Raises ValueError for an option out of range.
    """
    if not 0 < head_mass < 1:
        raise ValueError(f"adaptive.head_mass is {head_mass}; it must lie between 0 and 1")
    return divergence_loss(hidden_ND, weight_VD, tokens, partial(form, head_mass=head_mass), **how)
