"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) is torch's own, fused; here are its two parameter groups.

Matrices decay; vectors (norm weights, biases) do not. Betas 0.9/0.95 and decay 0.1 are DeepSeek-V3's (section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def adamw_groups(params: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for `torch.optim.AdamW`; empty ones are left out."""
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
