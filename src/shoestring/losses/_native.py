"""Whole chunks of a divergence in C, in the dtype of products: nn/csrc/divergence.c, where there is a compiler.

A part whose `form` names its C function (`form.native`) is computed by it where the student's kernels are native
(`Tokens.native`) and both sides are hidden states on a CPU, of one dtype and vocabulary; everything else by the form
itself. The same numbers up to the rounding of fp32 sums.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from shoestring.losses._targets import Buffers, Form, Targets
from shoestring.losses._teacher import Hidden
from shoestring.nn.elements import SUFFIX, usable
from shoestring.nn.native import library


def native_form(form: Form, hidden_ND: Tensor, vocab: int, targets: Targets) -> Form | None:
    """The form over whole chunks of logits in the dtype of products, or None where the plain one must do."""
    name = getattr(form, "native", None)
    if (
        name is None
        or not isinstance(targets, Hidden)
        or targets.softcap
        or not usable(True, hidden_ND, targets.hidden_NC)
    ):
        return None
    theirs = targets.head_VC.shape[0] if targets.vocab is None else targets.vocab
    if theirs != vocab:
        return None
    function = getattr(library(), f"shoestring_{name}{SUFFIX[hidden_ND.dtype]}")

    def native(z_nV: Tensor, t_nV: Tensor, buffers: Buffers) -> Tensor:
        n, V = z_nV.shape
        assert z_nV.is_contiguous() and t_nV.is_contiguous() and t_nV.shape == (n, V)
        value_n = torch.empty(n)
        function(
            c_void_p(z_nV.data_ptr()), c_void_p(t_nV.data_ptr()), c_int64(n), c_int64(V), c_void_p(value_n.data_ptr()),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
        return value_n

    return native
