"""The functions of csrc/elements.c: what a training step does between its products, one pass each.

A caller asks `usable` first and has its twin in torch for the rest. Tensors are passed as they are and must be what the
C side expects: dense but for the row distance, of the named dtype, on the CPU.
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from shoestring.nn.native import library

SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}
KINDS = {"p": c_void_p, "i": c_int64, "f": c_float}
ARGUMENTS = {  # of each function, without the number of threads that comes last; p: a tensor or None
    "norm_forward": "pipfiipp",
    "norm_backward": "pipppiipp",
    "swiglu_forward": "piip",
    "swiglu_backward": "pppiippp",
    "gather": "ppiip",
    "combine": "pppiiip",
    "add_to": "pip",
    "rotate": "pipifiiiiip",
    "mla_keys": "ppipiiiiiiipp",
    "mla_keys_backward": "pppiiiiiiipp",
    "vocabulary": "ppfiippi",
    "logits_read": "ppfiiip",
    "logits_slope": "ppfiiip",
    "kl_read": "ppiiip",
    "kl_slope": "ppiiip",
    "kl_value": "piip",
    "route_forward": "ppiiiiiiifippp",
    "route_backward": "ppppiiiiifp",
    "gate_forward": "ppiiip",
    "gate_tokens": "ppiiip",
    "gate_weights": "ppiiip",
    "order_rows": "piiiippp",
}


@functools.cache
def _function(name: str, dtype: torch.dtype | None) -> Any:
    made = getattr(library(), f"shoestring_{name}{'' if dtype is None else SUFFIX[dtype]}")
    made.argtypes = [*(KINDS[kind] for kind in ARGUMENTS[name]), c_int]
    made.restype = None
    return made


def usable(native: bool, *tensors: Tensor) -> bool:
    """Whether native functions were chosen (Kernels.native) and fit these tensors: one dtype of two, on the CPU."""
    dtype = tensors[0].dtype
    return native and dtype in SUFFIX and all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)


def call(name: str, dtype: torch.dtype | None, *arguments: Tensor | float | None) -> None:
    """Run a function of csrc/elements.c with torch's number of threads. `dtype` None: it has no variants."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _function(name, dtype)(*plain, torch.get_num_threads())


def rows(x: Tensor) -> Tensor:
    """Of x [..., D] the rows [N, D] whose numbers lie together: a view where it can be one."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()
