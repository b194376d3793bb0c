"""One multi-token-prediction module (V3 section 2.2), wired as the released weights are.

    h'_i = W_eh [RMSNorm_e(Emb(t_{i+1})) ; RMSNorm_h(h_i)]   the embedding FIRST (eq. 21 prints the other order)
    h¹   = Block(h')                                         a full block, positions 1..T-1
    P    = head(RMSNorm_s(h¹)) predicts t_{i+2}              its own norm; the head is the main model's

h_i is the main model's hidden state after its final norm (the paper is silent; every implementation does so).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoestring.nn.linear import Linear
from shoestring.nn.norm import RMSNorm


class SharedHead(nn.Module):
    """Only the norm: embedding and output head are the main model's own tensors."""

    def __init__(self, d_model: int, eps: float, device: torch.device | None):
        super().__init__()
        self.norm = RMSNorm(d_model, eps, device=device)


class MTPJoin(nn.Module):
    """What stands before and after the MTP module's block."""

    def __init__(self, d_model: int, eps: float, *, device: torch.device | None = None):
        super().__init__()
        self.enorm = RMSNorm(d_model, eps, device=device)
        self.hnorm = RMSNorm(d_model, eps, device=device)
        self.eh_proj = Linear(2 * d_model, d_model, device=device)
        self.shared_head = SharedHead(d_model, eps, device)

    def join(self, next_embedding_BTD: Tensor, hidden_BTD: Tensor, native: bool = False) -> Tensor:
        normed = self.enorm(next_embedding_BTD, native), self.hnorm(hidden_BTD, native)
        return self.eh_proj(torch.cat(normed, dim=-1), native)
