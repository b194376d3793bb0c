"""Calibration arithmetic on made-up measurements, the page, and the verbs."""

import json
import math
import re

import pytest
import typer
from typer.testing import CliRunner

from shoestring.cli_plan import register
from shoestring.core.errors import UserError
from shoestring.cost import plan
from shoestring.cost.calibrate import TERMS, Calibration
from shoestring.cost.page import render
from shoestring.cost.shape import ModelShape

RATES = tuple((float(m), float(n), float(k), 1e9 * (40 + min(m, n, k) / 50)) for m in (256, 2048) for n in (64, 512)
              for k in (64, 512))  # fmt: skip
BARE = Calibration("a test machine", 1, RATES, ((64.0, 1e10, 8e9), (256.0, 2e10, 1.5e10)), 2e10, 3e-6, 16e9)
SHAPES = [
    ModelShape(vocab=v, d_model=d, layers=n, heads=4, ffn=3 * d, n_routed=e, n_active=2 if e else 0, expert_ffn=d // 2,
               dense_layers=1 if e else 0)
    for v, d, n, e in ((256, 64, 2, 0), (512, 128, 4, 0), (1024, 256, 3, 0), (256, 128, 3, 8), (512, 192, 5, 16),
                       (4096, 96, 6, 8))
]  # fmt: skip
TRUE = (1.4, 2.0, 1.5, 0.8, 1.1)


def truth(shape, sequences, length):
    return sum(a * t for a, t in zip(TRUE, BARE.terms(shape, sequences, length), strict=True))


def test_fit_predicts_shapes_it_has_not_seen():
    steps = [(s, b, t, truth(s, b, t)) for s, (b, t) in zip(SHAPES, ((16, 64), (8, 128), (4, 256)) * 2, strict=True)]
    fitted = BARE.fitted(steps[:5])
    assert fitted.steps_measured == 5 and all(m > 0 for m in fitted.multipliers)
    shape, b, t, seconds = steps[5]
    assert fitted.step_seconds(shape, b, t) == pytest.approx(seconds, rel=0.15)
    assert abs(fitted.step_seconds(shape, b, t) / seconds - 1) < abs(BARE.step_seconds(shape, b, t) / seconds - 1)


def test_one_step_moves_towards_it_but_not_off():
    shape = SHAPES[1]
    fitted = BARE.fitted([(shape, 8, 128, 3 * BARE.step_seconds(shape, 8, 128))])
    assert 1.5 < fitted.step_seconds(shape, 8, 128) / BARE.step_seconds(shape, 8, 128) <= 3.05
    assert len(fitted.multipliers) == len(TERMS)


def width(calibration):
    answer = plan(SHAPES[1], 1e6, calibration.cluster(), seq_len=128, global_batch=64, calibration=calibration)
    return answer.gpu_hours.high / answer.gpu_hours.low


def test_real_steps_shrink_the_interval():
    sizes = ((16, 64), (8, 128), (4, 256)) * 2
    steps = [(s, b, t, truth(s, b, t)) for s, (b, t) in zip(SHAPES, sizes, strict=True)]
    bare, few, many = width(BARE), width(BARE.fitted(steps[:2])), width(BARE.fitted(steps))
    assert bare == few > 1.3 and many < 0.9 * bare  # two shapes say nothing about a third
    # a machine whose steps do not follow the model is not narrowed: half of them take half as long again
    noisy = BARE.fitted([(s, b, t, x * (1.5 if i % 2 else 1.0)) for i, (s, b, t, x) in enumerate(steps)])
    assert width(noisy) > bare and max(map(abs, noisy.left_out)) > 0.2
    for i, (shape, b, t, seconds) in enumerate(steps):  # each is predicted by the others alone
        others = BARE.fitted(steps[:i] + steps[i + 1 :])
        assert BARE.fitted(steps).left_out[i] == pytest.approx(math.log(others.step_seconds(shape, b, t) / seconds))


def test_rates_interpolate():
    assert min(r[3] for r in RATES) <= BARE.gemm_rate(700, 200, 200) <= max(r[3] for r in RATES)
    assert BARE.attention_rates(64) == (1e10, 8e9) and BARE.attention_rates(4096) == (2e10, 1.5e10)
    assert BARE.attention_rates(128)[0] == pytest.approx((1e10 * 2e10) ** 0.5)
    assert BARE.terms(SHAPES[0], 8, 64)[0] * 2 == pytest.approx(BARE.terms(SHAPES[0], 16, 64)[0], rel=0.3)


def test_file_round_trip(tmp_path):
    path = tmp_path / "c.json"
    fitted = BARE.fitted([(s, 8, 64, truth(s, 8, 64)) for s in SHAPES])
    assert fitted.left_out and "left out of the fit, each was missed by" in fitted.text()
    fitted.save(path)
    assert Calibration.load(path) == fitted
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(UserError, match="schema 9"):
        Calibration.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="no calibration file"):
        Calibration.load(path)


def test_plan_on_a_measured_machine():
    fitted = BARE.fitted([(SHAPES[0], 8, 64, 0.1)])
    answer = plan(SHAPES[1], 1e6, fitted.cluster(), seq_len=128, global_batch=64, calibration=fitted)
    assert answer.gpu_hours.mid == pytest.approx(1e6 / answer.step.tokens * answer.step.seconds / 3600)
    assert answer.gpu_hours.high / answer.gpu_hours.low < 1.5  # narrower than an unmeasured chip
    big = plan("llama-3.2-1b", 1e9, "8xH100")
    assert big.gpu_hours.high / big.gpu_hours.low > 1.5
    with pytest.raises(UserError, match="largest term"):
        plan("llama-3.1-70b", 1e9, fitted.cluster(), global_batch=8, calibration=fitted)


def test_page_is_whole_and_alone():
    html = render(plan("llama-3.1-8b", 1e12, "64xH100", frontier=True))
    for words in ("The bill", "What moves it", "Pipeline", "Memory of the fullest chip", "Dollars against days",
                  "Among published runs", "What if", "Every constant"):  # fmt: skip
        assert words in html
    assert not re.search(r"(src|href)\s*=|@import|url\(", html)
    assert not re.search(r"[\">, ]nan[\"<, ]", html)
    assert "<script>" not in render(plan(SHAPES[0], 1e9, "H100", global_batch=64)).split("What if")[0]


@pytest.fixture
def verb():
    app = typer.Typer()
    register(app)

    def run(*words):
        return CliRunner().invoke(app, list(words))

    return run


def test_plan_verb(verb, tmp_path):
    done = verb("plan", "llama-3.2-1b", "--tokens", "100B", "--on", "8xH100", "--json", "--usd-per-hour", "2")
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["usd"]["mid"] == pytest.approx(2 * document["gpu_hours"]["mid"])
    report = tmp_path / "r.html"
    text = verb("plan", "llama-3.2-1b", "--tokens", "100B", "--on", "8xH100", "--bill", "--report", str(report))
    assert text.exit_code == 0 and "everything" in text.stdout and report.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "llama-9", "--tokens", "1T", "--on", "8xH100"),
        ("plan", "llama-3.2-1b", "--tokens", "1T", "--on", "8xH1000"),
        ("plan", "llama-3.2-1b", "--tokens", "-1", "--on", "8xH100"),
        ("plan", "llama-3.2-1b", "--tokens", "1T", "--on", "8xA100", "--rule", "2024-01-01:China"),
        ("plan", "llama-3.2-1b", "--tokens", "1T", "--on", "8xH100", "--deadline", "1d"),
        ("plan", "llama-3.2-1b", "--tokens", "1T", "--on", "8xH100", "--layout", "pp=3"),
        ("plan", "table", "nowhere.csv"),
        ("plan", "stage", "fst", "llama-3.2-1b", "--tokens", "1B"),
        ("plan", "stage", "rl", "llama-3.2-1b"),
        ("plan", "ask", "gpt-17"),
        ("check", ""),
        ("check", "cheap"),
    ],
)
def test_mistakes_exit_with_two(verb, words):
    done = verb(*words)
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_check_verb(verb):
    done = verb("check", "2048 H800, 2.788M hours, $5.576M, 14.8T tokens, deepseek-v3", "--json")
    document = json.loads(done.stdout)
    assert (
        done.exit_code == 0
        and document["consistent"] is True
        and document["implies"]["days"] == pytest.approx(56.7, abs=0.1)
    )


def test_stage_and_ask_verbs(verb):
    distilled = json.loads(
        verb("plan", "stage", "distill", "qwen2.5-7b", "--tokens", "4.3B", "--epochs", "2.5", "--json").stdout
    )
    assert 300 < distilled["gpu_hours"]["mid"] < 600 and distilled["usd"]["low"] < distilled["usd"]["mid"]
    words = ("plan", "ask", "deepseek-reasoner (R1)", "--questions", "1M", "--tokens-out", "5355", "--json")
    assert json.loads(verb(*words).stdout)["api_usd"] == pytest.approx(11837, abs=1)
    for kind, more in (
        ("rl", ("--samples", "1M")),
        ("logits", ("--tokens", "1B", "--teacher", "qwen2.5-7b")),
        ("generate", ("--samples", "1M")),
        ("eval", ("--samples", "13K")),
    ):
        assert verb("plan", "stage", kind, "qwen2.5-1.5b", *more).exit_code == 0
