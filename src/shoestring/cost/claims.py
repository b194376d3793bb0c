"""Claims about a run, checked: what the stated numbers imply, whether they agree, and what they leave out.

Three verdicts. *inconsistent*: two stated numbers contradict each other, or what follows is beyond any chip.
*consistent*: they agree, and the implied speed lies where published runs lie. *not decidable*: too little is stated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import log
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Cluster, find_chip
from shoestring.cost.models import model_names, named_shape
from shoestring.cost.plan import Plan, plan
from shoestring.cost.tables import shipped_json
from shoestring.cost.units import HOURS, parse_count, show, usd

AGREE = 0.03  # stated numbers are rounded; further apart than this they contradict
IMPOSSIBLE_MFU = 0.80  # above the share of peak that plain matrix products reach
HIGHEST_MFU = 0.57  # highest whole-run or steady figure published for large training (arXiv 2205.05198: 56.3%)
NUMBER = r"(\d[\d,]*\.?\d*)\s*([kmbt](?![a-z])|thousand|million|billion|trillion)?"
WRITTEN = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LEFT_OUT = (
    "earlier research, ablations and failed runs (1.2 to 4 times the final run's compute, Epoch AI)",
    "staff (29 to 49% of development cost, Epoch AI)",
    "data: crawling, licences, synthesis, and any teacher that wrote some of it",
    "buying or reserving the chips, idle time, storage, evaluation, serving",
)


@dataclass(slots=True)
class Claim:
    """The numbers that were read; None where nothing was said."""

    text: str
    chips: float | None = None
    chip: str | None = None
    hours: float | None = None  # chip-hours
    usd: float | None = None
    usd_per_hour: float | None = None
    tokens: float | None = None
    days: float | None = None
    mfu: float | None = None
    model: str | None = None


@dataclass(slots=True)
class Verdict:
    """What follows from a claim."""

    claim: Claim
    verdict: str = "not decidable"
    implies: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    leaves_out: tuple[str, ...] = LEFT_OUT

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        read = {
            k: getattr(self.claim, k) for k in Claim.__slots__ if k != "text" and getattr(self.claim, k) is not None
        }
        return {"claim": self.claim.text, "read": read, "verdict": self.verdict, "consistent": self.consistent,
                "implies": self.implies, "reasons": self.reasons, "leaves_out": list(self.leaves_out)}  # fmt: skip

    @property
    def consistent(self) -> bool | None:
        return {"consistent": True, "inconsistent": False}.get(self.verdict)

    def text(self) -> str:
        """For the terminal."""
        read = ", ".join(f"{k} {show(v) if isinstance(v, float) else v}" for k, v in self.to_dict()["read"].items())
        out = [f"claim     {self.claim.text}", f"read      {read}", f"verdict   {self.verdict}"]
        out += [f"implies   {k.replace('_', ' ')}: {show(v, 4)}" for k, v in self.implies.items()]
        out += [f"because   {r}" for r in self.reasons]
        return "\n".join(out + [f"left out  {r}" for r in self.leaves_out])


def _count(match: re.Match[str]) -> float:
    return parse_count(match.group(1) + (match.group(2) or ""))


def _found(pattern: str, text: str) -> float | None:
    """The number of the first match: its first two groups that took part."""
    match = re.search(pattern, text, re.IGNORECASE)
    if not match:
        return None
    groups = [g for g in match.groups() if g]
    return parse_count("".join(groups))


def _days_in(text: str) -> float | None:
    """'55 days', 'three weeks', '2 months'. 'a day' may be a rate, so it is not read."""
    words = "|".join(WRITTEN)
    pattern = rf"(?:{NUMBER}|\b({words}))[- ]*(day|week|month|year)s?\b"
    match = re.search(pattern, text, re.IGNORECASE)
    if not match:
        return None
    n = WRITTEN.index(match.group(3).lower()) + 1 if match.group(3) else _count(match)
    return n * HOURS[match.group(4).lower()] / 24


def read_claim(text: str) -> Claim:
    """The numbers of a sentence. Raises UserError when there is none."""
    claim = Claim(text.strip())
    rest = text
    rate = re.search(rf"\$\s*{NUMBER}\s*(?:/|per|an|a)\s*(?:[a-z0-9-]*[- ])?h(?:our|r)?\b", rest, re.IGNORECASE)
    if rate:
        claim.usd_per_hour = _count(rate)
        rest = rest.replace(rate.group(0), " ")
    claim.model = _model_in(rest)
    if claim.model:
        rest = re.sub(re.escape(claim.model), " ", rest, flags=re.IGNORECASE)
    money = rf"\$\s*{NUMBER}|{NUMBER}\s*(?:us[- ]?)?(?:dollars|usd)\b"
    claim.usd = _found(money, rest)
    rest = re.sub(money, " ", rest, flags=re.IGNORECASE)
    claim.tokens = _found(rf"{NUMBER}\s*tokens", rest)
    claim.hours = _found(rf"{NUMBER}\s*(?:[a-z]+\d*[- ])?(?:gpu[- ]|chip[- ])?h(?:ours|rs|our)?\b", rest)
    claim.days = _days_in(rest)
    claim.mfu = _mfu_in(rest)
    claim.chips, claim.chip = _chips_in(rest)
    if all(getattr(claim, k) is None for k in ("chips", "hours", "usd", "tokens", "days", "mfu")):
        raise UserError(
            f'no number with a unit was found in "{text.strip()}"; write it like "2048 H800, 2.788M hours".'
        )
    return claim


def _mfu_in(text: str) -> float | None:
    match = re.search(
        r"(?:mfu|utili[sz]ation)\D{0,8}(\d+\.?\d*)\s*%|(\d+\.?\d*)\s*%\s*(?:mfu|utili)", text, re.IGNORECASE
    )
    return float(match.group(1) or match.group(2)) / 100 if match else None


def _model_in(text: str) -> str | None:
    """The longest known model name in the text."""
    models = shipped_json("models")
    names = [n for entry in model_names() for n in (entry, *models[entry].get("aliases", ()))]
    squashed = text.lower().replace(" ", "-")
    found = [n for n in names if re.search(rf"(?<![a-z0-9.]){re.escape(n)}(?![a-z0-9.])", squashed)]
    return max(found, key=len) if found else None


def _chips_in(text: str) -> tuple[float | None, str | None]:
    for match in re.finditer(rf"{NUMBER}\s*(?:x|×|nvidia)?\s*([A-Za-z]+[- ]?v?\d+[A-Za-z0-9-]*)", text):
        try:
            chip = find_chip(match.group(3).removesuffix("s"))
        except UserError:
            continue
        before_hours = re.match(r"[- ]*(?:gpu[- ])?h(?:ours|rs|our)?\b", text[match.end() :])
        return (None, chip.name) if before_hours else (_count(match), chip.name)
    word = re.search(r"\b((?:A|H|B|L|V)\d{2,3}[A-Z]?)\b", text)
    try:
        return None, find_chip(word.group(1)).name if word else None
    except UserError:
        return None, None


def check(text: str) -> Verdict:
    """Read, compare, and compare with published runs."""
    claim = read_claim(text)
    verdict = Verdict(claim)
    problems = _arithmetic(claim, verdict)
    plausible = _speed(claim, verdict, problems)
    rented = _rate(claim, verdict, problems)
    if problems:
        verdict.verdict = "inconsistent"
        verdict.reasons = problems + verdict.reasons
    elif plausible or (plausible is None and (rented or _agree(claim))):
        verdict.verdict = "consistent"
    return verdict


def _agree(claim: Claim) -> bool:
    """Whether three stated numbers were compared with each other."""
    return all((claim.chips, claim.days, claim.hours)) or all((claim.hours, claim.usd, claim.usd_per_hour))


def _arithmetic(claim: Claim, verdict: Verdict) -> list[str]:
    """Stated numbers against each other; what is missing is filled in."""
    problems = []
    if claim.chips and claim.days:
        product = claim.chips * claim.days * 24
        if claim.hours and abs(product / claim.hours - 1) > AGREE:
            problems.append(
                f"{claim.chips:g} chips for {claim.days:g} days are {show(product)} chip-hours, "
                f"not {show(claim.hours)}."
            )
        verdict.implies["chip_hours"] = claim.hours or product
    elif claim.chips and claim.hours:
        verdict.implies["days"] = claim.hours / claim.chips / 24
    hours = claim.hours or verdict.implies.get("chip_hours")
    if hours and claim.usd:
        verdict.implies["usd_per_chip_hour"] = claim.usd / hours
        if claim.usd_per_hour and abs(hours * claim.usd_per_hour / claim.usd - 1) > AGREE:
            total = usd(hours * claim.usd_per_hour)
            problems.append(f"{show(hours)} hours at {usd(claim.usd_per_hour)} are {total}, not {usd(claim.usd)}.")
    elif hours and claim.usd_per_hour:
        verdict.implies["usd"] = hours * claim.usd_per_hour
    return problems


def _speed(claim: Claim, verdict: Verdict, problems: list[str]) -> bool | None:
    """Implied tokens a second and utilisation; True where published runs lie, None when not enough is stated."""
    hours = claim.hours or verdict.implies.get("chip_hours")
    if not (claim.model and claim.tokens and claim.chip):
        missing = [k for k in ("model", "tokens", "chip") if not getattr(claim, k)]
        verdict.reasons.append(f"speed cannot be checked: no {', '.join(missing)} stated.")
        return None
    answer = _plan_for(claim)
    if hours is None:
        if answer:
            verdict.implies["planned_chip_hours"] = answer.gpu_hours.mid
        return None
    chip, shape = find_chip(claim.chip), named_shape(claim.model)
    rate = claim.tokens / hours / 3600
    mfu = rate * shape.flops_per_token(4096) / chip.bf16
    verdict.implies |= {"tokens_per_second_per_chip": rate, "mfu_causal": mfu,
                        "mfu_noncausal": rate * shape.flops_per_token(4096, causal=False) / chip.bf16}  # fmt: skip
    if claim.mfu and abs(claim.mfu / mfu - 1) > 0.15:
        problems.append(
            f"the stated utilisation of {claim.mfu:.1%} contradicts the {mfu:.1%} that hours and tokens give."
        )
    if mfu > IMPOSSIBLE_MFU:
        problems.append(f"a utilisation of {mfu:.0%} of the 16-bit peak is beyond what matrix products reach.")
    if mfu > HIGHEST_MFU:
        verdict.reasons.append(f"utilisation {mfu:.1%} is above every published run (highest {HIGHEST_MFU:.0%}).")
    if answer is None:
        return None if mfu > HIGHEST_MFU else True
    verdict.implies["planned_chip_hours"] = answer.gpu_hours.mid
    low, high = answer.gpu_hours.low, answer.gpu_hours.high
    inside = low / 1.15 <= hours <= high * 1.15
    where = "inside" if low <= hours <= high else "near the edge of" if inside else "outside"
    span = f"{show(low)} to {show(high)}"
    verdict.reasons.append(f"{show(hours)} hours lie {where} the planner's 80% interval of {span}, which uses "
                           "no number of this claim but model, tokens and chips.")  # fmt: skip
    if not inside and hours < low / 2:
        problems.append(
            f"the claim needs {answer.gpu_hours.mid / hours:.1f} times the speed of comparable published runs."
        )
    return inside


def _plan_for(claim: Claim) -> Plan | None:
    chip = find_chip(claim.chip or "")
    days = claim.days or (claim.hours / claim.chips / 24 if claim.hours and claim.chips else None)
    n = claim.chips or (claim.hours / (days or 50) / 24 if claim.hours else 1024)
    size = int(claim.chips or max(8, 2 ** round(len(bin(int(max(n, 1)))) - 3)))
    answers = []
    for precision in ("bf16", "fp8") if chip.has_fp8 else ("bf16",):  # not stated, so both
        try:
            answers.append(plan(claim.model or "", claim.tokens or 0.0, Cluster(chip, size), precision=precision))
        except UserError:
            continue
    hours = claim.hours or (claim.chips or 0) * (claim.days or 0) * 24
    return min(answers, key=lambda a: abs(log(a.gpu_hours.mid / (hours or a.gpu_hours.mid))), default=None)


def _rate(claim: Claim, verdict: Verdict, problems: list[str]) -> bool:
    """The implied rent against published rents."""
    if claim.usd and claim.chip and not verdict.implies.get("usd_per_chip_hour") and find_chip(claim.chip).rent_mid:
        hours = claim.usd / (claim.usd_per_hour or find_chip(claim.chip).rent_mid or 1.0)
        verdict.implies["chip_hours_at_published_rent"] = hours
        if claim.chips:
            verdict.implies["days_at_published_rent"] = hours / claim.chips / 24
    implied = verdict.implies.get("usd_per_chip_hour")
    if implied is None:
        return False
    if not claim.chip or find_chip(claim.chip).rent_mid is None:
        verdict.reasons.append(f"it implies {usd(implied)} a chip-hour; no published rent to compare with.")
        return False
    chip = find_chip(claim.chip)
    assumed = ", the rate the report itself assumed" if "ASSUMED" in chip.source else ""
    low, high = chip.rent_low or 0.0, chip.rent_high or chip.rent_low or 0.0
    fine = 0.5 * low <= implied <= 2 * high
    rents = usd(low) if low == high else f"{usd(low)} to {usd(high)}"
    verdict.reasons.append(f"it implies {usd(implied)} a chip-hour; published rents of {chip.name} are {rents} "
                           f"({chip.rent_date}{assumed}).")  # fmt: skip
    if implied > 4 * high or implied < 0.25 * low:
        problems.append(
            f"{usd(implied)} a chip-hour is no rent of {chip.name}: the dollars and the hours are not of one thing."
        )
    return fine


__all__ = ["Claim", "Verdict", "check", "read_claim"]
