"""`plan calibrate` on the pretended device: every part is timed there, waited for, and real steps fit a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from shoestring import cli_measure, cli_timed
from shoestring.cost.calibrate import Calibration
from shoestring.nn.kernels import Kernels

from .pretend import NAME, pretending

GRID = {
    "linear": ((64, 32, 32), (128, 96, 32), (128, 32, 96)), "attention": ((64, 16, 2, 8, 8), (64, 32, 2, 16, 8)),
    "gqa": ((64, 16, 32, 2, 1, 16),), "mla": ((64, 16, 32, 2, 16, 16, 8, 8, 8),), "ffn": ((64, 32, 64),),
    "moe": ((64, 32, 16, 4, 2, 1),), "head": ((64, 32, 48),), "update": ((4, 4096),),
}  # fmt: skip
STEPS = (("dense", 32, 1, 2, 64, 0, 48, 2, 16), ("moe", 32, 2, 2, 64, 4, 48, 2, 16))


@pytest.fixture(autouse=True)
def counts() -> Iterator[Counter[str]]:
    with pretending() as counted:
        yield counted


@pytest.mark.parametrize(
    "kernels",
    [
        Kernels(attention="sdpa"),
        pytest.param(Kernels(dtype="bfloat16", attention="sdpa"), marks=pytest.mark.slow),
    ],
)
def test_every_part_and_real_steps(kernels: Kernels, counts: Counter[str]) -> None:
    bench = cli_timed.Bench(NAME, kernels, repeats=1)
    measured = cli_timed.samples(bench, GRID)
    assert {part for part, _, _ in measured} == set(GRID) and all(seconds > 0 for *_, seconds in measured)
    assert counts["synchronised"] >= 2 * len(measured)  # before and after whatever is timed
    found = Calibration("a GPU", 1, measured, cli_measure.bandwidth(bench.device, 1000), 1e9, device=NAME)
    steps = cli_measure.real_steps(bench, STEPS, rounds=1, each=1)
    fitted = found.fitted(steps)
    assert fitted.steps_measured == 2 and all(fitted.step_seconds(*step[:3]) > 0 for step in steps)


@pytest.mark.slow
def test_kernels_of_a_gpu_are_chosen() -> None:
    chosen = cli_measure.make_bench(NAME, "bfloat16").kernels
    assert chosen.dtype == "bfloat16" and chosen.attention == "sdpa"
