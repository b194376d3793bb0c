"""Both KLs against a large vocabulary, some of its tokens at a time (nn/slices.py); csrc/divergence.c reads them.

For each chunk of tokens the vocabulary passes twice: sums of every row over student and teacher, then the slopes

    dz = q (z - t - Σ q (z - t))  (reverse)    dz = q - p  (forward);    dh = w/τ · dz U,   dU += dzᵀ (w/τ · h)

Logits that are kept are the teacher's first, which is wider as a rule. The twin is the chunk loop of `_fused.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoestring.losses._teacher import Hidden
from shoestring.nn import elements
from shoestring.nn.head_rows import accurate, add_outer
from shoestring.nn.room import Room
from shoestring.nn.slices import Memory, Side, add_back, cuts, parts

UNREAD = (-math.inf, -math.inf, 0.0, 0.0, 0.0)  # the struct Row of csrc/divergence.c


def sliced_kl(
    hidden_ND: Tensor, table_VD: Tensor, weight_N: Tensor, targets: Hidden, reverse: bool, temperature: float,
    grad_ND: Tensor | None, grad_VD: Tensor | None, room: Room | None,
) -> Tensor:  # fmt: skip
    """The values [N]; the gradients of Σ weight · value are written. `table_VD` and `grad_VD`: rows that are tokens."""
    vocab, told = len(table_VD), int(reverse)
    table_VD = table_VD.contiguous()
    scale_N1 = (weight_N.to(accurate(hidden_ND.dtype)) / temperature)[:, None]
    value_N = torch.empty(len(hidden_ND))
    memory = Memory(hidden_ND, table_VD, 2, grad_VD, room)
    head_VC = targets.head_VC[:vocab].contiguous()
    for rows in parts(len(hidden_ND)):
        hidden_nD, hidden_nC = (
            (x_ND[rows] if temperature == 1 else x_ND[rows] / temperature).contiguous()
            for x_ND in (hidden_ND, targets.hidden_NC)
        )
        teacher, student = Side(hidden_nC, head_VC, memory, rows), Side(hidden_nD, table_VD, memory, rows, 1)
        n = len(hidden_nD)
        row_n5 = torch.tensor(UNREAD, dtype=torch.float64).repeat(n, 1)
        for i, cut in enumerate(cuts(vocab)):
            z_nv, t_nv = student.logits(i, cut), teacher.logits(i, cut)
            elements.call("kl_read", z_nv.dtype, z_nv, t_nv, n, z_nv.shape[1], told, row_n5)
        elements.call("kl_value", None, row_n5, n, told, value_N[rows])
        scaled_nD = (hidden_ND[rows] * scale_N1[rows]).to(hidden_ND.dtype)
        back_nD = torch.zeros(hidden_nD.shape, dtype=accurate(hidden_nD.dtype))
        for i, cut in enumerate(cuts(vocab)) if grad_ND is not None or grad_VD is not None else ():
            z_nv, t_nv = student.logits(i, cut, again=True), teacher.logits(i, cut, again=True)
            elements.call("kl_slope", z_nv.dtype, z_nv, t_nv, n, z_nv.shape[1], told, row_n5)
            if grad_ND is not None:
                add_back(z_nv, table_VD[cut], back_nD)
            if grad_VD is not None:
                add_outer(grad_VD[cut], z_nv, scaled_nD, first=rows.start == 0, native=True)
        if grad_ND is not None:
            grad_ND[rows] = back_nD.mul_(scale_N1[rows])
    return value_N
