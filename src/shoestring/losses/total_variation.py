"""Total variation, ½ Σ |q - p|: bounded by 1 whatever the teacher says, so that no token dominates.

dL/dz from dL/dq = sign(q - p)/2. Source: f-DISTILL (arXiv 2307.15190); a subgradient (0) where q = p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoestring.losses._fused import divergence_loss, softmax, through_softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens


def form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers) -> Tensor:
    """Values [n]; the gradient takes the place of z."""
    p_nV, _ = softmax(t_nV, buffers.get("p", t_nV))
    q_nV, _ = softmax(z_nV, t_nV)
    gap_nV = torch.sub(q_nV, p_nV, out=p_nV)
    value_n = torch.linalg.vector_norm(gap_nV, ord=1, dim=1).mul_(0.5)
    through_softmax(q_nV, gap_nV.sign_().mul_(0.5), out=z_nV)
    return value_n


def plain(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """The plain twin of the values."""
    return 0.5 * (logq_NV.exp() - logp_NV.exp()).abs().sum(-1)


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens in nats; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`."""
    return divergence_loss(hidden_ND, weight_VD, tokens, form, **how)
