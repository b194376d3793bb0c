"""shoestring: train a DeepSeek-V3-style model, make it reason, distil it into a student, and see the bill.

The few names promised here load what they need when they are first used; importing the package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "load": "shoestring.models.checkpoint",
    "save": "shoestring.models.checkpoint",
    "Engine": "shoestring.infer.engine",
    "Sampling": "shoestring.core.nouns",
    "UserError": "shoestring.core.errors",
    "plan": "shoestring.cost.plan",
    "run": "shoestring.api",
}

__all__ = ["Engine", "Sampling", "UserError", "__version__", "load", "plan", "run", "save"]

if TYPE_CHECKING:
    from shoestring.api import run
    from shoestring.core.errors import UserError
    from shoestring.core.nouns import Sampling
    from shoestring.cost.plan import plan
    from shoestring.infer.engine import Engine
    from shoestring.models.checkpoint import load, save


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
