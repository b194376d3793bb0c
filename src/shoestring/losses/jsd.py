"""Generalised Jensen-Shannon divergence: b KL(p, m) + (1-b) KL(q, m) with m = b p + (1-b) q.

dL/dz = (1-b) q (ln(q/m) - KL(q, m)). `beta` weights the teacher in m, as in GKD (arXiv 2306.13649); some tools weigh
the student. Value and gradient vanish as beta nears 0 or 1 (JSD/b tends to forward KL, JSD/(1-b) to reverse KL); those
ends are their own losses and are refused here, not special-cased.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoestring.losses._fused import divergence_loss, log_ratio, softmax, through_softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens

LIMIT = 80.0  # |ln(q/p)| beyond which e^x would leave fp32; m is one of the two by then


def form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers, *, beta: float) -> Tensor:
    """Values [n]; the gradient takes the place of z. ln(q/m) = -ln((1-b) + b p/q)."""
    p_nV, _ = softmax(t_nV, buffers.get("p", t_nV))
    u_nV = buffers.get("u", t_nV)
    r_nV = log_ratio(z_nV, t_nV, u_nV).clamp_(-LIMIT, LIMIT)
    torch.neg(r_nV, out=u_nV).exp_().mul_(beta).add_(1 - beta).log_().neg_()  # ln(q/m)
    to_m_n = -torch.linalg.vecdot(p_nV, r_nV.sub_(u_nV))  # KL(p, m): ln(p/m) = ln(q/m) - ln(q/p)
    q_nV, _ = softmax(z_nV, p_nV)
    from_q_n = through_softmax(q_nV, u_nV, out=z_nV)
    z_nV.mul_(1 - beta)
    return beta * to_m_n + (1 - beta) * from_q_n


def plain(logp_NV: Tensor, logq_NV: Tensor, *, beta: float = 0.5) -> Tensor:
    """The plain twin of the values."""
    logm_NV = (beta * logp_NV.exp() + (1 - beta) * logq_NV.exp()).log()
    return beta * (logp_NV.exp() * (logp_NV - logm_NV)).sum(-1) + (1 - beta) * (
        logq_NV.exp() * (logq_NV - logm_NV)
    ).sum(-1)


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, *, beta: float = 0.5, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens in nats; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`.

    Raises ValueError for an option out of range.
    """
    if not 0 < beta < 1:
        raise ValueError(f"jsd.beta is {beta}; it must lie between 0 (use forward_kl) and 1 (use reverse_kl)")
    return divergence_loss(hidden_ND, weight_VD, tokens, partial(form, beta=beta), **how)
