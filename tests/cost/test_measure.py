"""`plan calibrate` on this machine for real, at a size that takes seconds."""

import json
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from shoestring import cli_exchange, cli_measure, cli_timed
from shoestring.cli_plan import register
from shoestring.core.errors import UserError
from shoestring.cost.calibrate import TERMS, Calibration
from shoestring.cost.laws import SIZES, attention_inside, fit
from shoestring.nn.kernels import Kernels

SMALL = (
    ("dense", 64, 1, 2, 128, 0, 128, 4, 32), ("dense", 96, 2, 3, 256, 0, 128, 4, 64),
    ("moe", 64, 2, 2, 128, 4, 128, 4, 32), ("dense", 64, 3, 2, 192, 0, 256, 8, 32),
)  # fmt: skip
GRID = {
    "linear": ((128, 64, 64), (256, 192, 64), (256, 64, 192)),
    "attention": ((256, 32, 2, 16, 16), (256, 64, 2, 32, 16)),
    "gqa": ((128, 32, 64, 2, 1, 32), (256, 64, 96, 3, 3, 32)), "mla": ((128, 32, 64, 2, 16, 16, 16, 8, 16),),
    "ffn": ((128, 64, 128),), "moe": ((128, 64, 32, 4, 2, 1),), "head": ((128, 64, 256),), "update": ((10, 50_000),),
}  # fmt: skip
REAL, BANDWIDTH, SAMPLES = cli_measure.real_steps, cli_measure.bandwidth, cli_timed.samples


@pytest.fixture
def small(monkeypatch):
    """Few and small measurements; everything else is what a user runs."""
    monkeypatch.setattr(cli_measure, "samples", lambda bench, rounds=2: SAMPLES(bench, GRID, rounds))
    monkeypatch.setattr(cli_measure, "real_steps", lambda bench, cases, rounds: REAL(bench, SMALL, rounds))
    monkeypatch.setattr(cli_measure, "bandwidth", lambda device: BANDWIDTH(device, 1_000_000))
    monkeypatch.setattr(cli_measure, "measure_exchange", lambda device, n: EXCHANGE(device, n, (1 << 12, 1 << 16)))


EXCHANGE = cli_exchange.measure_exchange


@pytest.mark.slow
def test_the_verb_measures_and_its_file_plans(small, tmp_path):
    app = typer.Typer()
    register(app)
    bare, full = tmp_path / "bare.json", tmp_path / "full.json"
    for out, more in ((bare, ["--no-steps", "--no-messages"]), (full, [])):
        done = CliRunner().invoke(app, ["plan", "calibrate", "--threads", "1", "--out", str(out), "--json", *more])
        assert done.exit_code == 0, done.output
    first, second = Calibration.load(bare), Calibration.load(full)
    assert (first.steps_measured, second.steps_measured) == (0, 4) and len(second.left_out) == 4
    assert first.multipliers == (1.0,) * len(TERMS) != second.multipliers
    assert all(seconds > 0 for _, _, seconds in second.samples) and 1e8 < second.bandwidth < 1e13
    assert "left out" in first.exchange.text() and second.exchange.line()[1] > 1e6

    model = cli_measure.step_model(*SMALL[1][:7])
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "vocab_size": 128, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "intermediate_size": 256,
    }))  # fmt: skip
    words = ["plan", str(config), "--tokens", "1M", "--seq-len", "64", "--batch", "4", "--calibration", str(full)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    assert planned["params"] == sum(p.numel() for p in model.parameters())
    taken = cli_measure.step_seconds(model, 4, 64)
    assert planned["step_s"] == pytest.approx(taken, rel=2.0), sys.platform  # same machine, same minute; neighbours too
    too_many = CliRunner().invoke(app, [*words, "--on", "4096"])
    assert isinstance(too_many.exception, UserError) and "compute at once" in str(too_many.exception)


def test_parts_and_steps_are_measured_in_the_same_minutes(monkeypatch):
    """In turn, and the least of each: else a slow minute makes all parts slower than the steps they make up."""
    told = []
    times = iter([5.0, 50.0, 4.0, 60.0])

    def parts(bench, rounds):
        told.append(("parts", rounds))
        return (("linear", (1.0, 2.0, 3.0), next(times)),)

    def steps(bench, cases, rounds):
        told.append(("steps", rounds))
        return [("a shape", 4, 32, next(times))]

    monkeypatch.setattr(cli_measure, "samples", parts)
    monkeypatch.setattr(cli_measure, "real_steps", steps)
    found = cli_measure.in_rounds(None, SMALL, 2)
    assert told == [("parts", 1), ("steps", 1)] * 2
    assert found == ((("linear", (1.0, 2.0, 3.0), 4.0),), [("a shape", 4, 32, 50.0)])


def test_every_part_is_timed_in_the_order_of_its_sizes():
    """Each size is where `laws.SIZES` says: a part twice as large in all that costs takes longer."""
    bench = cli_timed.Bench("cpu", Kernels(), repeats=1)
    for part, rows in GRID.items():
        assert all(len(sizes) == len(SIZES[part]) for sizes in (*rows, *cli_timed.GRID[part])), part
        assert 0 < getattr(bench, part)(*rows[0]) < 5.0, part
    assert bench.ffn(2048, 256, 512) > 2 * bench.ffn(256, 64, 64)


def test_laws_of_this_machine_follow_what_was_measured():
    """A whole part is its products, its attention and the rest: the fit gives the measured seconds back, about."""
    rows = GRID | {"ffn": ((512, 64, 128), (1024, 128, 256), (512, 128, 512), (2048, 64, 256))}
    bench = cli_timed.Bench("cpu", Kernels(), repeats=2)
    measured = SAMPLES(bench, {k: rows[k] for k in ("linear", "attention", "ffn")})
    laws = fit(measured)
    for part, sizes, seconds in measured:
        if part == "ffn":
            assert attention_inside(part, sizes) is None
            assert laws.products(part, sizes) + laws.beside(part, sizes) == pytest.approx(seconds, rel=0.6)


def test_messages_between_processes_of_this_cpu():
    found = EXCHANGE("cpu", 2, (1 << 12, 1 << 20))
    assert found.devices == 2 and found.by == "gloo" and [size for size, _ in found.measured] == [2048, 524288]
    assert all(0 < seconds < 60 for _, seconds in found.measured)
    assert "all-to-all of 2 by gloo" in found.text()


def test_one_gpu_has_nobody_to_exchange_with(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    found = EXCHANGE("cuda")
    assert not found.measured and "one device" in found.text()
    with pytest.raises(UserError, match="one device"):
        found.line()


def test_several_gpus_are_asked_by_nccl(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(cli_exchange, "_run", lambda *args: asked.append(args))
    EXCHANGE("cuda")
    assert asked == [("nccl", "cuda", 8, cli_exchange.SIZES)]


def test_the_slowest_process_counts(tmp_path):
    for rank, times in enumerate(("0.1 0.5", "0.2 0.4")):
        (tmp_path / f"meet.{rank}").write_text(times)
    assert cli_exchange.read(tmp_path / "meet", 2, (100, 200)) == ((50.0, 0.2), (100.0, 0.5))


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="does not find"):
        cli_measure.make_bench("cuda")


def test_a_step_is_training_s_own_with_all_its_parts():
    """A wider model takes longer, and the model has really moved; what is timed is train_step."""
    small, wide = (cli_measure.step_model("dense", d, 2, 4, 4 * d, 0, 128) for d in (64, 512))
    before = small.head_weight.detach().clone()
    seconds = [cli_measure.step_seconds(m, 4, 32, repeats=3) for m in (small, wide)]
    assert 0 < seconds[0] < seconds[1] and not before.equal(small.head_weight)
    stats = cli_measure.training_step(cli_measure.step_model("moe", 64, 2, 2, 128, 4, 128), 2, 16)()
    assert stats.tokens == 32 and "max_violation" in stats.metrics and "balance" in stats.metrics
