"""What every objective reads: N target tokens with their weights and, where it needs them, advantages, logprobs
and what a teacher says at their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from shoestring.nn.room import Room

if TYPE_CHECKING:
    from shoestring.losses._targets import Targets


@dataclass(slots=True)
class Tokens:
    """Flat target tokens. `weight_N` is 0 where a token gives no loss (prompt, padding); the rest is optional."""

    ids_N: Tensor  # int64
    weight_N: Tensor  # float
    advantage_N: Tensor | None = None
    old_N: Tensor | None = None  # logprobs under the policy that the rollouts came from
    ref_N: Tensor | None = None  # logprobs under the frozen reference
    teacher: Targets | None = None  # the teacher's side, row n beside token n
    place_N: Tensor | None = None  # where each stands in the batch, flat: for who reads other layers than the last
    native: bool = False  # whether the vocabulary is read in C (Kernels.native)
    softcap: float = 0.0  # c of the student's logits c tanh(U h / c); 0: they are U h
    room: Room | None = None  # where large tensors of the step lie
