"""What every objective reads: N target tokens with their weights and, for policies, advantages and logprobs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Tokens:
    """Flat target tokens. `weight_N` is 0 where a token gives no loss (prompt, padding); the rest is optional."""

    ids_N: Tensor  # int64
    weight_N: Tensor  # float
    advantage_N: Tensor | None = None
    old_N: Tensor | None = None  # logprobs under the policy that the rollouts came from
    ref_N: Tensor | None = None  # logprobs under the frozen reference
