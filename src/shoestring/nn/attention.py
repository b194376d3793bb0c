"""Softmax attention over heads, and who may see whom.

`attend` takes queries [B, H, T, K], keys [B, G, S, K] and values [B, G, S, W] (H a multiple of G, W any width) and
returns [B, H, T, W]. `bias` is None for plain causal attention over S = T keys, else [B, 1, T, S]: 0 where a query
sees a key, -inf where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.data.batch import BRANCH
from shoestring.nn.attention_blocks import attend_blocks
from shoestring.nn.attention_native import attend_native
from shoestring.nn.cache import Cache
from shoestring.nn.kernels import Kernels


def _as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)


def cache_bias(positions_BT: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
    """With a cache: key index == position, so a query sees the keys whose index is at most its position."""
    return _as_bias(torch.arange(n_keys, device=positions_BT.device) <= positions_BT[..., None], dtype)


def segment_bias(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal, and only inside runs of equal segment ids; a branch (data/batch.py) sees its stem too."""
    T, keys_B1T = segments_BT.shape[1], segments_BT[:, None, :]
    same_BTT = segments_BT[:, :, None] == keys_B1T
    if bool((segments_BT >= BRANCH).any()):
        same_BTT |= (segments_BT % BRANCH)[:, :, None] == keys_B1T
    return _as_bias(same_BTT & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril(), dtype)


def _shared_keys(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSW: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for the query heads that share them."""
    group = q_BHTK.shape[1] // k_BGSK.shape[1]
    return (k_BGSK, v_BGSW) if group == 1 else (k_BGSK.repeat_interleave(group, 1), v_BGSW.repeat_interleave(group, 1))


def attend_plain(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSW: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The readable twin: scores and softmax in fp32, all of them in memory."""
    k_BHSK, v_BHSW = _shared_keys(q_BHTK, k_BGSK, v_BGSW)
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    score_BHTS = (q_BHTK @ k_BHSK.transpose(2, 3)).to(torch.promote_types(q_BHTK.dtype, torch.float32)) * scale
    above_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).triu(1)
    score_BHTS = score_BHTS.masked_fill(above_TS, float("-inf")) if bias is None else score_BHTS + bias
    return score_BHTS.softmax(-1).to(v_BHSW.dtype) @ v_BHSW


def attend_fused(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSW: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Torch's kernel. On a CPU it wants values as wide as keys: they are padded with zeros and cut again."""
    K, W = k_BGSK.shape[-1], v_BGSW.shape[-1]
    if W < K:
        v_BGSW = F.pad(v_BGSW, (0, K - W))
    shared = q_BHTK.shape[1] != k_BGSK.shape[1]
    out = F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSW, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=shared
    )
    return out[..., :W]


@dataclass(slots=True)
class Pass:
    """What all layers of one forward pass share. Keys come from the cache when `n_keys` > 0, else from x alone."""

    cis: Tensor  # RoPE's table [(B,) T, 1, R/2]
    bias: Tensor | None  # None: causal, or as `seen` says
    kernels: Kernels
    cache: Cache | None = None
    positions_BT: Tensor | None = None  # where to write in the cache; None: the next positions
    n_keys: int = 0
    seen: Tensor | None = None  # instead of the bias, where attention is native

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSW: Tensor, scale: float) -> Tensor:
        if self.kernels.attention == "plain":
            return attend_plain(q_BHTK, k_BGSK, v_BGSW, scale, self.bias)
        if self.kernels.attention == "native" and not self.n_keys:
            assert self.bias is None
            return attend_native(q_BHTK, k_BGSK, v_BGSW, scale, self.seen)
        if self.kernels.attention == "blocks" and not self.n_keys:
            return attend_blocks(q_BHTK, *_shared_keys(q_BHTK, k_BGSK, v_BGSW), scale, self.bias)
        return attend_fused(q_BHTK, k_BGSK, v_BGSW, scale, self.bias)
