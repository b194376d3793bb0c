"""Exact attention in blocks of query rows, forward and backward, out of batched products and fused softmax rows.

Why not torch's fused kernel: on a CPU its backward is the largest cost of a training step (LOG.md). Here a block of
rows meets only the keys it may see, and each step is one call that runs near the machine's matrix speed:

    S = Q_i Kᵀ · scale + mask;  P = softmax(S);  O_i = P V
    dP = dO_i Vᵀ;  dS = P ∘ (dP - rowsum(dP ∘ P));  dQ_i = dS K · scale;  dK += dSᵀ Q_i · scale;  dV += Pᵀ dO_i

P is kept for the backward while sequences are short, and computed again when they are long: memory is O(T) a token
up to `KEEP` and O(1) beyond. In bf16 the scores are rounded before the softmax; sums over blocks are kept in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 128  # query rows in a block: keys a block meets in vain are ROWS/2 of T/2 on average
SCORES = 1 << 21  # scores in a block: 4 MB in bf16; smaller blocks pay more for calls than they save in cache (LOG.md)
KEEP = 512  # the longest sequence whose probabilities are kept


class _Blocks:
    """The blocks of X = B·H heads over T rows: a range of heads, a range of rows, and room for their probabilities."""

    def __init__(self, like: Tensor, H: int, bias_B1TT: Tensor | None, *, keep: bool):
        self.X, self.T = like.shape[:2]
        self.H, self.bias, self.keep = H, bias_B1TT, keep
        self.rows = self.T if self.T <= 3 * ROWS // 2 else ROWS
        heads = max(1, SCORES // (self.rows * self.T))
        heads = heads if bias_B1TT is None else max(H, heads // H * H)  # a mask belongs to whole sequences
        self.heads = min(heads, self.X)
        self.above = torch.full((self.rows, self.rows), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
        self.largest = self.heads * self.rows * self.T
        sizes = [(t.stop - t.start) * s.stop for t, s in self._row_blocks()]
        self.memory = like.new_empty(self.X * sum(sizes) if keep else self.largest)

    def _row_blocks(self) -> list[tuple[slice, slice]]:
        """Rows, and the keys they may see."""
        starts = range(0, self.T, self.rows)
        return [(slice(t, min(t + self.rows, self.T)), slice(0, min(t + self.rows, self.T))) for t in starts]

    def __iter__(self) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Heads, rows, keys, and the place of P [heads, rows, keys]: its own if kept, else the same one each time."""
        row_blocks, used = self._row_blocks(), 0
        for start in range(0, self.X, self.heads):
            x = slice(start, min(start + self.heads, self.X))
            for t, s in row_blocks:
                shape = (x.stop - x.start, t.stop - t.start, s.stop)
                size = shape[0] * shape[1] * shape[2]
                yield x, t, s, self.memory[used : used + size].view(shape)
                used += size if self.keep else 0

    def fill(self, p: Tensor, q: Tensor, k: Tensor, scale: float, x: slice, t: slice, s: slice) -> None:
        """The probabilities of one block, written to p."""
        torch.baddbmm(q.new_empty(1, 1, 1), q[x, t], k[x, s].transpose(1, 2), beta=0, alpha=scale, out=p)
        if self.bias is not None:
            b = slice(x.start // self.H, x.stop // self.H)
            p.unflatten(0, (-1, self.H)).add_(self.bias[b, :, t, s])
        else:
            n = t.stop - t.start
            p[:, :, t].add_(self.above[:n, :n])
        torch.softmax(p, dim=-1, out=p)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, H: int, bias: Tensor | None) -> Tensor:
        blocks = _Blocks(q, H, bias, keep=q.shape[1] <= KEEP and any(ctx.needs_input_grad))
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        for x, t, s, p in blocks:
            blocks.fill(p, q, k, scale, x, t, s)
            torch.bmm(p, v[x, s], out=out[x, t])
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), blocks, scale = ctx.saved_tensors, ctx.blocks, ctx.scale
        accurate = torch.promote_types(q.dtype, torch.float32)
        dout, dq = dout.contiguous(), torch.empty_like(q)
        dk, dv = (torch.zeros_like(y, dtype=accurate) for y in (k, v))
        nothing, scratch = q.new_empty(1, 1, 1), q.new_empty(blocks.largest)
        for x, t, s, p in blocks:
            if not blocks.keep:
                blocks.fill(p, q, k, scale, x, t, s)
            dp = scratch[: p.numel()].view(p.shape)
            dv[x, s].add_(torch.bmm(p.transpose(1, 2), dout[x, t]))
            torch.bmm(dout[x, t], v[x, s].transpose(1, 2), out=dp)
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            torch.baddbmm(nothing, ds, k[x, s], beta=0, alpha=scale, out=dq[x, t])
            dk[x, s].add_(torch.baddbmm(nothing, ds.transpose(1, 2), q[x, t], beta=0, alpha=scale))
        ctx.blocks = None  # a second backward would need its memory; none is supported
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def attend_blocks(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTW: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Causal attention [B, H, T, W] over as many keys as queries; `bias` [B, 1, T, T] replaces the causal mask."""
    H = q_BHTK.shape[1]
    q, k, v = (y.flatten(0, 1) for y in (q_BHTK, k_BHTK, v_BHTW))
    out: Tensor = _BlockAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale, H, bias)
    return out.unflatten(0, (-1, H))
