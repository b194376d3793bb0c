"""Calibration arithmetic on made-up measurements, the page, and the verbs."""

import json
import math
import re
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from shoestring.cli_plan import register
from shoestring.cli_timed import GRID
from shoestring.core.errors import UserError
from shoestring.cost import plan
from shoestring.cost.calibrate import TERMS, Calibration, Exchange, _parts
from shoestring.cost.laws import COUNTS, attention_inside, fit, prices, products_of
from shoestring.cost.page import render
from shoestring.cost.shape import ModelShape


def part_seconds(part, s):
    """A made-up machine: every part takes what its counts cost at these prices, products at 50 GFLOP/s and less."""
    if part == "linear":
        return 1e-5 + 6 * s[0] * s[1] * s[2] / 5e10 + 1e-9 * (s[0] * s[2] + s[0] * s[1])
    if part == "attention":
        return s[0] * s[2] * s[1] * (2e-9 + 5e-11 * (s[3] + s[4]))
    inside = attention_inside(part, s)
    known = sum(n * (part_seconds("linear", (t, o, i)) - (1e-5 if stacked else 0.0))
                for t, o, i, n, stacked in products_of(part, s))  # fmt: skip
    beside = sum(p * c for p, c in zip(PRICES[part], COUNTS[part](*s), strict=True))
    return known + beside + (part_seconds("attention", inside) if inside else 0.0)


PRICES = {
    "gqa": (5e-5, 1e-8, 1e-8, 1e-10), "mla": (5e-5, 1e-8, 1e-8, 1e-8, 1e-10), "ffn": (3e-5, 2e-8, 1e-8, 1e-10),
    "moe": (1e-4, 3e-5, 1e-8, 1e-8, 1e-8, 1e-9), "head": (1e-4, 1e-8, 2e-9, 1e-9), "update": (2e-5, 1.5e-9),
}  # fmt: skip
SAMPLES = tuple(
    (part, tuple(map(float, sizes)), part_seconds(part, sizes)) for part, rows in GRID.items() for sizes in rows
)
BARE = Calibration("a test machine", 1, SAMPLES, 2e10, 16e9)
SHAPES = [
    ModelShape(vocab=v, d_model=d, layers=n, heads=4, ffn=3 * d, n_routed=e, n_active=2 if e else 0, expert_ffn=d // 2,
               dense_layers=1 if e else 0)
    for v, d, n, e in ((256, 64, 2, 0), (512, 128, 4, 0), (1024, 256, 3, 0), (256, 128, 3, 8), (512, 192, 5, 16),
                       (4096, 96, 6, 8))
]  # fmt: skip
TRUE = (1.2, 1.6, 1.3, 0.8, 1.1, 0.9)


def truth(shape, sequences, length):
    return sum(a * t for a, t in zip(TRUE, BARE.terms(shape, sequences, length), strict=True))


def test_laws_give_back_a_machine_that_keeps_them():
    """At sizes that are in no grid, for parts, products and attention; 10% where a law has to guess a shape's rate."""
    laws = fit(SAMPLES)
    for part, sizes in (
        ("linear", (1500, 300, 200)),
        ("linear", (3000, 100, 700)),
        ("attention", (3000, 96, 6, 40, 40)),
    ):
        found = laws.product(*sizes) if part == "linear" else laws.attend(*sizes)
        assert found == pytest.approx(part_seconds(part, sizes), rel=0.02), part
    for part, sizes in (
        ("gqa", (1536, 96, 320, 5, 5, 64)), ("mla", (3072, 192, 160, 5, 0, 40, 32, 16, 32)), ("ffn", (1000, 300, 900)),
        ("moe", (1500, 160, 96, 12, 2, 1)), ("head", (1000, 200, 3000)), ("update", (50, 2e6)),
    ):  # fmt: skip
        inside = attention_inside(part, sizes)
        found = laws.products(part, sizes) + laws.beside(part, sizes) + (laws.attend(*inside) if inside else 0.0)
        assert found == pytest.approx(part_seconds(part, sizes), rel=0.03), part


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_what_a_call_costs_is_told_from_what_its_numbers_cost(noise):
    """In a tiny part the call is nearly all there is: the grid must pin it down though every timing is a little off."""
    off = tuple((p, s, t * (1 + noise * (-1) ** i)) for i, (p, s, t) in enumerate(SAMPLES))
    laws = fit(off)
    for part, sizes in (
        ("gqa", (128, 64, 48, 2, 2, 24)), ("mla", (512, 64, 64, 2, 0, 16, 32, 16, 32)), ("ffn", (128, 96, 256)),
        ("moe", (256, 64, 64, 8, 2, 1)), ("head", (128, 64, 256)), ("update", (75, 4e5)),
    ):  # fmt: skip
        inside = attention_inside(part, sizes)
        found = laws.products(part, sizes) + laws.beside(part, sizes) + (laws.attend(*inside) if inside else 0.0)
        assert found == pytest.approx(part_seconds(part, sizes), rel=0.03 + 2 * noise), part


def test_prices_are_never_negative_and_least_wrong():
    rows = [((1.0, x), 3.0 - 0.1 * x, 1.0) for x in (1.0, 5.0, 9.0)]
    assert prices(rows) == pytest.approx((2.5, 0.0), abs=1e-4)  # the falling line is refused: the mean is what is left
    assert prices([((1.0, x), 2 + 3 * x, 2 + 3 * x) for x in (1.0, 4.0, 9.0)]) == pytest.approx((2.0, 3.0), rel=1e-3)


def test_a_shape_the_library_runs_badly_stays_with_its_neighbours():
    slow = tuple((p, s, t * (2 if p == "linear" and s[1:] == (768, 256) else 1)) for p, s, t in SAMPLES)
    usual, odd = fit(SAMPLES), fit(slow)
    assert odd.product(2048, 700, 256) > 1.15 * usual.product(2048, 700, 256)
    assert odd.product(64, 64, 64) == pytest.approx(usual.product(64, 64, 64), rel=0.1)


def test_counts_of_a_shape_are_those_of_its_modules():
    """One layer's products are the shape's own matrix parameters, once a token."""
    for shape in SHAPES:
        parts = _parts(shape, 1.0, 1, False)
        active = sum(n * k * t * o * i for part, sizes, n in parts for t, o, i, k, _ in products_of(part, sizes))
        assert active == pytest.approx(shape.matmul_params(), rel=1e-9)


def test_fit_predicts_shapes_it_has_not_seen():
    steps = [(s, b, t, truth(s, b, t)) for s, (b, t) in zip(SHAPES, ((16, 64), (8, 128), (4, 256)) * 2, strict=True)]
    fitted = BARE.fitted(steps[:5])
    assert fitted.steps_measured == 5 and all(m > 0 for m in fitted.multipliers)
    shape, b, t, seconds = steps[5]
    assert fitted.step_seconds(shape, b, t) == pytest.approx(seconds, rel=0.10)
    assert abs(fitted.step_seconds(shape, b, t) / seconds - 1) < abs(BARE.step_seconds(shape, b, t) / seconds - 1)


def test_one_step_moves_towards_it_but_not_off():
    shape = SHAPES[1]
    fitted = BARE.fitted([(shape, 8, 128, 2 * BARE.step_seconds(shape, 8, 128))])
    assert 1.3 < fitted.step_seconds(shape, 8, 128) / BARE.step_seconds(shape, 8, 128) <= 2.05
    assert len(fitted.multipliers) == len(TERMS)


def width(calibration):
    answer = plan(SHAPES[1], 1e6, calibration.cluster(), seq_len=128, global_batch=64, calibration=calibration)
    return answer.gpu_hours.high / answer.gpu_hours.low


def test_real_steps_shrink_the_interval():
    sizes = ((16, 64), (8, 128), (4, 256)) * 2
    steps = [(s, b, t, truth(s, b, t)) for s, (b, t) in zip(SHAPES, sizes, strict=True)]
    bare, few, many = width(BARE), width(BARE.fitted(steps[:2])), width(BARE.fitted(steps))
    assert bare == pytest.approx(few) and few > 1.3 and many < 0.9 * bare  # two shapes say nothing about a third
    # a machine whose steps do not follow the model is not narrowed: half of them take half as long again
    noisy = BARE.fitted([(s, b, t, x * (1.5 if i % 2 else 1.0)) for i, (s, b, t, x) in enumerate(steps)])
    assert width(noisy) > bare and max(map(abs, noisy.left_out)) > 0.2
    for i, (shape, b, t, seconds) in enumerate(steps):  # each is predicted by the others alone
        others = BARE.fitted(steps[:i] + steps[i + 1 :])
        assert BARE.fitted(steps).left_out[i] == pytest.approx(math.log(others.step_seconds(shape, b, t) / seconds))


def test_attention_between_lengths_and_beyond_them():
    laws = BARE.laws
    assert laws.attend(2048, 128, 8, 32, 32) == pytest.approx(
        part_seconds("attention", (2048, 128, 8, 32, 32)), rel=0.01
    )
    assert laws.attend(2048, 4096, 8, 32, 32) == pytest.approx(4 * laws.attend(2048, 1024, 8, 32, 32))
    assert laws.attend(2048, 8, 8, 32, 32) == laws.attend(2048, 32, 8, 32, 32)
    longer = [BARE.step_seconds(SHAPES[1], n, t) for n, t in ((64, 32), (16, 128), (4, 512))]
    assert longer == sorted(longer)  # as many tokens, more keys each


POINTS = tuple((float(n), 5e-5 + n / 2e9) for n in (8e3, 6e4, 5e5, 4e6))
PAIR = replace(BARE, devices=2, exchange=Exchange(2, "gloo", POINTS))


def test_messages_follow_the_measured_line():
    first, rate = PAIR.exchange.line()
    assert first == pytest.approx(5e-5, rel=1e-6) and rate == pytest.approx(2e9, rel=1e-6)
    assert PAIR.exchange.seconds(1e6) == pytest.approx(5e-5 + 5e-4)
    with pytest.raises(UserError, match="not measured"):
        BARE.exchange.line()


def test_plan_over_the_measured_devices_pays_its_messages():
    """Two devices halve the work and add gradients; experts spread out trade gradients for tokens."""
    shape = SHAPES[1]
    one, two = (PAIR.found(shape, 128, 64, n) for n in (1, 2))
    assert two.layout.dp == 2 and two.step.phases["gradients"] == pytest.approx(
        2 * PAIR.exchange.seconds(4 * shape.params().total / 2)
    )
    assert two.step.phases["products"] == pytest.approx(one.step.phases["products"] / 2, rel=0.05)
    assert two.step.tokens == pytest.approx(one.step.tokens)
    moe = SHAPES[4].with_(expert_ffn=2048)  # large experts and few tokens: their gradients cost more than the tokens
    wide = PAIR.found(moe, 128, 2, 2)
    assert wide.layout.ep == 2 and wide.step.phases["all-to-all"] > 0
    sent = 128 * moe.n_active * moe.d_model * 4 / 2
    assert wide.step.phases["all-to-all"] == pytest.approx(4 * moe.moe_layers * PAIR.exchange.seconds(sent))
    assert PAIR.found(SHAPES[3], 512, 64, 2).layout.ep == 1  # small experts, many tokens
    answer = plan(shape, 1e6, PAIR.cluster(2), seq_len=128, global_batch=64, calibration=PAIR)
    assert answer.gpu_hours.mid == pytest.approx(1e6 / two.step.tokens * two.step.seconds * 2 / 3600)
    with pytest.raises(UserError, match="2 of this machine compute at once"):
        PAIR.found(shape, 128, 64, 3)
    with pytest.raises(UserError, match="nobody to exchange with"):
        replace(BARE, devices=2).found(shape, 128, 64, 2)


def test_file_round_trip(tmp_path):
    path = tmp_path / "c.json"
    fitted = BARE.fitted([(s, 8, 64, truth(s, 8, 64)) for s in SHAPES])
    assert fitted.left_out and "left out of the fit, each was missed by" in fitted.text()
    for made in (fitted, PAIR):
        made.save(path)
        assert Calibration.load(path) == made
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 9'))
    with pytest.raises(UserError, match="schema 9"):
        Calibration.load(path)
    cut = fitted.to_dict() | {"multipliers": [1.0]}
    for text in ("[]", "{", json.dumps(cut), json.dumps({k: v for k, v in cut.items() if k != "exchange"})):
        path.write_text(text)
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
    assert html.count("<svg") == html.count('<div class="wide"><svg') == html.count("</svg></div>") > 3  # for phones
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
    assert isinstance(verb(*words).exception, UserError)


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
