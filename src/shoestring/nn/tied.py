"""A table at both ends of a model: the gradient of its lookups is added to the head's where that lies.

Autograd would make a second gradient of the table's size, nearly all zeros, and add the two: at 151,936 x 128 that is
43 ms of processor time for 384 tokens, here 0.3 (LOG.md, entry 20). The plain twin is `F.embedding` beside the table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1 << 20  # numbers in the table; below, there is nothing to gain


class _Ends(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens_BT)
        ctx.set_materialize_grads(False)
        ctx.shape = table_VD.shape
        return F.embedding(tokens_BT, table_VD), table_VD.view_as(table_VD)

    @staticmethod
    def backward(ctx: Any, rows_BTD: Tensor | None, head_VD: Tensor | None) -> tuple[Tensor | None, None]:
        if rows_BTD is None:
            return head_VD, None
        ids_N, rows_ND = ctx.saved_tensors[0].flatten(), rows_BTD.flatten(0, 1)
        grad_VD = rows_ND.new_zeros(ctx.shape) if head_VD is None else head_VD
        return grad_VD.index_add_(0, ids_N, rows_ND), None


def worth_it(table_VD: Tensor, native: bool) -> bool:
    """Whether a table's gradient will be wanted, is large, and lies on the CPU. `native`: Kernels.native."""
    wanted = torch.is_grad_enabled() and table_VD.requires_grad
    return wanted and native and table_VD.device.type == "cpu" and table_VD.numel() >= LARGE


def both_ends(table_VD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(the tokens' rows [B, T, D], the table as the head [V, D]).

    The head's gradient must be the loss's own: that of the lookups is added to it in place.
    """
    rows_BTD, head_VD = _Ends.apply(table_VD, tokens_BT)
    return rows_BTD, head_VD
