"""What an optimiser is to `train/step.py`: parameter groups, a state for each parameter, a step.

Not `torch.optim.Optimizer`: making one of those imports torch's compiler, whether or not anything is compiled: 820
modules, 76 MB and 1.4 s of processor time (LOG.md, entry 18). Left out: hooks, closures, state_dict (train/state.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Optimizer:
    """`params`: tensors, or groups {"params": [...], option: value}; `defaults` are the options of every group."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.param_groups: list[dict[str, Any]] = [defaults | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
