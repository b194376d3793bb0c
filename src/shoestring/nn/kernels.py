"""Which of several equal computations a model uses: a choice about speed, never about what is computed.

Master weights stay in the dtype they were made in (fp32 when training); `dtype` is what products are computed in.
Every choice has a plain twin that gives the same numbers up to rounding, and a test that compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Kernels:
    """How products, routed experts (nn/experts.py) and attention (nn/attention.py) are computed.

    `experts`: "loop" one product an expert, "bmm" padded to the fullest expert, "grouped" torch's grouped product.
    `attention`: "native" in C (fast on a CPU with a compiler), "blocks" of torch's operations (fast on one
    without), "sdpa" torch's kernel (fast on a GPU). "plain": the readable twins.
    `elements`: what lies between the products (norms, SwiGLU, rotation, routing, vocabulary), in torch or in C.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    experts: Literal["loop", "bmm", "grouped", "plain"] = "loop"
    attention: Literal["native", "blocks", "sdpa", "plain"] = "blocks"
    elements: Literal["torch", "native"] = "torch"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def native(self) -> bool:
        """Whether `elements` are computed in C."""
        return self.elements == "native"


def wait(device: torch.device) -> None:
    """Until the device has computed what it was given (a CPU always has): before and after anything that is timed."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


FP32 = Kernels()  # the default: fp32 products, nothing measured
