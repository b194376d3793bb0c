"""Routed experts for few rows: only the experts that were chosen are read.

`dense` runs every expert on every row as two large products, weighted by 0 where it was not chosen: for small models
that costs less than sorting. `each` sorts the (row, expert) pairs and runs one pair of products for each expert
that has rows. Both equal nn/experts.py; which one is a matter of how much `dense` would compute in vain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.infer.layers import Making, PreparedSwiGLU, silu_gate
from shoestring.nn.experts import Order, gather_sum
from shoestring.nn.moe import MoE

DENSE_FLOPS = 60e6  # `dense` below so many: about half a millisecond of a CPU core


class PreparedMoE:
    """x + Σ_k w_k E_k(h) + shared(h)."""

    def __init__(self, moe: MoE, make: Making):
        self.routing, self.bias_E = moe.gate.routing, moe.gate.e_score_correction_bias
        self.gate = Making(torch.float32, make.tile)(moe.gate.weight)
        self.shared = None if moe.shared_experts is None else PreparedSwiGLU(moe.shared_experts, make)
        gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
        self.E, self.F, self.D = down.shape[0], down.shape[2], down.shape[1]
        self.gate_up = [make(weight) for weight in gate_up.detach()]
        self.down = [make(weight) for weight in down.detach()]
        self.tile = make.tile
        self.all_gate_up = self.all_down = None
        if self._dense_flops(1) <= DENSE_FLOPS / 16 and not make.tile and not make.int8:
            self.all_gate_up = make(gate_up.flatten(0, 1))
            self.all_down = make(down.transpose(0, 1).flatten(1))

    def _dense_flops(self, rows: int) -> float:
        return 6.0 * rows * self.E * self.F * self.D

    def __call__(self, h_ND: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output and the chosen experts [N, A]."""
        logit_NE = self.gate(h_ND.float())
        score_NE = logit_NE.sigmoid() if self.routing.scoring == "sigmoid" else logit_NE.softmax(-1)
        chosen_NA = self.routing.choose(score_NE, self.bias_E)
        weight_NA = self.routing.weigh(score_NE, chosen_NA).to(h_ND.dtype)
        if self.shared is not None:
            x_ND = self.shared(h_ND, x_ND)
        if self.all_gate_up is not None and self._dense_flops(len(h_ND)) <= DENSE_FLOPS:
            return self._dense(h_ND, x_ND, chosen_NA, weight_NA), chosen_NA
        if len(h_ND) == 1 and not self.tile:
            return self._one(h_ND, x_ND, chosen_NA, weight_NA), chosen_NA
        return x_ND + self._each(h_ND, chosen_NA, weight_NA), chosen_NA

    def _dense(self, h_ND: Tensor, x_ND: Tensor, chosen_NA: Tensor, weight_NA: Tensor) -> Tensor:
        assert self.all_gate_up is not None and self.all_down is not None
        weight_NE = weight_NA.new_zeros(len(h_ND), self.E).scatter_(1, chosen_NA, weight_NA)
        a_NEF = silu_gate(self.all_gate_up(h_ND).view(-1, self.E, 2 * self.F)).mul_(weight_NE.unsqueeze(-1))
        return self.all_down(a_NEF.flatten(1), x_ND)

    def _one(self, h_1D: Tensor, x_1D: Tensor, chosen_1A: Tensor, weight_1A: Tensor) -> Tensor:
        """A single row needs no sorting."""
        experts = chosen_1A[0].tolist()
        a_AF = silu_gate(torch.cat([self.gate_up[e](h_1D) for e in experts]))
        y_AD = torch.cat([self.down[e](a_AF[i : i + 1]) for i, e in enumerate(experts)])
        return torch.addmm(x_1D, weight_1A, y_AD)

    def _each(self, h_ND: Tensor, chosen_NA: Tensor, weight_NA: Tensor) -> Tensor:
        # oneDNN prepares itself for every new number of rows, 1.2 ms each time: let the large numbers come again
        many = h_ND.dtype == torch.bfloat16 and len(h_ND) > 128 and not self.tile
        order = Order(chosen_NA, self.E, multiple=32 if many else 1)
        slices = order.slices()
        h_PD = h_ND.index_select(0, order.token_P)
        a_PF = torch.cat([silu_gate(self.gate_up[e](h_PD[i:j])) for e, i, j in slices])
        y_PD = torch.cat([self.down[e](a_PF[i:j]) for e, i, j in slices])
        return gather_sum(y_PD, order.place_NA, weight_NA)
