"""Memory over a long life: what is held after 100,000 tokens is what was held after the first few thousand."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from shoestring.core.nouns import Sampling
from shoestring.infer.engine import Engine

from .test_paged import IDS, dense, v3

STATUS = Path("/proc/self/status")


def resident_mb() -> float:
    gc.collect()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
@pytest.mark.parametrize("native", ["auto", False])
@pytest.mark.parametrize("family", [v3, dense])
def test_resident_memory_is_flat(family: object, native: object) -> None:
    """Fresh prompts all the time, so that the prefix cache is full and turns over; requests with events as well."""
    engine = Engine(family(), cache_tokens=1 << 13, block_size=16, native=native)  # type: ignore[operator, arg-type]
    sampling = Sampling(max_new_tokens=64, ignore_eos=True, n=2)
    made, seen = 0, []
    for round_ in range(40):
        prompts = [[*IDS[: 3 + i], round_, i] for i in range(16)]
        made += sum(len(one.token_ids) for group in engine.generate(prompts, sampling) for one in group)
        for i in range(8):
            engine.add(prompts[i][::-1], sampling)
        while engine.has_work:
            made += sum(len(event.token_ids) for event in engine.step())
        seen.append(resident_mb())
    assert made >= 100_000
    assert seen[-1] - seen[9] < 8, seen
    assert engine.stats()["running"] == 0
