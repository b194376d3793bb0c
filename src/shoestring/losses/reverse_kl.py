"""Reverse KL, Σ q ln(q/p): the student keeps to what the teacher would say too. The loss of on-policy distillation.

dL/dz = q (ln(q/p) - RKL). Source: MiniLLM (arXiv 2306.08543), GKD (arXiv 2306.13649); full vocabulary, single step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shoestring.losses._fused import divergence_loss, log_ratio, softmax, through_softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens


def form(z_nV: Tensor, t_nV: Tensor, buffers: Buffers) -> Tensor:
    """Values [n]; the gradient takes the place of z."""
    work = buffers.get("p", t_nV)
    ratio_nV = log_ratio(z_nV, t_nV, work)
    q_nV, _ = softmax(z_nV, work)
    return through_softmax(q_nV, ratio_nV, out=z_nV)


form.native = "reverse_kl"  # type: ignore[attr-defined]


def plain(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """The plain twin of the values."""
    return (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1)


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens in nats; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`."""
    return divergence_loss(hidden_ND, weight_VD, tokens, form, **how)
