"""Skewed KL: against a mixture of both models, so that no ratio grows beyond 1/alpha. Forward or reverse.

Forward: KL(p, a p + (1-a) q); reverse: KL(q, a q + (1-a) p). Source: DistiLLM (arXiv 2402.03898), a = 0.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoestring.losses._fused import divergence_loss, log_ratio, softmax, through_softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens

LIMIT = 80.0  # |ln(q/p)| beyond which e^x would leave fp32


def forward_form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers, *, alpha: float) -> Tensor:
    """p/m = 1 / (a + (1-a) q/p); dL/dq = -(1-a) p/m."""
    p_nV, _ = softmax(t_nV, buffers.get("p", t_nV))
    log_nV = buffers.get("u", t_nV)
    r_nV = log_ratio(z_nV, t_nV, log_nV).clamp_(-LIMIT, LIMIT)
    d_nV = r_nV.exp_().mul_(1 - alpha).add_(alpha)
    value_n = -torch.linalg.vecdot(p_nV, torch.log(d_nV, out=log_nV))
    q_nV, _ = softmax(z_nV, p_nV)
    through_softmax(q_nV, d_nV.reciprocal_().mul_(alpha - 1), out=z_nV)
    return value_n


def reverse_form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers, *, alpha: float) -> Tensor:
    """q/m = 1 / (a + (1-a) p/q); dL/dq = ln(q/m) + 1 - a q/m."""
    u_nV = buffers.get("u", t_nV)
    r_nV = log_ratio(z_nV, t_nV, u_nV).clamp_(-LIMIT, LIMIT)
    d_nV = r_nV.neg_().exp_().mul_(1 - alpha).add_(alpha)
    torch.log(d_nV, out=u_nV).neg_()
    q_nV, _ = softmax(z_nV, buffers.get("p", t_nV))
    value_n = torch.linalg.vecdot(q_nV, u_nV)
    through_softmax(q_nV, u_nV.sub_(d_nV.reciprocal_().mul_(alpha)), out=z_nV)
    return value_n


def plain(logp_NV: Tensor, logq_NV: Tensor, *, alpha: float = 0.1, reverse: bool = False) -> Tensor:
    """The plain twin of the values."""
    one_NV, other_NV = (logq_NV, logp_NV) if reverse else (logp_NV, logq_NV)
    logm_NV = (alpha * one_NV.exp() + (1 - alpha) * other_NV.exp()).log()
    return (one_NV.exp() * (one_NV - logm_NV)).sum(-1)


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, *, alpha: float = 0.1, reverse: bool = False, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens in nats; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`.

    Raises ValueError for an option out of range.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"skew_kl.alpha is {alpha}; it must be at least 0 (no skew) and below 1 (nothing to learn)")
    form = partial(reverse_form if reverse else forward_form, alpha=alpha)
    return divergence_loss(hidden_ND, weight_VD, tokens, form, **how)
