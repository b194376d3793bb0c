"""Progress: plain lines now and then, a bar on a terminal, silence when quiet; the figures are right."""

from __future__ import annotations

import contextlib
import io
import os

from shoestring.core.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(steps, *, stream=None, start=0, **kwargs):
    stream, clock = stream or io.StringIO(), Clock()
    with Progress(100, title="sft", stream=stream, clock=clock, **kwargs) as bar:
        for step in range(start + 1, start + steps + 1):
            clock.now += 1.0
            bar.update(step, tokens=2000 * step, loss=1.23456)
    return stream.getvalue()


def test_plain_lines_come_at_intervals():
    lines = run(40, every_s=15.0, usd_per_hour=3.6).splitlines()
    assert len(lines) == 2
    assert lines[0] == "sft  15/100 steps (15%)  1m25s left  2k tokens/s  $0.0150  loss 1.235"


def test_no_count_is_a_thousand_of_a_unit():
    stream = io.StringIO()
    with Progress(1e9, title="rl", unit="FLOPs", stream=stream, every_s=0.0) as bar:
        bar.update(999_960)
        bar.update(999_960_000)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1M/1G", "1G/1G"]


def test_the_last_step_is_always_said():
    lines = run(100, every_s=1000).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sft  100/100 steps (100%)  2k tokens/s")
    assert "left" not in lines[0]


def test_a_resumed_stage_counts_only_its_own_speed():
    (line,) = run(11, start=50, every_s=11).splitlines()
    assert "61/100" in line
    assert "39s left" in line
    assert "2k tokens/s" in line


def test_quiet_is_silent_on_a_terminal_too():
    assert run(100, quiet=True) == run(100, quiet=True, stream=Terminal()) == ""


def test_a_terminal_gets_a_bar():
    shown = run(100, stream=Terminal(), usd_per_hour=1.0)
    assert "sft" in shown
    assert "tokens/s" in shown


def test_large_units():
    stream = io.StringIO()
    with Progress(3.5e12, title="control", unit="FLOPs", stream=stream) as bar:
        bar.update(3.5e12)
    assert stream.getvalue().startswith("control  3.50e+12/3.50e+12 FLOPs (100%)")


def test_what_is_under_way_outlives_who_watches():
    """`shoestring … 2>&1 | head`: a display that nobody reads any more must not end a training."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        try:
            with Progress(3, title="sft", stream=gone, every_s=0) as bar:
                for step in (1, 2, 3):
                    bar.update(step)
            assert bar.quiet
        finally:
            with contextlib.suppress(BrokenPipeError):
                gone.close()
