"""Grouped-query attention as in Llama, Qwen2 (q/k/v biases) and Qwen3 (RMSNorm on each head's q and k)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoestring.nn.attention import Pass
from shoestring.nn.linear import Linear, together
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import rotate


class GQA(nn.Module):
    """q, k, v = W h (+ b); norm on q and k when the family has it; RoPE (half-split); causal softmax; W_o."""

    def __init__(
        self, d_model: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool = False, o_bias: bool = False,
        qk_norm_eps: float | None = None, device: torch.device | None = None,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = Linear(d_model, heads * head_dim, bias=qkv_bias, device=device)
        self.k_proj = Linear(d_model, kv_heads * head_dim, bias=qkv_bias, device=device)
        self.v_proj = Linear(d_model, kv_heads * head_dim, bias=qkv_bias, device=device)
        self.o_proj = Linear(heads * head_dim, d_model, bias=o_bias, device=device)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps, device=device)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps, device=device)

    def forward(self, x_BTD: Tensor, step: Pass, layer: int) -> Tensor:
        native = step.kernels.native
        qkv = together(x_BTD, (self.q_proj, self.k_proj, self.v_proj), native).unflatten(-1, (-1, self.head_dim))
        q_BTHK, k_BTGK, v_BTGK = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK, native), self.k_norm(k_BTGK, native)
        q_BTHK = rotate(q_BTHK, step.cis, interleaved=False, native=native)
        k_BTGK = rotate(k_BTGK, step.cis, interleaved=False, native=native)
        if step.cache is not None:
            step.cache.write(layer, step.positions_BT, torch.cat([k_BTGK, v_BTGK], dim=2).flatten(2))
        if step.n_keys:
            assert step.cache is not None
            kv = step.cache.read(layer, step.n_keys).unflatten(-1, (2 * self.kv_heads, self.head_dim))
            k_BTGK, v_BTGK = kv.chunk(2, dim=2)
        q, k, v = (y.transpose(1, 2) for y in (q_BTHK, k_BTGK, v_BTGK))
        out = step.attend(q, k, v, self.head_dim**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2), native)
