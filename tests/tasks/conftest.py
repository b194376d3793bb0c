"""Sandboxes for the tests: one of each layer that this machine has, with small limits so that attacks end soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoestring.tasks.sandbox import Limits, Outcome, Program, Sandbox
from shoestring.tasks.sandbox.layers import missing

LIMITS = Limits(cpu_seconds=1, wall_seconds=0.5, memory=256 * 2**20, scratch=4 * 2**20)
Attack = Callable[..., Outcome]


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


def call(sandbox: Sandbox, source: str, *arguments: Any, expected: Any = "never") -> Outcome:
    """Run `f(*arguments)`; afterwards an honest program must still be graded as it should."""
    attack = Program(source=source, entry="f", tests=((arguments, expected),))
    honest = Program(source="def f(x): return x + 1", entry="f", tests=(((1,), 2), ((5,), 6)))
    mistaken = Program(source="def f(x): return x", entry="f", tests=(((1,), 2), ((5,), 6)))
    outcome, right, wrong = sandbox.run([attack, honest, mistaken])
    assert right.ok, "an honest program after the attack"
    assert not wrong.ok, "a wrong program after the attack"
    return outcome
