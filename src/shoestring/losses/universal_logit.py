"""Universal logit distillation, Σ |sort(q) - sort(p)|: for a teacher of another tokenizer, of any vocabulary.

Compares the shapes of two distributions, not which tokens they hold: permuting q costs nothing, so add `text_weight`.
The shorter side is padded with zeros. Source: Boizard et al. (arXiv 2402.12030).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoestring.losses._fused import divergence_loss, softmax, through_softmax
from shoestring.losses._targets import Buffers
from shoestring.losses._tokens import Tokens


def form(z_nV: Tensor, t_nW: Tensor, buffers: Buffers) -> Tensor:
    """Values [n]; the gradient takes the place of z. `t_nW` may have another width."""
    p_nW, _ = softmax(t_nW, buffers.get("p", t_nW))
    q_nV, _ = softmax(z_nV, buffers.get("q", z_nV))
    few = min(z_nV.shape[1], t_nW.shape[1])
    p_nW = p_nW.sort(dim=1, descending=True).values
    sorted_nV, ids_nV = q_nV.sort(dim=1, descending=True)
    beyond_n = p_nW[:, few:].sum(1)
    gap_nV = sorted_nV
    gap_nV[:, :few] -= p_nW[:, :few]
    value_n = torch.linalg.vector_norm(gap_nV, ord=1, dim=1) + beyond_n
    g_nV = z_nV.scatter_(1, ids_nV, gap_nV.sign_()).clone()
    through_softmax(q_nV, g_nV, out=z_nV)
    return value_n


def plain(logp_NW: Tensor, logq_NV: Tensor) -> Tensor:
    """The plain twin of the values."""
    p_NW, q_NV = (x.exp().sort(dim=-1, descending=True).values for x in (logp_NW, logq_NV))
    width = max(p_NW.shape[1], q_NV.shape[1])
    p_NW, q_NV = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (p_NW, q_NV))
    return (q_NV - p_NW).abs().sum(-1)


def loss(
    hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens; the metric "divergence" is the same sum. `how`: see `_fused.divergence_loss`."""
    return divergence_loss(hidden_ND, weight_VD, tokens, form, **how)
