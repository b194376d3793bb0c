"""`plan calibrate` on this machine for real, at a size that takes seconds."""

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from shoestring import cli_measure
from shoestring.cli_plan import register
from shoestring.cost.calibrate import Calibration

SMALL = (
    ("dense", 64, 1, 2, 128, 0, 128, 4, 32), ("dense", 96, 2, 3, 256, 0, 128, 4, 64),
    ("moe", 64, 2, 2, 128, 4, 128, 4, 32), ("dense", 64, 3, 2, 192, 0, 256, 8, 32),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Few and small measurements; everything else is what a user runs."""
    monkeypatch.setattr(cli_measure, "SIDES", ((256, 64, 64), (256, 192, 64), (256, 64, 192)))
    monkeypatch.setattr(cli_measure, "real_steps", lambda: REAL(SMALL))
    monkeypatch.setattr(cli_measure, "attention_rates", lambda length: ATTENTION(length, heads=2, tokens=256))
    monkeypatch.setattr(cli_measure, "bandwidth", lambda: BANDWIDTH(1_000_000))


REAL, BANDWIDTH, ATTENTION = cli_measure.real_steps, cli_measure.bandwidth, cli_measure.attention_rates


@pytest.mark.slow
def test_the_verb_measures_and_its_file_plans(small, tmp_path):
    app = typer.Typer()
    register(app)
    bare, full = tmp_path / "bare.json", tmp_path / "full.json"
    for out, more in ((bare, ["--no-steps"]), (full, [])):
        done = CliRunner().invoke(app, ["plan", "calibrate", "--threads", "1", "--out", str(out), "--json", *more])
        assert done.exit_code == 0, done.output
    first, second = Calibration.load(bare), Calibration.load(full)
    assert (first.steps_measured, second.steps_measured) == (0, 4) and len(second.left_out) == 4
    assert first.multipliers == (1.0,) * 5 != second.multipliers
    assert all(0 < rate < 1e14 for *_, rate in second.gemms) and 1e8 < second.bandwidth < 1e13

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


def test_a_step_is_timed_with_all_its_parts():
    """A wider model takes longer, and the model has really moved."""
    small, wide = (cli_measure.step_model("dense", d, 2, 4, 4 * d, 0, 128) for d in (64, 512))
    before = small.head_weight.detach().clone()
    seconds = [cli_measure.step_seconds(m, 4, 32, repeats=3) for m in (small, wide)]
    assert 0 < seconds[0] < seconds[1] and not before.equal(small.head_weight)
