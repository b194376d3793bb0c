"""The claims of the news of January 2025, worked through: what follows from each, and what would decide it.

Each entry of data/news.json has its claim, its source and the evidence that would decide; the figures are computed
here, at the time of asking, by the same functions as every plan.
"""

# ruff: noqa: E501 (lines of the page it writes)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoestring.cost.bill import price_in_server
from shoestring.cost.chips import find_chip
from shoestring.cost.claims import check
from shoestring.cost.export import export_status
from shoestring.cost.models import named_shape
from shoestring.cost.plan import plan
from shoestring.cost.prices import USUAL_LENGTHS, all_prices, ask_usd, self_host_usd
from shoestring.cost.tables import shipped_json
from shoestring.cost.units import show, usd

Finding = tuple[str, list[str]]  # verdict, what follows

V3_HOURS, LLAMA_HOURS, LLAMA_ALL_HOURS = 2.788e6, 30.84e6, 39.3e6  # arXiv 2412.19437; Llama 3.1 model card
GPT4_FLOP = 2.1e25  # Epoch AI's estimate; unverified


def _v3() -> Finding:
    verdict = check("2048 H800, 2.788M hours, $5.576M, 14.8T tokens, deepseek-v3")
    flops = named_shape("deepseek-v3").flops_per_token(4096) * 14.8e12
    mfu = verdict.implies["mfu_causal"]
    return verdict.verdict, [
        f"{verdict.implies['days']:.1f} days on all 2,048 chips; {verdict.implies['tokens_per_second_per_chip']:,.0f} "
        f"tokens/s a chip; {show(flops)} FLOP, {mfu:.1%} of the 16-bit peak.",
        *verdict.reasons,
        "The hours are exactly 180K a trillion tokens times 14.8 (plus 119K and 5K): a rate, not a meter reading.",
        "The report itself leaves out earlier research and ablations; R1 is not in it either.",
    ]


def _one_percent() -> Finding:
    at = [LLAMA_HOURS * rent for rent in (2.0, 3.5)]
    return "inconsistent", [
        f"5.576 of 500 is {5.576 / 500:.1%}: the division is right, the two figures are not of one kind.",
        f"$500M over 30.84M H100-hours would be {usd(500e6 / LLAMA_HOURS)} an hour; at $2 to $3.5 the run rents for "
        f"{usd(at[0])} to {usd(at[1])}, so V3's share is {5.576e6 / at[1]:.0%} to {5.576e6 / at[0]:.0%}.",
        f"In chip-hours V3 took {V3_HOURS / LLAMA_HOURS:.1%} of the 405B run, "
        f"{V3_HOURS / LLAMA_ALL_HOURS:.1%} of all three Llama 3.1 models.",
    ]


def _ten_times() -> Finding:
    llama = named_shape("llama-3.1-405b").flops_per_token(8192) * 15.6e12
    v3 = named_shape("deepseek-v3").flops_per_token(4096) * 14.8e12
    return "consistent", [
        f"{LLAMA_HOURS / V3_HOURS:.1f} times fewer chip-hours and {llama / v3:.1f} times fewer FLOP than Llama 3.1 405B.",
        f"The saving is in the model: {named_shape('deepseek-v3').params().active / 1e9:.1f}B active parameters a token "
        "instead of 405B; chips ran at about the same share of their peak.",
    ]


def _sixteen() -> Finding:
    verdict = check("16,384 H100 for 78.4 days, 30.84M hours")
    return verdict.verdict, [
        f"30.84M hours are {LLAMA_HOURS / 16384 / 24:.0f} days on 16,384 chips, or longer on fewer."
    ]


def _gpt4() -> Finding:
    hours = GPT4_FLOP / (0.34 * find_chip("A100").bf16) / 3600
    return "not decidable", [
        f"If it took {GPT4_FLOP:.1e} FLOP (an outside estimate) at 34% of A100 peak: {show(hours)} chip-hours, "
        f"{usd(hours)} to {usd(2 * hours)} at $1 to $2. The claim is possible; nothing published decides it.",
    ]


def _a100() -> Finding:
    verdict = export_status("A100-PCIe-80", "2021-06-01", "China")
    value = 10_000 * price_in_server(find_chip("A100"))[0]
    return "consistent", [verdict.sentence, f"10,000 of them are worth about {usd(value)} in servers."]


def _fifty() -> Finding:
    day = export_status("H100", "2023-06-01", "China")
    return "not decidable", [
        day.sentence + " H800 and H20 could be bought in their time.",
        f"With 50,000 chips, V3's hours would be {V3_HOURS / 50_000 / 24:.1f} days: the run does not need them, so it "
        "neither proves nor refutes them.",
        "The later count names 10,000 H100 among 50,000 Hopper chips: not the same claim.",
    ]


def _half_billion() -> Finding:
    fleet = {"H800": 10_000, "H100": 10_000, "H20": 30_000}
    worth = sum(n * price_in_server(find_chip(chip))[0] for chip, n in fleet.items())
    return "not decidable", [
        f"10K H800, 10K H100 and 30K H20 at server prices are {usd(worth)}: if the count holds, the sum holds.",
        "It is the price of a fleet used for years; $5.576M is the rent of one run. Neither refutes the other.",
    ]


def _questions() -> Finding:
    lines = []
    for model in (
        "deepseek-reasoner (R1)",
        "deepseek-chat (V3)",
        "V4.1-Flash off-peak",
        "gpt-5-mini",
        "o1",
        "claude-haiku-4.5",
    ):
        price = next(p for p in all_prices() if p.model == model)
        costs = ", ".join(usd(ask_usd(price, 1e6, a, b)) for a, b in USUAL_LENGTHS)
        lines.append(f"a million questions to {price.label}: {costs}")
    own = ", ".join(usd(self_host_usd(1e6, a, b)) for a, b in USUAL_LENGTHS)
    lengths = ", ".join(f"{a}+{b}" for a, b in USUAL_LENGTHS)
    return "consistent", [
        f"Dollars at {lengths} tokens in and out:",
        *lines,
        f"a million questions on one's own H800 node: {own}",
    ]


def _bans() -> Finding:
    cases = (("A100", "2022-10-06"), ("A100", "2022-10-07"), ("H100", "2022-10-07"), ("A800", "2023-11-16"), ("A800", "2023-11-17"),
             ("H800", "2023-11-16"), ("H800", "2023-11-17"), ("H20", "2025-04-14"), ("H20", "2025-04-15"))  # fmt: skip
    return "consistent", [export_status(chip, day, "China").sentence for chip, day in cases]


def _distilled() -> Finding:
    return "inconsistent", [
        "The paper says the reverse: 800K samples from R1 were used to fine-tune Qwen2.5 and Llama 3 models.",
        "R1 itself starts from DeepSeek-V3-Base; the paper allows that web text holds other models' output.",
    ]


def _r1() -> Finding:
    hours = {"R1-Zero": 101_376, "SFT data": 5_000, "R1": 40_960}
    return "consistent", [
        "; ".join(f"{name} {show(h)} h" for name, h in hours.items()) + f": {show(sum(hours.values()))} h, "
        f"{usd(2 * sum(hours.values()))} at $2.",
        f"{101_376 * 3600 / (10_400 * 32 * 16):.1f} chip-seconds a rollout for R1-Zero; plausible for answers of 8,000 to "
        "12,000 tokens.",
        "It excludes the base model ($5.576M) and earlier trials.",
    ]


FINDINGS: dict[str, Callable[[], Finding]] = {
    "v3-cost": _v3, "one-percent": _one_percent, "ten-times-less": _ten_times, "sixteen-thousand": _sixteen, "gpt4": _gpt4,
    "ten-thousand-a100": _a100, "fifty-thousand": _fifty, "half-billion": _half_billion,
    "millions-of-questions": _questions, "bans": _bans, "distilled-from": _distilled, "r1-cost": _r1,
}  # fmt: skip


def answers() -> list[dict[str, Any]]:
    """Every claim with source, verdict, what follows and the evidence that would decide."""
    out = []
    for entry in shipped_json("news"):
        verdict, follows = FINDINGS[entry["id"]]()
        out.append({**{k: v for k, v in entry.items() if k != "check"}, "verdict": verdict, "follows": follows})
    return out


def page(items: list[dict[str, Any]]) -> str:
    """docs/claims.md."""
    own = plan("deepseek-v3", 14.8e12, "2048xH800", usd_per_hour=2.0, global_batch=15360, precision="fp8")
    lines = [
        "# The claims of the news, checked", "",
        "Made by `shoestring check --news --out docs/claims.md`. *consistent*: the stated numbers agree with each other and "
        "with published runs. *inconsistent*: they contradict each other, or compare things of different kinds. "
        "*not decidable*: public numbers do not settle it. *Looked up* says which sources were seen when this was written.", "",
        f"For scale, the planner's own figure for DeepSeek-V3's pretraining, to which nothing in it was fitted: "
        f"{show(own.gpu_hours.mid)} H800-hours (80%: {show(own.gpu_hours.low)} to {show(own.gpu_hours.high)}), "
        f"{usd(own.usd.mid)} at $2. Published: 2.664M hours, $5.328M.", "",
        "| claim | verdict |", "|---|---|", *(f"| {i['claim']} | {i['verdict']} |" for i in items),
    ]  # fmt: skip
    for item in items:
        lines += ["", f"## {item['claim']}", "", f"**{item['verdict'].capitalize()}.** Source: {item['source']}.", ""]
        lines += [f"Looked up: {item['looked_up']}.", ""]
        lines += [f"- {f}" for f in item["follows"]] + ["", f"Would decide: {item['evidence']}."]
    return "\n".join(lines) + "\n"
