"""docs/plan-validation.md: the planner against what was published, made by one command.

DeepSeek-V3 stands in four labelled rows. Row 1 uses kernel times of DeepSeek's own trace (deepseek-ai/profile-data:
one pair of four MoE layers) and formulas, no published phase of the step. Rows 2 and 3 use published phases, so they
show arithmetic and no foresight. Nothing in this file is used by any plan.
"""

# ruff: noqa: E501 (lines of the page it writes)
from __future__ import annotations

from collections.abc import Sequence
from math import log

from shoestring.cost.chips import Cluster, find_chip
from shoestring.cost.models import named_shape
from shoestring.cost.pipeline import bubble, dualpipe_calls
from shoestring.cost.plan import plan
from shoestring.cost.prices import USUAL_LENGTHS, all_prices, ask_usd, self_host_usd
from shoestring.cost.residual import FITTED_CONSTANTS, NAMES, SD_STEADY, SD_WHOLE, Interval
from shoestring.cost.search import search
from shoestring.cost.serving import PREFILL_MFU, decode_step, prefill_rate
from shoestring.cost.stages import StageCost, context_extension, generation, reinforcement
from shoestring.cost.table import (
    Case,
    class_method,
    constant_method,
    leave_one_out,
    read_cases,
    relative_error,
    residual_without,
    shipped_cases,
    summary,
)
from shoestring.cost.tables import shipped_rows
from shoestring.cost.units import show, usd

TOKENS, STEP_TOKENS, CHIPS, PUBLISHED = 14.8e12, 15360 * 4096, 2048, 2_664_000
PHASES = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}  # arXiv 2505.09343 T4
TRACE_PAIR = 0.1290  # seconds, measured span of the trace
DENSE, GROUPED, WGRAD, ATTN_F, ATTN_B, SMALL = 8.9e-3, 11.46e-3, 32.76e-3, 4.95e-3, 15.12e-3, 35e-3  # trace kernels
LENT = 112 / 132  # share of cores left to arithmetic while messages run


def hours_of(step: float) -> float:
    """Chip-hours of the whole pretraining at `step` seconds an optimizer step."""
    return CHIPS * step / 3600 / STEP_TOKENS * TOKENS


def trace_step(pair_factor: float = 1.0, bubble_factor: float = 1.0) -> dict[str, float]:
    """Phases from the trace's kernels, the all-to-all formula and the bubble formula; no published phase."""
    exchange = 4 * (2.06e-3 + 4.11e-3)  # four layers' dispatch and combine at 50 GB/s
    F = (DENSE + GROUPED + ATTN_F + SMALL / 3) * LENT + exchange
    B = (DENSE + 1.0e-3 + GROUPED + WGRAD + ATTN_B + 2 * SMALL / 3) * LENT + exchange
    W = (WGRAD + 5e-3) * LENT + 3e-3
    calls = dualpipe_calls(16, 120)
    return {
        "1F": pair_factor * calls.forward * F,
        "1B": pair_factor * (calls.backward_full + calls.backward_input) * B,
        "1F1B": pair_factor * calls.pairs * TRACE_PAIR,
        "bubble": bubble_factor * bubble("dualpipe", 16, F, B, W, TRACE_PAIR),
        "optimizer": 0.34,  # 17.2 GB of sharded gradients and weights at 50 GB/s
    }


def v3_rows() -> list[tuple[str, float, str]]:
    """(label, hours, what it shows)."""
    scaled = (sum(PHASES.values()) - PHASES["optimizer"]) * TRACE_PAIR / 0.1388 + PHASES["optimizer"]
    flops = named_shape("deepseek-v3").flops_per_token(4096)
    given = flops * TOKENS / (0.3894 * 989.4e12) / 3600
    return [
        ("1. trace kernels and formulas, no published phase", hours_of(sum(trace_step().values())), "prediction"),
        ("2. trace pair scaled through the published phase ratios", hours_of(scaled), "partly circular"),
        (
            "3. row 1 with the two constants 1.076 and 2.1",
            hours_of(sum(trace_step(1.076, 2.1).values())),
            "*fitted, no evidence*",
        ),
        ("4. utilisation of 38.94% given", given, "*identity*"),
    ]


def _v3() -> list[str]:
    shape, cluster = named_shape("deepseek-v3"), Cluster(find_chip("H800"), CHIPS)
    layout = {"pp": 16, "ep": 64, "dp": 128, "tp": 1, "schedule": "dualpipe"}
    own = plan("deepseek-v3", TOKENS, cluster, precision="fp8", layout=layout, global_batch=15360, usd_per_hour=2.0)
    best = search(shape, cluster, 4096, 15360, fixed={"precision": "fp8"}, keep=3)
    out = ["## DeepSeek-V3 pretraining", "", "| row | chip-hours | error | shows |", "|---|---|---|---|"]
    for label, hours, shows in v3_rows():
        out.append(f"| {label} | {show(hours, 4)} | {hours / PUBLISHED - 1:+.1%} | {shows} |")
    steady = own.steady_hours
    out += [
        f"| the planner's step model on the published layout, no residual | {show(steady, 4)} | {steady / PUBLISHED - 1:+.1%} | "
        "prediction from generic shares of peak |",
        f"| the planner's answer, residual of other runs included | {show(own.gpu_hours.mid, 4)} "
        f"(80%: {show(own.gpu_hours.low)} to {show(own.gpu_hours.high)}) | {own.gpu_hours.mid / PUBLISHED - 1:+.1%} | prediction |",
        "", "Published: 2.664M. The published hours are a measured rate times tokens, without restarts; the planner's answer "
        "adds what other runs lost to them.", "",
        "One step, seconds:", "", "| phase | published | trace (row 1) | planner |", "|---|---|---|---|",
    ]  # fmt: skip
    trace, mine = trace_step(), dict(own.step.phases)
    mine["optimizer"] = mine.pop("optimizer", 0.0) + mine.pop("gradient exchange", 0.0)
    for phase in PHASES:
        out.append(f"| {phase} | {PHASES[phase]:.2f} | {trace.get(phase, 0.0):.2f} | {mine.get(phase, 0.0):.2f} |")
    out += [f"| sum | {sum(PHASES.values()):.2f} | {sum(trace.values()):.2f} | {own.step.seconds:.2f} |", "",
            "The planner's memory on that layout: " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in own.memory.items())
            + f" GB; together {sum(own.memory.values()) / 1e9:.1f} of 80.", "",
            f"The search finds {best[0].layout.short()} at {best[0].step.seconds:.2f} s against "
            f"{own.step.seconds:.2f} s for PP16 EP64 DP128, in {sum(best[0].memory.values()) / 1e9:.1f} GB: "
            + _why(best[0].step.phases, own.step.phases)]  # fmt: skip
    return out


def _why(best: dict[str, float], published: dict[str, float]) -> str:
    gains = {k: published.get(k, 0.0) - best.get(k, 0.0) for k in {*best, *published}}
    top = max(gains, key=lambda k: gains[k])
    return (f"most of the difference is in {top} ({gains[top]:+.2f} s): tokens cross to fewer nodes, at the price of more "
            "expert weights a rank. DeepSeek's choice leaves more memory free.")  # fmt: skip


def _extension() -> list[str]:
    cost = context_extension(named_shape("deepseek-v3"), Cluster(find_chip("H800"), CHIPS))
    hours = PUBLISHED + 119_000 + 5_000
    return [
        "", "## Context extension and the total", "",
        f"Two phases of 1,000 steps (32K x 1,920 and 128K x 480): {_span(cost.hours)} predicted, 119K published "
        f"({cost.hours.mid / 119_000 - 1:+.0%}). " + "; ".join(cost.assumed) + ".", "",
        f"Accounted for: 2,664K + 119K + 5K = {hours / 1000:,.0f}K hours, x $2 = {usd(hours * 2)} (published 2,788K, $5.576M).",
    ]  # fmt: skip


def _span(value: Interval) -> str:
    return f"{show(value.mid)} h (80%: {show(value.low)} to {show(value.high)})"


def r1_stages() -> list[tuple[StageCost, float]]:
    """(predicted, published hours) of R1's three stages, with DeepSeek's published serving speed."""
    shape, chip = named_shape("deepseek-r1"), find_chip("H800")
    zero = reinforcement(shape, chip, 10_400 * 32 * 16, 8000, decode=1850, length_factor=2.0)
    data = generation(shape, chip, 804_745, 5355, acceptance=0.25, decode=1850)
    second = reinforcement(shape, chip, 4_000 * 32 * 16, 8000, decode=1850, length_factor=2.5)
    return [(zero, 101_376), (data, 5_000), (second, 40_960)]


def _r1() -> list[str]:
    names = ("R1-Zero: 10,400 steps x 32 x 16 rollouts", "SFT data: 804,745 kept samples, a quarter kept (guess)",
             "R1: 4,000 steps x 32 x 16 rollouts (steps unpublished: a guess)")  # fmt: skip
    out = [
        "",
        "## R1: 147K hours, $294K",
        "",
        "| stage | published | predicted, 80% | inside | assumed |",
        "|---|---|---|---|---|",
    ]
    mid = 0.0
    for name, (cost, truth) in zip(names, r1_stages(), strict=True):
        inside = "yes" if cost.hours.low <= truth <= cost.hours.high else "no"
        mid += cost.hours.mid
        out.append(f"| {name} | {show(truth)} | {_span(cost.hours)} | {inside} | {'; '.join(cost.assumed)} |")
    return [*out, "", f"Together {show(mid)} h and {usd(mid * 2)} at $2, against 147K h and $294K. The mean length of the "
                  "rollouts is published as a figure only: 8,000 tokens is a guess, and the widest term."]  # fmt: skip


def serving_rows() -> list[tuple[str, float, float, str]]:
    """(service, published, roofline in tokens/s a chip, what the share of it says)."""
    shape, h800, h100 = named_shape("deepseek-v3"), find_chip("H800"), find_chip("H100")
    live, bench = decode_step(shape, h800, 88, 4989, chips=144), decode_step(shape, h100, 256, 2050, chips=72)
    alone = f"without messages {live.batch / live.work:,.0f}"
    return [
        ("DeepSeek, decode over a day, 144 H800", 1850, live.tokens_per_second, f"the default share is from here; {alone}"),
        ("SGLang, decode in a benchmark, 72 H100, batch 256 (assumed)", 22_300 / 8, bench.tokens_per_second,
         f"not used; without messages {bench.batch / bench.work:,.0f}"),
        ("DeepSeek, prefill over a day, 32 H800, cached tokens taken off", 73_700 / 8 * (1 - 0.563),
         prefill_rate(shape, h800, 4096, chips=32), f"{PREFILL_MFU:.0%} of peak, an estimate made before"),
        ("SGLang, prefill in a benchmark, 32 H100", 52_300 / 8, prefill_rate(shape, h100, 2000, chips=32), "the same"),
    ]  # fmt: skip


def _serving() -> list[str]:
    out = ["", "## Serving DeepSeek-V3, tokens/s a chip", "",
           "Sources: deepseek-ai/open-infra-index, day 6; lmsys.org, 5 May 2025. Roofline: work and the experts' messages, two "
           "micro-batches in turn.", "",
           "| service | published | roofline | share | |", "|---|---|---|---|---|"]  # fmt: skip
    for name, truth, limit, note in serving_rows():
        out.append(f"| {name} | {truth:,.0f} | {limit:,.0f} | {truth / limit:.0%} | {note} |")
    return out


def _questions() -> list[str]:
    lengths = " | ".join(f"{a}+{b}" for a, b in USUAL_LENGTHS)
    out = ["", "## A million questions, dollars", "", f"| teacher | {lengths} |", "|---|" + "---|" * len(USUAL_LENGTHS)]
    for price in all_prices():
        if price.provider != "self-host":
            cells = " | ".join(f"{ask_usd(price, 1e6, a, b):,.0f}" for a, b in USUAL_LENGTHS)
            out.append(f"| {price.label} | {cells} |")
    own = " | ".join(f"{self_host_usd(1e6, a, b):,.0f}" for a, b in USUAL_LENGTHS)
    return [*out, f"| self-hosted V3 or R1 on 8 H800 at $16 | {own} |"]


METHODS = (
    ("the planner, row left out", leave_one_out),
    ("class median", class_method),
    ("utilisation 0.375", constant_method),
)


def _score_lines(name: str, cases: Sequence[Case]) -> list[str]:
    truths = [c.run.truth or 0.0 for c in cases]
    out = []
    for method, predict in METHODS:
        s = summary(predict(cases), truths)
        out.append(f"| {name} | {method} | {s['n']} | {s['median_error']:.1%} | {s['max_error']:.0%} | {s['coverage']:.0%} | "
                   f"{s['coverage_p']:.2f} | {s['winkler']:.2f} |")  # fmt: skip
    strict = summary(leave_one_out(cases, by_study=True), truths)
    out.append(f"| {name} | the planner, whole study left out | {strict['n']} | {strict['median_error']:.1%} | "
               f"{strict['max_error']:.0%} | {strict['coverage']:.0%} | {strict['coverage_p']:.2f} | {strict['winkler']:.2f} |")  # fmt: skip
    return out


def _scores() -> list[str]:
    cases = shipped_cases()
    held, _ = read_cases(shipped_rows("holdout_runs"))
    groups = (
        ("whole runs", [c for c in cases if c.run.quantity == "gpu_hours"]),
        ("rates with known layout", [c for c in cases if c.run.layout_known and c.run.steady]),
        ("all with known layout", [c for c in cases if c.run.layout_known]),
        ("all rows", list(cases)),
        ("outside the table: runs", [c for c in held if not c.run.steady]),
        ("outside the table: rates", [c for c in held if c.run.steady]),
        ("outside the table: known layout", [c for c in held if c.run.layout_known]),
    )
    out = ["", "## Published runs, each predicted with its row left out of the fit", "",
           "| rows | method | n | median error | worst | inside 80% | p | Winkler |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, group in groups:
        out += _score_lines(name, group)
    fitted = residual_without()
    constants = ", ".join(f"{n} {m:+.3f}" for n, m in zip(NAMES, fitted.mean, strict=True))
    out += ["", f"Fitted constants: {FITTED_CONSTANTS} ({constants}; logs of time), each with a prior, on {fitted.rows} rows without "
            f"DeepSeek-V3; spreads set beforehand: {SD_WHOLE} for whole runs, {SD_STEADY} for rates. `half` and `optimism` were "
            "chosen after looking at the misses of this table: eleven sets of constants or priors were compared, by their scores "
            "here and outside. Also decided with these scores in sight: weighing rows by study, averaging over an unknown "
            "recomputation, and the rule for an unknown batch (which moved whole runs from 14.9% to 13.8%; four plain "
            "constants without `half` and `optimism` gave 19.0%). The outside rows showed two mistakes in reading "
            "recomputation, mended since. Later, with all misses in sight: a stated pipeline without a named schedule is 1F1B; hours that "
            "are a rate times tokens carry no `whole`; attention windows, micro-batch, ZeRO stage and zero bubble are read; Hopper's share in "
            "products is from a measured table; uneven stages are played; sequences from 32K on may be split. Together these took rows with "
            "known layout from 12.0% to 8.1% and whole runs from 13.8% to 8.5%, but outside runs from 10.6% to 11.3% and outside rates from "
            "5.6% to 7.1%: most of the gain is how hours are counted, and the outside rows show no other. So the left-out-row errors are optimistic by an unknown amount, and the outside rows "
            "are fitted to nothing but were not unseen. p: exact two-sided binomial test of the coverage. Winkler: interval score of the log, lower "
            "is better."]  # fmt: skip
    return out


def _rows(title: str, cases: Sequence[Case]) -> list[str]:
    out = [
        "",
        f"## {title}",
        "",
        "| run | quantity | published | predicted (80%) | error | inside | guessed |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, answer in zip(cases, leave_one_out(cases), strict=True):
        truth = case.run.truth or 0.0
        inside = "yes" if answer.low <= truth <= answer.high else "**no**"
        out.append(f"| {case.run.id} | {case.run.quantity} | {show(truth)} | {show(answer.mid)} ({show(answer.low)} to "
                   f"{show(answer.high)}) | {relative_error(answer, truth):+.0%} | {inside} | {', '.join(case.run.guesses)} |")  # fmt: skip
    return out


def _missed() -> list[str]:
    cases = shipped_cases()
    worst = sorted(
        zip(cases, leave_one_out(cases), strict=True), key=lambda x: -abs(log(x[1].mid / (x[0].run.truth or 1.0)))
    )
    names = ", ".join(f"{c.run.id} ({relative_error(a, c.run.truth or 1.0):+.0%})" for c, a in worst[:5])
    return ["", "## What it gets wrong", "", f"Largest misses: {names}. Falcon's hours are one digit from a partner's page, and another source "
            "has 2.5 times as many. MT-NLG's three steps lie within 1% of (micro-batches + 34) x 0.197 s + 6.0 s, where "
            "the model has 0.163 s and 0.6 s; on the same shape in Megatron's own benchmark it is 9% fast, so most of this is that "
            "run's software. What runs lost between steps is not in their layout: with known layout the median error is "
            f"{_median_known(worst, steady=True):.0%} for rates and {_median_known(worst, steady=False):.0%} for hours. Outside the table, Llama 3.1 8B "
            "(more than twice the predicted hours) and BloombergGPT (network of its cloud) are missed."]  # fmt: skip


def _median_known(pairs: Sequence[tuple[Case, Interval]], *, steady: bool) -> float:
    known = [(a, c.run.truth or 1.0) for c, a in pairs if c.run.layout_known and c.run.steady is steady]
    return float(summary([a for a, _ in known], [t for _, t in known])["median_error"])


def page() -> str:
    """The whole page."""
    held, _ = read_cases(shipped_rows("holdout_runs"))
    head = [
        "# The planner, validated",
        "",
        "Made by `shoestring plan validate`. Errors are predicted over published, minus one.",
        "",
    ]
    skipped = read_cases(shipped_rows("published_runs"))[1]
    tail = [
        "",
        "Not predicted: "
        + "; ".join(f"{s['id']} ({s['reason'].split(': ', 1)[-1].rstrip('.')})" for s in skipped)
        + ".",
    ]
    parts = [head, _v3(), _extension(), _r1(), _serving(), _scores(), _missed(), _rows("Rows of the table", shipped_cases()), tail,
             _rows("Rows outside the table", held), _questions()]  # fmt: skip
    return "\n".join(line for part in parts for line in part) + "\n"
