"""One new token per row against its blocks, where they lie: no row's keys are copied together.

Each (block, row) pair is one small product: q of the row times the block's keys. A block that several rows share
(the prompt of a group) is multiplied by all their queries at once. The scores, which are small, are put in the order
of each row's positions, go through one softmax, and come back to the blocks for the second product:

    s_b = q_r(b) K_bᵀ        p = softmax over the blocks of r        o_r = Σ_b p_b V_b

If the blocks in use lie close together they are a slice of the arena; else they are gathered, as the plain twin does.
`Plan` holds the indices; it changes only when a row comes, goes or begins a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DENSE = 0.75  # share of useful blocks in a slice of the arena from which on the slice is taken: gathering costs a third


@dataclass(slots=True)
class Part:
    """n blocks with O owners each: `where` in the arena, and for each of the n·O pairs its row and its place.

    Pairs that are there only to fill up point to row R and to place R·J, which are thrown away.
    """

    where: slice | Tensor
    row_P: Tensor
    place_P: Tensor
    n: int
    owners: int

    def of(self, arena: Tensor) -> Tensor:
        return arena[self.where] if isinstance(self.where, slice) else arena.index_select(0, self.where)


@dataclass(slots=True)
class Plan:
    """Which blocks meet which rows: R rows of at most J blocks."""

    parts: list[Part]
    R: int
    J: int
    simple: bool  # every row has one block of its own, in the order of the rows

    def bias(self, length_R: Tensor, size: int) -> Tensor:
        """0 where a row has a key, -inf beyond its length: fp32 [R, 1, J·size]."""
        position_S = torch.arange(self.J * size, device=length_R.device)
        bias_RS = torch.zeros(self.R, self.J * size, device=length_R.device)
        return bias_RS.masked_fill_(position_S >= length_R[:, None], float("-inf")).unsqueeze(1)


def make_plan(tables: list[list[int]], device: torch.device) -> Plan:
    """From the rows' block tables."""
    R, J = len(tables), max(map(len, tables))
    counts_R = np.fromiter(map(len, tables), dtype=np.int64, count=R)
    block_P = np.concatenate([np.asarray(table, dtype=np.int64) for table in tables])
    row_P = np.repeat(np.arange(R), counts_R)
    place_P = row_P * J + (np.arange(len(block_P)) - np.repeat(counts_R.cumsum() - counts_R, counts_R))
    order_P = np.argsort(block_P, kind="stable")
    block_P, row_P, place_P = block_P[order_P], row_P[order_P], place_P[order_P]
    found_U, owners_U = np.unique(block_P, return_counts=True)
    shared_P = np.repeat(owners_U > 1, owners_U)
    parts = []
    if not shared_P.all():
        parts.append(_alone(block_P[~shared_P], row_P[~shared_P], place_P[~shared_P], R, J, device))
    if shared_P.any():
        wide_U = owners_U > 1
        parts.append(
            _shared(found_U[wide_U], owners_U[wide_U], row_P[shared_P], place_P[shared_P], R, J, device)
        )  # fmt: skip
    simple = J == 1 and len(parts) == 1 and parts[0].n == R and bool((row_P == np.arange(R)).all())
    return Plan(parts, R, J, simple)


def _alone(block_P: np.ndarray, row_P: np.ndarray, place_P: np.ndarray, R: int, J: int, device: torch.device) -> Part:
    low, span = int(block_P[0]), int(block_P[-1] - block_P[0]) + 1
    if len(block_P) < DENSE * span:
        return Part(_to(block_P, device), _to(row_P, device), _to(place_P, device), len(block_P), 1)
    rows, places = np.full(span, R), np.full(span, R * J)
    rows[block_P - low], places[block_P - low] = row_P, place_P
    return Part(slice(low, low + span), _to(rows, device), _to(places, device), span, 1)


def _shared(
    block_U: np.ndarray, owners_U: np.ndarray, row_P: np.ndarray, place_P: np.ndarray, R: int, J: int,
    device: torch.device,
) -> Part:  # fmt: skip
    """Blocks with their owners in a rectangle, filled up to the most owners."""
    U, most = len(block_U), int(owners_U.max())
    rows, places = np.full((U, most), R), np.full((U, most), R * J)
    inside = np.arange(most) < owners_U[:, None]
    rows[inside], places[inside] = row_P, place_P
    low, span = int(block_U[0]), int(block_U[-1] - block_U[0]) + 1
    where = slice(low, low + span) if span == U else _to(block_U, device)
    return Part(where, _to(rows.ravel(), device), _to(places.ravel(), device), U, most)


def _to(indices: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(indices).to(device)


def attend_blocks(q_RHK: Tensor, keys: Tensor, values: Tensor, plan: Plan, bias_R1S: Tensor, scale: float) -> Tensor:
    """[R, H, V] for queries [R, H, K]; `keys`, `values` are a layer's arenas [blocks, G, size, *]."""
    R, H, _ = q_RHK.shape
    size = keys.shape[2]
    if plan.simple:
        (part,) = plan.parts
        keys_RGSK = part.of(keys)
        s_RHS = _scores(q_RHK, keys_RGSK, 1)
        p_RHS = torch.add(bias_R1S, s_RHS, alpha=scale).softmax(-1).to(q_RHK.dtype)
        return _values(p_RHS, keys_RGSK if values is keys else part.of(values), 1)
    J = plan.J
    q_XHK = torch.cat([q_RHK, q_RHK[:1]])  # row R: what fills up; its results are thrown away
    s_XHS = q_RHK.new_empty(R * J + 1, H, size).fill_(float("-inf")) if J > 1 else q_RHK.new_empty(R + 1, H, size)
    read = [part.of(keys) for part in plan.parts]
    for part, keys_nGSK in zip(plan.parts, read, strict=True):
        s_XHS.index_copy_(0, part.place_P, _scores(q_XHK.index_select(0, part.row_P), keys_nGSK, part.owners))
    s_RHS = s_XHS[: R * J].view(R, J, H, size).transpose(1, 2).reshape(R, H, J * size)
    p_RHS = torch.add(bias_R1S, s_RHS, alpha=scale).softmax(-1).to(q_RHK.dtype)
    s_XHS[: R * J].view(R, J, H, size).copy_(p_RHS.view(R, H, J, size).transpose(1, 2))
    s_XHS[R * J] = 0
    out_XHV = q_RHK.new_zeros(R + 1, H, values.shape[-1])
    if values is not keys:
        read = [part.of(values) for part in plan.parts]
    for part, values_nGSV in zip(plan.parts, read, strict=True):
        p_PHS = s_XHS.index_select(0, part.place_P)
        out_XHV.index_add_(0, part.row_P, _values(p_PHS, values_nGSV, part.owners))
    return out_XHV[:R]


def _scores(q_PHK: Tensor, keys_nGSK: Tensor, owners: int) -> Tensor:
    """Query of each pair times its block's keys: [P, H, S] for P = n · owners pairs."""
    n, G, S, K = keys_nGSK.shape
    H = q_PHK.shape[1]
    q = q_PHK.view(n, owners, G, H // G, K).transpose(1, 2).reshape(n * G, owners * (H // G), K)
    s = torch.bmm(q, keys_nGSK.flatten(0, 1).transpose(1, 2))
    return s.view(n, G, owners, H // G, S).transpose(1, 2).reshape(n * owners, H, S)


def _values(p_PHS: Tensor, values_nGSV: Tensor, owners: int) -> Tensor:
    n, G, S, V = values_nGSV.shape
    H = p_PHS.shape[1]
    p = p_PHS.view(n, owners, G, H // G, S).transpose(1, 2).reshape(n * G, owners * (H // G), S)
    o = torch.bmm(p, values_nGSV.flatten(0, 1))
    return o.view(n, G, owners, H // G, V).transpose(1, 2).reshape(n * owners, H, V)


def attend_gathered(
    q_RHK: Tensor, keys: Tensor, values: Tensor, tables: list[list[int]], length_R: Tensor, scale: float
) -> Tensor:
    """The plain twin: each row's keys copied together, one row after the other, softmax in fp32."""
    rows = []
    for q_HK, table, length in zip(q_RHK, tables, length_R.tolist(), strict=True):
        G = keys.shape[1]
        k_GSK = keys[table].transpose(0, 1).flatten(1, 2)[:, :length]
        v_GSV = values[table].transpose(0, 1).flatten(1, 2)[:, :length]
        s_GhS = (q_HK.unflatten(0, (G, -1)) @ k_GSK.transpose(1, 2)).float() * scale
        rows.append((s_GhS.softmax(-1).to(v_GSV.dtype) @ v_GSV).flatten(0, 1))
    return torch.stack(rows)


PAIRS = 16  # (block, row) pairs in one product when results must not depend on the batch


class FixedPlan:
    """Attention whose every product and sum has the same shape whoever else is in the batch: slow, to the bit equal.

    Pairs are multiplied PAIRS at a time, block by block in the order of positions; sums over blocks go from the first
    to the last, and adding the zeros of blocks that a row does not have changes no bit.
    """

    def __init__(self, tables: list[list[int]], length_R: Tensor, size: int, device: torch.device):
        self.R, self.J, self.size, self.length_R = len(tables), max(map(len, tables)), size, length_R
        pairs = [(j, row, block) for row, table in enumerate(tables) for j, block in enumerate(table)]
        pairs.sort()
        pairs += [(0, self.R, pairs[0][2])] * (-len(pairs) % PAIRS)  # row R: what fills up
        self.tiles = [torch.tensor(pairs[i : i + PAIRS], device=device).unbind(1) for i in range(0, len(pairs), PAIRS)]

    def attend(self, q_RHK: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """As `attend_blocks`."""
        R, J, H, size = self.R, self.J, q_RHK.shape[1], self.size
        q_XHK = torch.cat([q_RHK, q_RHK[:1]])
        s_XJHS = torch.full((R + 1, J, H, size), float("-inf"), device=q_RHK.device)
        for j_P, row_P, block_P in self.tiles:
            s_XJHS[row_P, j_P] = _scores(q_XHK[row_P], keys[block_P], 1).float() * scale
        position_JS = torch.arange(J * size, device=q_RHK.device).view(J, 1, size)
        s_RJHS = s_XJHS[:R].masked_fill(position_JS >= self.length_R[:, None, None, None], float("-inf"))
        e_RJHS = (s_RJHS - s_RJHS.amax((1, 3), keepdim=True)).exp()
        mass_RJH = e_RJHS.sum(-1)
        total_RH = mass_RJH[:, 0].clone()
        for j in range(1, J):
            total_RH += mass_RJH[:, j]
        p_RJHS = (e_RJHS / total_RH[:, None, :, None]).to(q_RHK.dtype)
        p_XJHS = torch.cat([p_RJHS, p_RJHS.new_zeros(1, J, H, size)])
        out_XHV = torch.zeros(R + 1, H, values.shape[-1], device=q_RHK.device)
        for j_P, row_P, block_P in self.tiles:
            o_PHV = _values(p_XJHS[row_P, j_P], values[block_P], 1).float()
            for row, o_HV in zip(row_P.tolist(), o_PHV, strict=True):  # a tile may hold two blocks of one row
                out_XHV[row] += o_HV
        return out_XHV[:R].to(q_RHK.dtype)
