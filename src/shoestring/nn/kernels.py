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
    """`experts`: how routed experts are computed (nn/moe.py). `attention`: "plain" is the readable twin."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    experts: Literal["loop", "bmm", "grouped"] = "loop"
    attention: Literal["sdpa", "plain"] = "sdpa"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


FP32 = Kernels()  # the default: exact products, no measuring
