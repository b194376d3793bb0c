"""Routed experts, computed for the tokens that chose them; no token is dropped.

Tokens are sorted by expert once. `loop`: each expert's tokens are then one contiguous slice, one product a matrix.
`bmm`: slices padded to the fullest expert and multiplied as a batch, which pays when there are few tokens (decoding);
beyond twice the balanced size its products go slice by slice, so one expert with every token costs no more memory than
balance. `grouped`: torch's grouped product, for GPUs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoestring.nn import elements, multiply
from shoestring.nn.kernels import Kernels
from shoestring.nn.linear import swiglu, swiglu_backward


def experts_plain(x_ND: Tensor, gate_up: Tensor, down: Tensor, chosen_NA: Tensor, weight_NA: Tensor) -> Tensor:
    """The readable twin: expert by expert, the tokens that chose it."""
    y_ND = torch.zeros_like(x_ND)
    for e in range(gate_up.shape[0]):
        n, a = (chosen_NA == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_ND[n], gate_up[e]).chunk(2, dim=-1)
        y_nD = F.linear(F.silu(gate) * up, down[e]) * weight_NA[n, a, None]
        y_ND = y_ND.index_add(0, n, y_nD.to(y_ND.dtype))
    return y_ND


class Order:
    """The M = N·A (token, choice) pairs sorted by expert: one sort serves the forward and the backward.

    Each expert owns a slice of P >= M rows: its pairs, then padding (up to a multiple of `multiple`, or up to the
    fullest expert's if `even`). `place_NA`: the row of each pair. `token_P`: the token of each row (0 in padding).
    """

    def __init__(self, chosen_NA: Tensor, n_experts: int, *, multiple: int = 1, even: bool = False):
        chosen_M = chosen_NA.flatten()
        M, device = len(chosen_M), chosen_NA.device
        load_E = torch.bincount(chosen_M, minlength=n_experts)
        rows_E = load_E.max().expand(n_experts) if even else load_E
        rows_E = (rows_E + (multiple - 1)) // multiple * multiple
        ends_E = rows_E.cumsum(0)
        shift_E = (ends_E - rows_E) - (load_E.cumsum(0) - load_E)
        order_M = torch.argsort(chosen_M, stable=True)
        place_M = torch.empty_like(order_M)
        place_M[order_M] = torch.arange(M, device=device) + shift_E[chosen_M[order_M]]
        self.ends_E, self.ends = ends_E, ends_E.tolist()
        self.place_NA = place_M.view_as(chosen_NA)
        self.token_P = torch.zeros(self.ends[-1], dtype=torch.long, device=device)
        self.token_P[place_M] = torch.arange(M, device=device).div_(chosen_NA.shape[1], rounding_mode="floor")

    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, start, end) of every expert that has tokens."""
        starts = [0, *self.ends[:-1]]
        return [(e, i, j) for e, (i, j) in enumerate(zip(starts, self.ends, strict=True)) if i < j]


def gather_sum(y_PD: Tensor, place_NA: Tensor, weight_NA: Tensor | None) -> Tensor:
    """Back to tokens in one pass: Σ_a weight · y[place]."""
    return F.embedding_bag(place_NA, y_PD, mode="sum", per_sample_weights=weight_NA)


def native_order(chosen_NA: Tensor, n_experts: int, *, multiple: int = 1) -> Order:
    """The same in C: one pass that counts, one that places."""
    order, chosen_NA = Order.__new__(Order), chosen_NA.contiguous()
    M, A = chosen_NA.numel(), chosen_NA.shape[1]
    order.ends_E, order.place_NA = torch.empty(n_experts, dtype=torch.long), torch.empty_like(chosen_NA)
    token = torch.empty(M + n_experts * (multiple - 1), dtype=torch.long)
    elements.call("order_rows", None, chosen_NA, M, A, n_experts, multiple, order.place_NA, token, order.ends_E)
    order.ends = order.ends_E.tolist()
    order.token_P = token[: order.ends[-1]]
    return order


class _Loop(torch.autograd.Function):
    """Keeps x, the weights in compute dtype and h = [gate | up] of every pair; the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, weight_NA: Tensor, order: Order) -> Tensor:
        x_PD = x_ND.index_select(0, order.token_P)
        h_PG = x_ND.new_empty(len(x_PD), gate_up.shape[1])
        slices = order.slices()
        for e, i, j in slices:
            torch.mm(x_PD[i:j], gate_up[e].t(), out=h_PG[i:j])
        gate_PF, up_PF = h_PG.chunk(2, dim=-1)
        a_PF = F.silu(gate_PF).mul_(up_PF)
        y_PD = x_PD  # its memory is free now
        for e, i, j in slices:
            torch.mm(a_PF[i:j], down[e].t(), out=y_PD[i:j])
        ctx.save_for_backward(x_ND, gate_up, down, weight_NA, h_PG)
        ctx.order, ctx.slices = order, slices
        return gather_sum(y_PD, order.place_NA, weight_NA)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up, down, weight_NA, h_PG = ctx.saved_tensors
        order, slices = ctx.order, ctx.slices
        weight_P1 = weight_NA.new_zeros(len(h_PG), 1)  # 0 in padding, which keeps it out of every gradient
        weight_P1[order.place_NA.flatten(), 0] = weight_NA.flatten()
        dy_PD = dy_ND.index_select(0, order.token_P)
        da_PF = h_PG.new_empty(len(h_PG), down.shape[2])
        for e, i, j in slices:
            torch.mm(dy_PD[i:j], down[e], out=da_PF[i:j])
        dh_PG, a_PF = swiglu_backward(da_PF * weight_P1, h_PG)
        dweight_P = da_PF.mul_(a_PF).sum(-1, dtype=torch.promote_types(da_PF.dtype, torch.float32))
        a_PF.mul_(weight_P1)
        x_PD = x_ND.index_select(0, order.token_P)
        dgate_up, ddown = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, i, j in slices:
            torch.mm(dy_PD[i:j].t(), a_PF[i:j], out=ddown[e])
            torch.mm(dh_PG[i:j].t(), x_PD[i:j], out=dgate_up[e])
        dx_PD = dy_PD  # its memory is free now
        for e, i, j in slices:
            torch.mm(dh_PG[i:j], gate_up[e], out=dx_PD[i:j])
        dweight_NA = dweight_P[order.place_NA].to(weight_NA.dtype)
        return gather_sum(dx_PD, order.place_NA, None), dgate_up, ddown, dweight_NA, None


class _NativeLoop(torch.autograd.Function):
    """`_Loop` with everything between the products in C; weights stay in fp32."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, weight_NA: Tensor, order: Order) -> Tensor:
        (N, D), P, F, dtype = x_ND.shape, len(order.token_P), down.shape[2], x_ND.dtype
        x_ND, weight_NA, slices = x_ND.contiguous(), weight_NA.contiguous(), order.slices()
        x_PD, h_PG, a_PF = x_ND.new_empty(P, D), x_ND.new_empty(P, 2 * F), x_ND.new_empty(P, F)
        elements.call("gather", dtype, x_ND, order.token_P, P, D, x_PD)
        for e, i, j in slices:
            torch.mm(x_PD[i:j], gate_up[e].t(), out=h_PG[i:j])
        elements.call("swiglu_forward", dtype, h_PG, P, F, a_PF)
        y_PD, y_ND = x_PD, torch.empty_like(x_ND)  # x_PD's memory is free now
        for e, i, j in slices:
            torch.mm(a_PF[i:j], down[e].t(), out=y_PD[i:j])
        elements.call("combine", dtype, y_PD, order.place_NA, weight_NA, N, order.place_NA.shape[1], D, y_ND)
        ctx.save_for_backward(x_ND, gate_up, down, weight_NA, h_PG)
        ctx.order, ctx.slices = order, slices
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up, down, weight_NA, h_PG = ctx.saved_tensors
        order, slices, (N, D), dtype = ctx.order, ctx.slices, x_ND.shape, x_ND.dtype
        (P, G), A, place_M = h_PG.shape, weight_NA.shape[1], order.place_NA.flatten()
        weight_P = torch.zeros(P).index_copy_(
            0, place_M, weight_NA.flatten()
        )  # 0 in padding keeps it out of everything
        dy_PD, x_PD, da_PF = x_ND.new_empty(P, D), x_ND.new_empty(P, D), x_ND.new_empty(P, G // 2)
        elements.call("gather", dtype, dy_ND.contiguous(), order.token_P, P, D, dy_PD)
        elements.call("gather", dtype, x_ND, order.token_P, P, D, x_PD)
        for e, i, j in slices:
            torch.mm(dy_PD[i:j], down[e], out=da_PF[i:j])
        dh_PG, a_PF, dweight_P = torch.empty_like(h_PG), torch.empty_like(da_PF), torch.empty(P)
        elements.call("swiglu_backward", dtype, da_PF, h_PG, weight_P, P, G // 2, dh_PG, a_PF, dweight_P)
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        for e in {*range(len(down))} - {e for e, _, _ in slices}:
            dgate_up[e].zero_(), ddown[e].zero_()
        for e, i, j in slices:
            torch.mm(dy_PD[i:j].t(), a_PF[i:j], out=ddown[e])
            torch.mm(dh_PG[i:j].t(), x_PD[i:j], out=dgate_up[e])
        dx_PD, dx_ND = dy_PD, torch.empty_like(x_ND)  # dy_PD's memory is free now
        for e, i, j in slices:
            torch.mm(dh_PG[i:j], gate_up[e], out=dx_PD[i:j])
        elements.call("combine", dtype, dx_PD, order.place_NA, None, N, A, D, dx_ND)
        return dx_ND, dgate_up, ddown, dweight_P[place_M].view_as(weight_NA), None


def experts_native(x_ND: Tensor, gate_up: Tensor, down: Tensor, chosen_NA: Tensor, weight_NA: Tensor) -> Tensor:
    """`experts_loop` with csrc/elements.c."""
    order = native_order(chosen_NA, len(gate_up), multiple=_multiple(x_ND, chosen_NA, len(gate_up)))
    y: Tensor = _NativeLoop.apply(x_ND, gate_up, down, weight_NA.float(), order)
    return y


class _Multiplied(torch.autograd.Function):
    """`_NativeLoop` with the products in C too: an expert's rows stay in cache from product to product, and its weights
    are read, and their gradients made, in their own dtype."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, weight_NA: Tensor, order: Order) -> Tensor:
        x_ND, gate_up, down, weight_NA = (x.contiguous() for x in (x_ND, gate_up, down, weight_NA))
        (N, D), P, F = x_ND.shape, len(order.token_P), down.shape[2]
        h_PG, y_PD, y_ND = x_ND.new_empty(P, 2 * F), x_ND.new_empty(P, D), torch.empty_like(x_ND)
        multiply.experts("experts_forward", x_ND, order, gate_up, down, h=h_PG, y=y_PD)
        elements.call("combine", x_ND.dtype, y_PD, order.place_NA, weight_NA, N, order.place_NA.shape[1], D, y_ND)
        ctx.save_for_backward(x_ND, gate_up, down, weight_NA, h_PG)
        ctx.order = order
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up, down, weight_NA, h_PG = ctx.saved_tensors
        order, (N, D), (P, G) = ctx.order, x_ND.shape, h_PG.shape
        place_M, dweight_P = order.place_NA.flatten(), torch.empty(P)
        weight_P = torch.zeros(P).index_copy_(0, place_M, weight_NA.flatten())  # 0 in padding
        dx_PD, dx_ND = x_ND.new_empty(P, D), torch.empty_like(x_ND)
        into = {}
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            into = {
                f"d{n}": torch.empty_like(w, dtype=torch.float32) for n, w in (("gate_up", gate_up), ("down", down))
            }
        multiply.experts(
            "experts_backward", x_ND, order, gate_up, down, h=h_PG, dy=dy_ND.contiguous(), weight=weight_P,
            dh=torch.empty_like(h_PG), a=x_ND.new_empty(P, G // 2), dx=dx_PD, dweight=dweight_P, **into,
        )  # fmt: skip
        elements.call("combine", x_ND.dtype, dx_PD, order.place_NA, None, N, order.place_NA.shape[1], D, dx_ND)
        dgate_up, ddown = (into[n].to(gate_up.dtype) if into else None for n in ("dgate_up", "ddown"))
        return dx_ND, dgate_up, ddown, dweight_P[place_M].view_as(weight_NA), None


def experts_multiplied(x_ND: Tensor, gate_up: Tensor, down: Tensor, chosen_NA: Tensor, weight_NA: Tensor) -> Tensor:
    """`experts_loop` with csrc/multiply.c; the weights as they are."""
    order = native_order(chosen_NA, len(gate_up), multiple=8)
    y: Tensor = _Multiplied.apply(x_ND, gate_up, down, weight_NA.float(), order)
    return y


def experts_loop(x_ND: Tensor, gate_up: Tensor, down: Tensor, chosen_NA: Tensor, weight_NA: Tensor) -> Tensor:
    """One product a matrix and expert, forward and backward by hand."""
    order = Order(chosen_NA, len(gate_up), multiple=_multiple(x_ND, chosen_NA, len(gate_up)))
    y: Tensor = _Loop.apply(x_ND, gate_up, down, weight_NA.to(x_ND.dtype), order)
    return y


def _multiple(x_ND: Tensor, chosen_NA: Tensor, n_experts: int) -> int:
    """On a CPU, bf16 products are compiled for each new shape (0.7 ms): slices are filled up to a multiple of rows, so
    that shapes come again. A sixteenth of the mean load, which adds 3 % of rows, and at most 32."""
    if x_ND.dtype != torch.bfloat16 or x_ND.device.type != "cpu" or len(x_ND) < 512:
        return 1
    return max(1, min(32, chosen_NA.numel() // n_experts // 16))


def experts_bmm(
    x_ND: Tensor, gate_up: Tensor, down: Tensor, chosen_NA: Tensor, weight_NA: Tensor, *, native: bool = False
) -> Tensor:
    """Slices padded to the fullest expert, two batched products; uneven loads go slice by slice."""
    E = len(gate_up)
    order = Order(chosen_NA, E, even=True)
    if len(order.token_P) > 2 * chosen_NA.numel() + 16 * E:
        order = Order(chosen_NA, E, multiple=_multiple(x_ND, chosen_NA, E))
        return _sliced(x_ND, gate_up, down, order, weight_NA, native=native)
    x_EXD = x_ND.index_select(0, order.token_P).unflatten(0, (E, -1))
    h_EXG = torch.bmm(x_EXD, gate_up.transpose(1, 2))
    y_EXD = torch.bmm(swiglu(h_EXG, native=native), down.transpose(1, 2))
    return _weighted(y_EXD.flatten(0, 1), order, weight_NA)


class _Slices(torch.autograd.Function):
    """The product x Wᵀ of every expert's slice: what `torch.bmm` is for even slices."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_EFD: Tensor, slices: list[tuple[int, int, int]]) -> Tensor:
        y_PF = x_PD.new_empty(len(x_PD), weight_EFD.shape[1])
        for e, i, j in slices:
            torch.mm(x_PD[i:j], weight_EFD[e].t(), out=y_PF[i:j])
        ctx.save_for_backward(x_PD, weight_EFD)
        ctx.slices = slices
        return y_PF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PF: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, weight_EFD = ctx.saved_tensors
        dx_PD = torch.empty_like(x_PD)
        dweight_EFD = torch.zeros_like(weight_EFD) if ctx.needs_input_grad[1] else None
        for e, i, j in ctx.slices:
            torch.mm(dy_PF[i:j], weight_EFD[e], out=dx_PD[i:j])
            if dweight_EFD is not None:
                torch.mm(dy_PF[i:j].t(), x_PD[i:j], out=dweight_EFD[e])
        return dx_PD, dweight_EFD, None


def _sliced(x_ND: Tensor, gate_up: Tensor, down: Tensor, order: Order, weight_NA: Tensor, *, native: bool) -> Tensor:
    """`experts_bmm` for slices of any length, in as many steps: what a step kept is free when its gradient is made
    (`_Loop`, one step, keeps h to its end, and so holds more)."""
    slices = order.slices()
    h_PG = _Slices.apply(x_ND.index_select(0, order.token_P), gate_up, slices)
    y_PD: Tensor = _Slices.apply(swiglu(h_PG, native=native), down, slices)
    return _weighted(y_PD, order, weight_NA)


def _weighted(y_PD: Tensor, order: Order, weight_NA: Tensor) -> Tensor:
    """As `gather_sum`, with autograd's gradients."""
    return (y_PD[order.place_NA] * weight_NA.to(y_PD.dtype).unsqueeze(-1)).sum(1)


def experts_grouped(
    x_ND: Tensor, gate_up: Tensor, down: Tensor, chosen_NA: Tensor, weight_NA: Tensor, *, native: bool = False
) -> Tensor:
    """Torch's grouped product; D and F must be multiples of 16 bytes."""
    order = Order(chosen_NA, len(gate_up))
    ends_E = order.ends_E.to(torch.int32)
    h_PG = F.grouped_mm(x_ND.index_select(0, order.token_P), gate_up.transpose(1, 2), offs=ends_E)
    return _weighted(F.grouped_mm(swiglu(h_PG, native=native), down.transpose(1, 2), offs=ends_E), order, weight_NA)


WAYS = {"loop": experts_loop, "bmm": experts_bmm, "grouped": experts_grouped, "plain": experts_plain}
NATIVE = WAYS | {
    "loop": experts_native, "bmm": partial(experts_bmm, native=True), "grouped": partial(experts_grouped, native=True)
}  # fmt: skip


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj [E, 2F, D] (gate rows first), down_proj [E, D, F]."""

    def __init__(self, n: int, d_model: int, width: int, *, device: torch.device | None = None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * width, d_model, device=device))
        self.down_proj = nn.Parameter(torch.empty(n, d_model, width, device=device))

    def forward(self, x_ND: Tensor, chosen_NA: Tensor, weight_NA: Tensor, kernels: Kernels) -> Tensor:
        weights = self.gate_up_proj, self.down_proj
        even = all(size % 2 == 0 for size in self.down_proj.shape[1:])
        if kernels.experts == "loop" and even and multiply.usable(kernels.native, x_ND, weights):
            return experts_multiplied(x_ND, *weights, chosen_NA, weight_NA)
        gate_up, down = self.gate_up_proj.to(x_ND.dtype), self.down_proj.to(x_ND.dtype)
        ways = NATIVE if elements.usable(kernels.native, x_ND) else WAYS
        return ways[kernels.experts](x_ND, gate_up, down, chosen_NA, weight_NA)
