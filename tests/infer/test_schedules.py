"""Random schedules: no block leaked or used twice, and the same tokens as one request at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.nouns import Completion, Sampling
from shoestring.infer.blocks import BlockManager
from shoestring.infer.engine import Engine

from .conftest import V, deepseek, dense

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

MODELS: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """Built once: hypothesis runs the test many times."""
    if name not in MODELS:
        MODELS[name] = deepseek() if name == "deepseek" else dense()
    return MODELS[name]


def audit(engine: Engine) -> None:
    """The invariants that hold between steps."""
    scheduler = engine._scheduler
    tables = [sequence.blocks for sequence in scheduler.sequences() if sequence.blocks is not None]
    scheduler.blocks.check(tables)
    for sequence in scheduler.running:
        assert sequence.blocks is not None and sequence.computed <= len(sequence.blocks) * scheduler.blocks.size


def alone(model: Any, prompt: list[int], sampling: Sampling) -> list[list[int]]:
    """The same request in an engine of its own, with all the memory it could want."""
    engine, done = Engine(model, block_size=8, cache_tokens=4096), {}
    engine.add(prompt, sampling)
    while engine.has_work:
        for event in engine.step():
            if event.completion is not None:
                done[event.sample] = event.completion.token_ids
    return [done[sample] for sample in range(sampling.n)]


prefixes = st.sampled_from([[], [7] * 9, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]])
requests = st.tuples(
    prefixes,
    st.lists(st.integers(0, V - 1), min_size=1, max_size=12),
    st.integers(1, 3),  # n
    st.integers(1, 14),  # new tokens
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 5),  # seed
)


@pytest.mark.parametrize("family", ["deepseek", "dense"])
@given(
    asked=st.lists(requests, min_size=1, max_size=6),
    actions=st.lists(st.sampled_from(["step", "add", "cancel", "step"]), max_size=25),
    size=st.sampled_from([1, 3, 8]),
    blocks=st.integers(0, 30),
    budget=st.sampled_from([1, 5, 64]),
    reuse=st.booleans(),
)
@settings(max_examples=16, deadline=None)
def test_random_schedules(
    family: str, asked: list[Any], actions: list[str], size: int, blocks: int, budget: int, reuse: bool
) -> None:
    model = model_of(family)
    need = max(-(-(len(p) + len(own) + new) // size) for p, own, _, new, _, _ in asked)
    engine = Engine(
        model, block_size=size, cache_tokens=size * (need + blocks // size), max_batch_tokens=budget,
        prefix_cache=reuse,
    )  # fmt: skip
    waiting = list(enumerate(asked))
    done: dict[tuple[str, int], Completion] = {}
    cancelled: set[str] = set()

    def step() -> None:
        for event in engine.step():
            if event.completion is not None:
                assert (event.request_id, event.sample) not in done
                done[event.request_id, event.sample] = event.completion
        audit(engine)

    def add() -> None:
        index, (prefix, own, n, new, temperature, seed) = waiting.pop()
        sampling = Sampling(n=n, max_new_tokens=new, temperature=temperature, seed=seed)
        engine.add([*prefix, *own], sampling, request_id=str(index))
        audit(engine)

    for action in actions:
        if action == "add" and waiting:
            add()
        elif action == "cancel" and engine._requests:
            name = next(iter(engine._requests))
            engine.cancel(name)
            cancelled.add(name)
            audit(engine)
        else:
            step()
    while waiting:
        add()
    steps = 0
    while engine.has_work:
        step()
        steps += 1
        assert steps < 3000, "no progress"
    assert engine._scheduler.blocks.used == 0
    for index, (prefix, own, n, new, temperature, seed) in enumerate(asked):
        sampling = Sampling(n=n, max_new_tokens=new, temperature=temperature, seed=seed)
        found = [done[str(index), sample] for sample in range(n)]
        expected = alone(model, [*prefix, *own], sampling)
        for completion, ids in zip(found, expected, strict=True):
            if completion.finish_reason == "cancelled":
                assert str(index) in cancelled
                ids = ids[: len(completion.token_ids)]
            assert completion.token_ids == ids


def test_the_manager_counts_and_forgets() -> None:
    manager = BlockManager(3, 2)
    a, b = manager.take(), manager.take()
    manager.name(a, b"a", [1, 2])
    manager.share(a)
    manager.check([[a, b], [a]])
    manager.release([a, b])
    assert manager.free == 2 and manager.refs[a] == 1
    manager.release([a])
    assert manager.free == 3
    assert manager.find([b"a"], [1, 2, 3]) == [a]
    assert manager.find([b"a"], [1, 9, 3]) == []  # a name is not believed blindly
    taken = [manager.take(), manager.take()]  # blank ones first
    assert a not in taken and manager.find([b"a"], [1, 2]) == [a]
    manager.take()  # now it has to go
    assert manager.find([b"a"], [1, 2]) == []
    with pytest.raises(IndexError):
        manager.take()


def test_the_tail_of_a_prefix_goes_before_its_head() -> None:
    manager = BlockManager(3, 1)
    table = [manager.take() for _ in range(3)]
    for block, name in zip(table, (b"0", b"1", b"2"), strict=True):
        manager.name(block, name, [0])
    manager.release(table)
    manager.take()
    assert manager.find([b"0", b"1", b"2"], [0, 0, 0]) == table[:2]
