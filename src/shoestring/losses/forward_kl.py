"""Forward KL, Σ p ln(p/q): the student covers everything the teacher would say. From logits, top-k or samples.

dL/dz = q - p. Source: Hinton et al. (arXiv 1503.02531), without their factor τ². Sampled targets: arXiv 2503.16870.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoestring.losses._fused import divergence_loss, softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens


def form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers) -> Tensor:
    """Values [n]; the gradient takes the place of z."""
    p_nV, lse_t = softmax(t_nV, buffers.get("p", t_nV))
    value_n = torch.linalg.vecdot(p_nV, t_nV.sub_(z_nV)) - lse_t
    q_nV, lse_s = softmax(z_nV, t_nV)
    torch.sub(q_nV, p_nV, out=z_nV)
    return value_n.add_(lse_s)


form.linear_in_teacher = True  # type: ignore[attr-defined]
form.native = "forward_kl"  # type: ignore[attr-defined]


def plain(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """The plain twin of the values."""
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens in nats; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`."""
    return divergence_loss(hidden_ND, weight_VD, tokens, form, **how)
