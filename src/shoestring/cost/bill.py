"""The whole bill: what a headline counts and what it leaves out, with low, middle and high; and the run in three views.

After Epoch AI's model of training cost (arXiv 2405.21015; epoch-research/training-cost-trends). Capital: a chip loses
a factor of ten every 1/0.14 years; interconnect is 19% of chips and interconnect together; energy at the wall.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

from shoestring.cost.chips import Chip
from shoestring.cost.residual import Interval
from shoestring.cost.tables import number, shipped_rows

DEPRECIATION = 0.14 * log(10) / 8766  # share of a chip's value an hour
INTERCONNECT = 0.19 / 0.81
USE, PUE = 0.75, 1.25  # mean power over the rated; wall power over server power (1.1 at hyperscalers)
USD_PER_KWH = 0.0826  # United States, 2025 (0.0771 in 2024); 90% x0.6 to x1.7
SERVER_POWER = 1.8
MTBF_CHIP_HOURS = 50_677  # Llama 3: 419 unexpected interruptions in 54 days on 16,384 chips (arXiv 2407.21783)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the ledger, in dollars. `counted`: in the headline of a published figure."""

    name: str
    counted: bool
    usd: Interval
    why: str


def energy_per_hour(chip: Chip, usd_per_kwh: float = USD_PER_KWH) -> float:
    """Dollars of electricity a chip-hour."""
    return kilowatts(chip) * usd_per_kwh


def kilowatts(chip: Chip) -> float:
    """Mean power at the wall, the server's share included."""
    factor = next((number(r, "server_power_factor") for r in shipped_rows("capital") if r["chip"] == chip.name), None)
    return chip.tdp_w / 1000 * (factor or SERVER_POWER) * USE * PUE


def price_in_server(chip: Chip) -> tuple[float, bool]:
    """(dollars of one chip inside a server, whether that is a guess from its peak rate)."""
    for row in shipped_rows("capital"):
        if row["chip"] == chip.name:
            return number(row, "usd_in_server") or 0.0, False
    return 33_750 * chip.bf16 / 989e12, True


def owned_per_hour(chip: Chip) -> dict[str, float]:
    """Dollars a chip-hour of owning instead of renting, by part."""
    hardware = price_in_server(chip)[0] * DEPRECIATION
    return {"hardware": hardware, "interconnect": hardware * INTERCONNECT, "energy": energy_per_hour(chip)}


def checkpoint_every(save_seconds: float, chips: int) -> tuple[float, float]:
    """(seconds between checkpoints, share of time lost to saving and redoing), after Young: sqrt(2 C MTBF)."""
    mtbf = MTBF_CHIP_HOURS / chips * 3600
    return sqrt(2 * save_seconds * mtbf), sqrt(2 * save_seconds / mtbf)


# Lines outside the headline: low, middle, high as multiples of the counted dollars.
NOT_COUNTED = (
    ("experiments and failed runs", 0.2, 1.2, 3.0, "all over final compute 1.2 to 4, median 2.2 (Epoch AI)"),
    ("idle and reserved chips", 0.0, 0.1, 0.3, "paid for between runs; a guess"),
    ("storage, network, support", 0.3, 0.4, 0.5, "30 to 50% of sticker; secondary sources"),
    ("staff", 0.45, 0.7, 1.4, "29 to 49% of development cost where chips are 47 to 67% (Epoch AI)"),
    ("data and teachers", 0.0, 0.1, 1.0, "licences, crawling, synthesis; a guess: price teachers apart"),
)  # fmt: skip


def ledger(run: Interval, other_counted: tuple[Line, ...] = ()) -> list[Line]:
    """Counted and not counted lines around the rent of a final run."""
    final = run.mid + sum(line.usd.mid for line in other_counted)
    lines = [Line("final run, rent", True, run, "chip-hours times the rent"), *other_counted]
    for name, low, mid, high, why in NOT_COUNTED:
        lines.append(Line(name, False, Interval(low, mid, high).scaled(final), why))
    return lines


def views(hours: Interval, chip: Chip, usd_per_hour: float, fleet_chips: int) -> dict[str, Interval]:
    """The same run three ways. The fleet measures an owner, not a run: it stands beside, never in one sum."""
    fleet = fleet_chips * price_in_server(chip)[0]
    return {
        "headline rent": hours.scaled(usd_per_hour),
        "amortised ownership": hours.scaled(sum(owned_per_hour(chip).values())),
        "buying the fleet": Interval(fleet * 0.8, fleet, fleet * 1.3),
    }


def total(lines: list[Line], *, counted_only: bool = False) -> Interval:
    """Sum of the lines; ends are added too, which is wider than independence would make it."""
    kept = [line.usd for line in lines if line.counted or not counted_only]
    return Interval(sum(u.low for u in kept), sum(u.mid for u in kept), sum(u.high for u in kept))


def to_rows(lines: list[Line]) -> list[dict[str, object]]:
    """JSON rows of the ledger."""
    return [{"name": x.name, "counted": x.counted, "usd": x.usd.to_dict(), "why": x.why} for x in lines]
