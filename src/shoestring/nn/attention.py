"""Softmax attention over heads, and who may see whom.

`attend` takes queries [B, T, H, K], keys [B, S, G, K] and values [B, S, G, W] (H a multiple of G, W any width).
`mask` is None for plain causal attention, else bool [B, 1, T, S], True where a query sees a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.nn.cache import Cache
from shoestring.nn.kernels import Kernels


def causal_mask(positions_BT: Tensor, n_keys: int) -> Tensor:
    """With a cache: key index == position, so a query sees the keys whose index is at most its position."""
    return (torch.arange(n_keys, device=positions_BT.device) <= positions_BT[..., None]).unsqueeze(1)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Causal, and only inside runs of equal segment ids."""
    T = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()).unsqueeze(1)


def attend_plain(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGW: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The readable twin: scores and softmax in fp32, all of them in memory."""
    T, H = q_BTHK.shape[1:3]
    group = H // k_BSGK.shape[2]
    k_BSHK, v_BSHW = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k_BSGK, v_BSGW))
    if mask is None:
        mask = torch.ones(T, k_BSHK.shape[1], dtype=torch.bool, device=q_BTHK.device).tril()
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).float() * scale
    weight_BHTS = score_BHTS.masked_fill(~mask, float("-inf")).softmax(-1).to(v_BSHW.dtype)
    return torch.einsum("bhts,bshw->bthw", weight_BHTS, v_BSHW)


def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGW: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Fused attention. The CPU kernel wants values as wide as keys: they are padded with zeros and cut again."""
    K, W = k_BSGK.shape[-1], v_BSGW.shape[-1]
    if W < K:
        v_BSGW = F.pad(v_BSGW, (0, K - W))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGW))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[..., :W]


@dataclass(slots=True)
class Pass:
    """What all layers of one forward pass share. Keys come from the cache when `n_keys` > 0, else from x alone."""

    cos: Tensor  # [(B,) T, R/2]
    sin: Tensor
    mask: Tensor | None  # None: causal
    kernels: Kernels
    cache: Cache | None = None
    positions_BT: Tensor | None = None  # where to write in the cache; None: the next positions
    n_keys: int = 0

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGW: Tensor, scale: float) -> Tensor:
        chosen = attend_plain if self.kernels.attention == "plain" else attend
        return chosen(q_BTHK, k_BSGK, v_BSGW, scale, self.mask)
