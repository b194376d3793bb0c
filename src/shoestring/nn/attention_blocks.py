"""Exact attention in blocks of query rows, forward and backward, out of batched products and fused softmax rows.

Why not torch's fused kernel: on a CPU its backward is the largest cost of a training step (LOG.md). Here a block of
rows meets only the keys it may see, scores exist for one block at a time and are computed again in the backward, so
memory is O(block · T), and each step is one call that runs at the machine's matrix speed:

    S = Q_i Kᵀ · scale + mask;  P = softmax(S);  O_i = P V
    dP = dO_i Vᵀ;  dS = P ∘ (dP - rowsum(dP ∘ P));  dQ_i = dS K · scale;  dK += dSᵀ Q_i · scale;  dV += Pᵀ dO_i

In bf16 the scores are rounded to bf16 before the softmax; sums over blocks are kept in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 128  # query rows in a block: keys a block meets in vain are ROWS/2 of T/2 on average
SCORES = 1 << 19  # scores alive at a time: 1 MB in bf16, about a core's second-level cache


class _Blocks:
    """The blocks of X = B·H heads over T rows: a range of heads, a range of rows, and the mask between."""

    def __init__(self, X: int, H: int, T: int, bias_B1TT: Tensor | None, like: Tensor):
        self.X, self.H, self.T, self.bias = X, H, T, bias_B1TT
        self.rows = T if T <= 3 * ROWS // 2 else ROWS
        heads = max(1, SCORES // (self.rows * T))
        self.heads = heads if bias_B1TT is None else max(H, heads // H * H)  # a mask belongs to whole sequences
        self.above = torch.full((self.rows, self.rows), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)

    def __iter__(self) -> Iterator[tuple[slice, slice, slice]]:
        """Heads, rows and the keys those rows may see."""
        for x in range(0, self.X, self.heads):
            for t in range(0, self.T, self.rows):
                end = min(t + self.rows, self.T)
                yield slice(x, min(x + self.heads, self.X)), slice(t, end), slice(0, end)

    def probabilities(self, q: Tensor, k: Tensor, scale: float, x: slice, t: slice, s: slice) -> Tensor:
        """P of one block."""
        score = torch.baddbmm(q.new_empty(1, 1, 1), q[x, t], k[x, s].transpose(1, 2), beta=0, alpha=scale)
        if self.bias is not None:
            b = slice(x.start // self.H, x.stop // self.H)
            score.unflatten(0, (-1, self.H)).add_(self.bias[b, :, t, s])
        else:
            n = t.stop - t.start
            score[:, :, t].add_(self.above[:n, :n])
        return torch.softmax(score, dim=-1)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, H: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale, ctx.H = scale, H
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        blocks = _Blocks(len(q), H, q.shape[1], bias, q)
        for x, t, s in blocks:
            torch.bmm(blocks.probabilities(q, k, scale, x, t, s), v[x, s], out=out[x, t])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        scale, accurate = ctx.scale, torch.promote_types(q.dtype, torch.float32)
        dout = dout.contiguous()
        dq = torch.empty_like(q)
        blocks = _Blocks(len(q), ctx.H, q.shape[1], bias, q)
        dk, dv = (torch.zeros_like(y, dtype=accurate) for y in (k, v))
        nothing = q.new_empty(1, 1, 1)
        for x, t, s in blocks:
            p = blocks.probabilities(q, k, scale, x, t, s)
            dv[x, s] += torch.bmm(p.transpose(1, 2), dout[x, t])
            dp = torch.bmm(dout[x, t], v[x, s].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[x, t] = torch.baddbmm(nothing, ds, k[x, s], beta=0, alpha=scale)
            dk[x, s] += torch.baddbmm(nothing, ds.transpose(1, 2), q[x, t], beta=0, alpha=scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def attend_blocks(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTW: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Causal attention [B, H, T, W] over as many keys as queries; `bias` [B, 1, T, T] replaces the causal mask."""
    H = q_BHTK.shape[1]
    q, k, v = (y.flatten(0, 1) for y in (q_BHTK, k_BHTK, v_BHTW))
    out: Tensor = _BlockAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale, H, bias)
    return out.unflatten(0, (-1, H))
