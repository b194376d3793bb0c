"""Products of linear layers in C (csrc/multiply.c), for processors that multiply bf16 by themselves but not by tiles.

Against torch's they read weights in fp32 as they are, multiply several layers of one input at once without joining
them, give gradients of weights in fp32 unrounded, and thin shapes and long sums are as fast as square ones (LOG.md,
entry 21). The plain twin is F.linear.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoestring.nn.native import library

ROWS = 64  # fewer, and packing weights is no longer a small part
MOST = 4  # layers at once


class _Stack(ctypes.Structure):
    """Matrices under each other: the struct Stack of csrc/multiply.c."""

    _fields_ = [("at", c_void_p * MOST), ("rows", c_int64 * MOST), ("wide", c_int64)]


@functools.cache
def is_fast() -> bool:
    """Whether the library multiplies here, and torch has no matrix unit to do it better."""
    return bool(library().shoestring_multiplies()) and not torch.cpu._is_amx_tile_supported()


def usable(native: bool, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether native products were chosen (Kernels.native) and fit: bf16 times fp32 or bf16, even widths, many rows."""
    if not native or x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(weights) > MOST:
        return False
    alike = all(type(w) in (Tensor, torch.nn.Parameter) and w.dtype == weights[0].dtype for w in weights)
    out, rows = sum(len(w) for w in weights), x.numel() // max(1, x.shape[-1])
    even = x.shape[-1] % 2 == 0 and out > 0 and (out % 2 == 0 or weights[0].ndim == 3)
    return alike and weights[0].dtype in (torch.float32, torch.bfloat16) and even and rows >= ROWS and is_fast()


def stack(weights: Sequence[Tensor]) -> _Stack:
    """`weights` must be dense, of one dtype and width, and outlive the result."""
    rest = [0] * (MOST - len(weights))
    at, rows = [w.data_ptr() for w in weights] + rest, [len(w) for w in weights] + rest
    return _Stack((c_void_p * MOST)(*at), (c_int64 * MOST)(*rows), weights[0].dtype == torch.float32)


def call(name: str, *arguments: Any) -> None:
    """Run a function of csrc/multiply.c with torch's number of threads."""
    kinds: dict[type, Any] = {
        Tensor: lambda x: c_void_p(x.data_ptr()),
        int: c_int64,
        _Stack: ctypes.byref,
        _Experts: ctypes.byref,
    }
    plain = [kinds[type(x)](x) for x in arguments]
    getattr(library(), f"shoestring_{name}")(*plain, c_int(torch.get_num_threads()))


def rows(x: Tensor) -> Tensor:
    """The rows [N, D] of x [..., D], each of them dense."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def forward(x_ND: Tensor, weights: Sequence[Tensor], y: Tensor | None = None) -> Tensor:
    """The product x Wᵀ [N, out] with the weights under each other (into `y`); at least 8 rows."""
    (N, D), out = x_ND.shape, sum(len(w) for w in weights)
    y = x_ND.new_empty(N, out) if y is None else y
    call("linear_forward", x_ND, x_ND.stride(0), N, D, stack(weights), out, y)
    return y


def inputs(dy_ND: Tensor, weights: Sequence[Tensor], dx: Tensor | None = None) -> Tensor:
    """The gradient dy W (into `dx`) of what was multiplied; at least 8 rows."""
    (N, out), D = dy_ND.shape, weights[0].shape[1]
    dx = dy_ND.new_empty(N, D) if dx is None else dx
    call("linear_inputs", dy_ND, dy_ND.stride(0), N, D, stack(weights), out, dx)
    return dx


def gradients(dy_ND: Tensor, x_ND: Tensor, into: Sequence[Tensor], *, add: bool = False) -> None:
    """dyᵀ x into fp32 tensors under each other, or added to them."""
    (N, out), D = dy_ND.shape, x_ND.shape[1]
    call(
        "linear_weights", dy_ND, dy_ND.stride(0), x_ND, x_ND.stride(0), N, D, stack(into), out, int(add)
    )  # fmt: skip


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        weights = tuple(w.contiguous() for w in weights)
        ctx.save_for_backward(x, *weights)
        return forward(rows(x), weights).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dy_NO = rows(dy)
        dx = inputs(dy_NO, weights).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, *[None] * len(weights)
        made = [torch.empty_like(w, dtype=torch.float32) for w in weights]
        gradients(dy_NO, rows(x), made)
        return dx, *(g.to(w.dtype) for g, w in zip(made, weights, strict=True))


def linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The product of x [..., D] with weights [*, D] under each other: [..., Σ rows]. Ask `usable` first."""
    y: Tensor = _Linear.apply(x, *weights)
    return y


class _Experts(ctypes.Structure):
    """The struct Experts of csrc/experts.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "token", "ends", "gate_up", "down")),
        *((name, c_int64) for name in ("E", "D", "F", "wide")),
        *((name, c_void_p) for name in ("h", "y", "dy", "weight", "dh", "a", "dx", "dweight", "dgate_up", "ddown")),
    ]  # fmt: skip


def experts(name: str, x_ND: Tensor, order: Any, gate_up: Tensor, down: Tensor, **tensors: Tensor) -> None:
    """Run a function of csrc/experts.h; `order` (nn/experts.py) gives the rows. All tensors are dense."""
    E, D, F = down.shape
    tensors |= {"x": x_ND, "token": order.token_P, "ends": order.ends_E, "gate_up": gate_up, "down": down}
    at = {part: tensor.data_ptr() for part, tensor in tensors.items()}
    call(name, _Experts(E=E, D=D, F=F, wide=gate_up.dtype == torch.float32, **at))
