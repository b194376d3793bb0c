"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) by torch's fused kernel, and its two parameter groups.

Matrices decay; vectors (norm weights, biases) do not. Betas 0.9/0.95 and decay 0.1 are DeepSeek-V3's (section 4.2).
`torch.optim.AdamW(fused=True)` is the oracle of the tests: the same numbers, to the bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.optim.base import Optimizer


def adamw_groups(params: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for `AdamW`; empty ones are left out."""
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamW(Optimizer):
    """m ← β₁ m + (1-β₁) g;  v ← β₂ v + (1-β₂) g²;  W ← (1 - lr·wd) W - lr · m̂ / (sqrt(v̂) + eps)."""

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0,
        eps: float = 1e-8,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for params in alike.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Of parameters of one device and dtype: one call for all of them."""
        states = [self.state[parameter] for parameter in params]
        for parameter, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        gradients = [parameter.grad for parameter in params if parameter.grad is not None]
        first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._fused_adamw_(
            params, gradients, first, second, [], steps, amsgrad=False, lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            grad_scale=None, found_inf=None,
        )  # fmt: skip
