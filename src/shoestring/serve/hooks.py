"""Where somebody else has a say: before a call is admitted and after it ended.

A hook is a module or object with either function, both may be coroutines:

    def before(call: Call) -> None       raise ApiError to refuse; may change `call.parts` (sampling) and sleep
    def after(call: Call, outcome: Outcome) -> None

Given by name: a Python file, or an importable module. A hook that fails before admission refuses the call (500): what
guards must not fail open. One that fails afterwards is logged.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.serve.errors import ApiError
from shoestring.serve.generation import Part, Tally
from shoestring.serve.keys import Key

_log = logging.getLogger("shoestring.serve")


@dataclass(slots=True)
class Call:
    """One request as hooks, metering and the audit log see it."""

    request_id: str
    endpoint: str
    model: str
    key: Key | None
    user: str | None  # behind a shared key: the request's `user`, or what Open WebUI forwards
    client: str  # address
    raw: Mapping[str, Any]  # the request's JSON
    parts: list[Part] = field(default_factory=list)  # empty in front of an upstream
    max_tokens: int = 0
    n: int = 1
    stream: bool = False
    tally: Tally = field(default_factory=Tally)


@dataclass(slots=True, frozen=True)
class Outcome:
    """How a call ended."""

    status: int  # 200, an error's, or 499: the client went away
    texts: tuple[str, ...]  # by choice, thinking included
    finish: tuple[str, ...]
    usd: float
    seconds: float


class Hooks:
    """All hooks, in the order given."""

    def __init__(self, names: Sequence[str]) -> None:
        self._hooks = [_load(name) for name in names]

    def __bool__(self) -> bool:
        return bool(self._hooks)

    async def before(self, call: Call) -> None:
        """Raises ApiError when one refuses."""
        for hook in self._hooks:
            try:
                await _maybe(getattr(hook, "before", None), call)
            except ApiError:
                raise
            except Exception as error:
                _log.exception("hook %s failed before admission", getattr(hook, "__name__", hook))
                raise ApiError(500, "a check that every request must pass failed.", code="hook_failed") from error

    async def after(self, call: Call, outcome: Outcome) -> None:
        for hook in self._hooks:
            try:
                await _maybe(getattr(hook, "after", None), call, outcome)
            except Exception:
                _log.exception("hook %s failed after completion", getattr(hook, "__name__", hook))


async def _maybe(function: Any, *arguments: Any) -> None:
    if function is None:
        return
    found = function(*arguments)
    if inspect.isawaitable(found):
        await found


def _load(name: str) -> Any:
    path = Path(name)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(f"shoestring_hook_{path.stem}", path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UserError(f"there is no hook at {name}.")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:  # a user's own file: whatever it raises
        raise UserError(f"the hook {name} cannot be imported: {type(error).__name__}: {error}.") from error
    if not hasattr(module, "before") and not hasattr(module, "after"):
        raise UserError(f"the hook {name} has neither a function `before` nor `after`.")
    return module
