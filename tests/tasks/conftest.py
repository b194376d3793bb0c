"""Sandboxes for the tests: one of each layer that this machine has, with small limits so that attacks end soon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from shoestring.tasks.sandbox import Limits, Outcome, Program, Sandbox
from shoestring.tasks.sandbox.layers import missing

LIMITS = Limits(cpu_seconds=4, wall_seconds=15, memory=128 * 2**20, scratch=4 * 2**20)
HASTY = replace(LIMITS, wall_seconds=0.4)  # for programs that would never end


def _open(layer: Any) -> Iterator[Sandbox]:
    if reason := missing(layer):
        pytest.skip(f"{layer}: {reason}")
    with Sandbox.open(layer, workers=1, limits=LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", params=["bwrap", "namespaces"])
def isolated(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of each layer that isolates."""
    yield from _open(request.param)


@pytest.fixture(scope="module", params=["bwrap", "namespaces", "unsafe"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of every layer."""
    yield from _open(request.param)


def endless(sandbox: Sandbox, source: str) -> Outcome:
    """Run `f()` that never ends on the same layer with little time; a sandbox with time goes on as it should."""
    with Sandbox.open(sandbox.layer, workers=1, limits=HASTY) as hasty:
        outcome = hasty.run([Program(source=source, entry="f", tests=(((), "never"),))])[0]
    call(sandbox, "def f(): return 0")
    return outcome


def call(sandbox: Sandbox, source: str, *arguments: Any, expected: Any = "never") -> Outcome:
    """Run `f(*arguments)`; afterwards an honest program must still be graded as it should."""
    attack = Program(source=source, entry="f", tests=((arguments, expected),))
    honest = Program(source="def f(x): return x + 1", entry="f", tests=(((1,), 2), ((5,), 6)))
    mistaken = Program(source="def f(x): return x", entry="f", tests=(((1,), 2), ((5,), 6)))
    outcome, right, wrong = sandbox.run([attack, honest, mistaken])
    assert right.ok, "an honest program after the attack"
    assert not wrong.ok, "a wrong program after the attack"
    return outcome
