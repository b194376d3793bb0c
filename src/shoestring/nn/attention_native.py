"""Exact attention in C, forward and backward (csrc/attention.c); its plain twin is attend_plain in nn/attention.py.

Against attention_blocks.py it spares the probabilities' way through memory (each block of them stays in the first
cache, none is kept: O(1) a token), the copies to [B, H, T, *], and the keys a mask hides. Numbers lie where the caller
has them; the result lies as [B, T, H, W], which is what the output projection reads.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoestring.core.errors import UserError
from shoestring.data.batch import BRANCH
from shoestring.nn import native
from shoestring.nn.native import library

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
STEP = 16  # of csrc/attention.c


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None when attention over such numbers can be native here, else the reason."""
    if device.type != "cpu" or dtype not in SUFFIX:
        return f"there is none for {dtype} on {device.type}"
    return native.why_not()


def _need(dtype: torch.dtype, device: torch.device) -> None:
    reason = why_not(dtype, device)
    if reason is not None:
        raise UserError(f'attention is "native", which is not to be had: {reason}; mend that, or take "blocks".')


def is_fast() -> bool:
    """Whether the library's vectors are wide enough (AVX, AVX-512) to be taken without measuring (LOG.md, entry 17)."""
    return bool(library().shoestring_attention_lanes() >= 8)


class _Place(Structure):
    """Where a tensor [B, H, T, *] lies: its first number, and how many bytes apart sequences, heads, positions are."""

    _fields_ = [("at", c_void_p), ("b", c_int64), ("h", c_int64), ("t", c_int64)]


class _Call(Structure):
    """The struct Attention of csrc/attention.c."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "H", "G", "T", "K", "W", "threads")),
        ("scale", c_float), ("seen", c_void_p),
        *((name, _Place) for name in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")),
        ("top", c_void_p), ("work", c_void_p),
    ]  # fmt: skip


def _place(x_BHTK: Tensor) -> _Place:
    b, h, t, _ = (stride * x_BHTK.element_size() for stride in x_BHTK.stride())
    return _Place(x_BHTK.data_ptr(), b, h, t)


def _rows(x_BHTK: Tensor) -> Tensor:
    """The same, with the numbers of a row side by side."""
    return x_BHTK if x_BHTK.stride(-1) == 1 or x_BHTK.shape[-1] == 1 else x_BHTK.contiguous()


def seen_in(segments_BT: Tensor) -> Tensor:
    """Who sees whom in bits, [B, T/16, T rounded up to 16, and T/16].

    Bit i of [b, j, s] says whether query 16 j + i sees key s; what follows, whether these queries see nothing (0),
    something (1) or all (2) of each 16 keys. The plain twin is `segment_bias` (nn/attention.py). Raises UserError when
    there is no library.
    """
    _need(torch.float32, segments_BT.device)
    (B, T), segments_BT = segments_BT.shape, segments_BT.long().contiguous()
    steps = -(-T // STEP)
    seen = torch.empty(B, steps, steps * (STEP + 1), dtype=torch.int16)
    library().shoestring_attention_seen(
        c_void_p(segments_BT.data_ptr()), c_int64(BRANCH), c_int64(B), c_int64(T), c_int64(torch.get_num_threads()),
        c_void_p(seen.data_ptr()),
    )  # fmt: skip
    return seen


def _call(shape: tuple[int, ...], scale: float, seen: Tensor | None, top: Tensor, **tensors: Tensor) -> _Call:
    at = None if seen is None else seen.data_ptr()
    places = {name: _place(tensor) for name, tensor in tensors.items()}
    return _Call(*shape, torch.get_num_threads(), scale, at, top=top.data_ptr(), **places)


def _run(call: _Call, dtype: torch.dtype, backward: bool) -> None:
    suffix, made = SUFFIX[dtype], library()
    size = getattr(made, f"shoestring_attention_work_{suffix}")
    size.restype = c_int64
    work = torch.empty(size(ctypes.byref(call), c_int64(backward)), dtype=torch.uint8)
    call.work = work.data_ptr()
    getattr(made, f"shoestring_attention_{suffix}")(ctypes.byref(call), c_int64(backward))


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None) -> Tensor:
        (B, H, T, K), G, W = q.shape, k.shape[1], v.shape[-1]
        out = v.new_empty(B, T, H, W).transpose(1, 2)
        top = q.new_empty(B, H, T, dtype=torch.float32)
        ctx.shape, ctx.scale = (B, H, G, T, K, W), scale
        _run(_call(ctx.shape, scale, seen, top, q=q, k=k, v=v, o=out), q.dtype, False)
        ctx.save_for_backward(q, k, v, out, top, seen)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, top, seen), dout = ctx.saved_tensors, _rows(dout)
        made = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
        call = _call(ctx.shape, ctx.scale, seen, top, q=q, k=k, v=v, o=out, dout=dout, **made)
        _run(call, q.dtype, True)
        return made["dq"], made["dk"], made["dv"], None, None


def attend_native(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTW: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Attention [B, H, T, W] over as many keys as queries: causal, or where `seen` (of `seen_in`) has a bit.

    Numbers are fp32 or bf16 on a CPU, `scale` is positive. Where a query sees nothing the result is NaN, as in the
    twin. Raises UserError when there is no library.
    """
    _need(q_BHTK.dtype, q_BHTK.device)
    out: Tensor = _NativeAttention.apply(_rows(q_BHTK), _rows(k_BGTK), _rows(v_BGTW), scale, seen)
    return out
