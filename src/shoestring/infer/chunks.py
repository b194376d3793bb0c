"""Attention of a chunk of a prompt: new tokens against the sequence's history and each other.

Without a history the chunk is expanded (keys and values of every head written out). With one, expanding costs
d_c (d_n + d_v) products for every old position, and absorbing costs 2 d_c - d_n - d_v more for every pair of a query
and a key; the cheaper one is taken: for V3 and long histories the border is at 171 new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.infer.store import Store
from shoestring.nn.attention import attend_fused
from shoestring.nn.attention_blocks import attend_blocks

SCORES = 1 << 22  # scores of an absorbed chunk alive at a time
Parts = tuple[Tensor, ...]  # of a head, [N, heads, *] each


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence; `rows` are theirs among the step's chunk tokens."""

    rows: slice
    start: int
    blocks: Tensor  # the sequence's block table

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def history(self, store: Store, arena: Tensor, new_TGW: Tensor) -> Tensor:
        """Everything the chunk may see, itself included: [G, start + count, width]."""
        if self.start == 0:
            return new_TGW.transpose(0, 1)
        return store.read(arena, self.blocks, self.start + self.count)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """-inf above the diagonal that begins at `start`: [count, start + count]."""
        shape, device = (self.count, self.start + self.count), self.blocks.device
        return torch.full(shape, float("-inf"), dtype=dtype, device=device).triu_(self.start + 1)


def expands(chunk: Chunk, cost: int, saved: int) -> bool:
    """Whether expanding is cheaper: `cost` per old position, `saved` per pair of query and key."""
    pairs = chunk.count * chunk.start + chunk.count * (chunk.count + 1) // 2
    return pairs * saved >= chunk.start * cost


def attend_expanded(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """[T, H, V]: causal, keys and values with G heads."""
    q, k, v = (y.transpose(0, 1).unsqueeze(0) for y in (q_THK, k_SGK, v_SGV))
    bias = None if chunk.start == 0 else chunk.bias(q.dtype)[None, None]
    return attend_fused(q, k, v, scale, bias)[0].transpose(0, 1)


def attend_absorbed(q_THW: Tensor, latent_SW: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """[T, H, W] in the latent space: all heads share the keys, so they are rows of one product."""
    T, H, W = q_THW.shape
    bias_TS = chunk.bias(torch.float32)
    rows = max(1, SCORES // (H * len(latent_SW)))
    out = []
    for start in range(0, T, rows):
        q_XW = q_THW[start : start + rows].reshape(-1, W)
        s_tHS = (q_XW @ latent_SW.t()).view(-1, H, len(latent_SW))
        p_tHS = torch.add(bias_TS[start : start + rows, None], s_tHS, alpha=scale).softmax(-1).to(q_THW.dtype)
        out.append((p_tHS.view(-1, len(latent_SW)) @ latent_SW).view(-1, H, W))
    return out[0] if len(out) == 1 else torch.cat(out)


def together(chunks: list[Chunk]) -> tuple[list[list[Chunk]], list[Chunk]]:
    """Chunks without a history in groups of like length, and the others."""
    fresh = sorted((chunk for chunk in chunks if chunk.start == 0), key=lambda chunk: -chunk.count)
    groups: list[list[Chunk]] = []
    for chunk in fresh:
        if not groups or chunk.count < groups[-1][0].count / 2:
            groups.append([])
        groups[-1].append(chunk)
    return groups, [chunk for chunk in chunks if chunk.start > 0]


def attend_fresh(q: Parts, k: Parts, v: Parts, groups: list[list[Chunk]], scale: float, out_NHV: Tensor) -> None:
    """Causal attention of chunks without a history, each group as one batch padded at the end, into `out_NHV`.

    A head of queries, keys or values is its parts side by side: each goes once to where attention reads it.
    """
    for group in groups:
        T = group[0].count
        on_cpu = q[0].device.type == "cpu"  # whose attention wants as many heads of keys as of queries
        wide_q, wide_k, wide_v = (_padded(group, y, (q if on_cpu else y)[0].shape[1], T) for y in (q, k, v))
        o_BHTV = (attend_blocks if on_cpu else attend_fused)(wide_q, wide_k, wide_v, scale, None)
        for row, chunk in enumerate(group):
            out_NHV[chunk.rows] = o_BHTV[row, :, : chunk.count].transpose(0, 1)


def _padded(group: list[Chunk], parts: Parts, heads: int, T: int) -> Tensor:
    """[B, heads, T, *]: zeros behind the end of a chunk, a part with fewer heads repeated."""
    even = all(chunk.count == T for chunk in group)
    size = (len(group), heads, T, sum(part.shape[-1] for part in parts))
    made = parts[0].new_empty(size) if even else parts[0].new_zeros(size)
    at = 0
    for part_NGX in parts:
        G, end = part_NGX.shape[1], at + part_NGX.shape[-1]
        place = made[..., at:end].unflatten(1, (G, -1))
        for row, chunk in enumerate(group):
            place[row, :, :, : chunk.count] = part_NGX[chunk.rows].transpose(0, 1).unsqueeze(1)
        at = end
    return made
