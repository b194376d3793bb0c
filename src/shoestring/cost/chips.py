"""Chips and clusters: peaks, memory, links, power, rent, with sources and dates.

Peaks are dense (no sparsity). What share of a peak is reached stands in data/families.csv, by family, with the
measurement each figure is from. Links: NVLink figures are both directions added, so one way is half; the
network share per accelerator is its own NIC.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.tables import number, shipped_rows
from shoestring.cost.units import parse_count

PCIE_GB_S = 64.0  # both directions of a 4.0 x16 slot, where no faster link is listed
NODE_SIZES = {"GB200": 72, "GB300": 72, "TPU v3": 1024, "TPU v4": 4096, "TPU v5e": 256, "TPU v5p": 8960, "GH200": 1}
FAMILIES = (
    ("V100", "volta"), ("A100", "ampere"), ("A800", "ampere"), ("H", "hopper"), ("GH200", "hopper"),
    ("GB", "blackwell"), ("B", "blackwell"), ("RTX 50", "blackwell"), ("RTX", "ada"), ("L", "ada"),
    ("MI", "cdna3"), ("Ascend", "ascend"), ("TPU", "tpu"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of peak reached by large, well-shaped work."""

    gemm_bf16: float
    gemm_fp8: float
    grouped: float
    attn_fwd: float
    attn_bwd: float
    memory: float
    source: str = ""


@dataclass(frozen=True, slots=True)
class Chip:
    """One accelerator. Speeds in FLOP/s and bytes/s; links one way; `guesses` lists fields that were not published."""

    name: str
    family: str
    bf16: float
    fp8: float  # equal to bf16 where there are no FP8 units
    memory_bytes: float
    memory_bw: float
    link_bw: float  # inside the node, one way
    net_bw: float  # between nodes, one way
    node_size: int
    tdp_w: float
    rent_low: float | None
    rent_high: float | None
    rent_date: str
    datacenter: bool
    has_fp8: bool
    efficiency: Efficiency
    source: str = ""
    notes: str = ""
    guesses: tuple[str, ...] = ()
    calibrated: bool = False

    @property
    def rent_mid(self) -> float | None:
        """Geometric middle of the published rents."""
        if self.rent_low is None:
            return self.rent_high
        return (self.rent_low * (self.rent_high or self.rent_low)) ** 0.5

    def peak(self, precision: str) -> float:
        return self.fp8 if precision == "fp8" else self.bf16


def family_of(name: str) -> str:
    """The family whose efficiencies a chip takes."""
    return next((family for prefix, family in FAMILIES if name.startswith(prefix)), "hopper")


@cache
def _efficiency(family: str) -> Efficiency:
    row = next(r for r in shipped_rows("families") if r["family"] == family)
    shares: dict[str, Any] = {f: number(row, f) for f in Efficiency.__slots__ if f != "source"}
    shares["gemm_fp8"] = shares["gemm_fp8"] or shares["gemm_bf16"]
    return Efficiency(**shares, source=row["source"])


def _chip(row: dict[str, str]) -> Chip | None:
    """A row of chips.csv; None when its peak is unknown (it cannot be planned on, only checked for export)."""
    bf16, guesses = number(row, "bf16_tflops"), []
    if bf16 is None:
        return None
    fp8 = number(row, "fp8_tflops")
    values = {}
    for field, column, fallback in (
        ("tdp", "tdp_w", 700.0), ("net", "nic_gbit_s", 200.0), ("link", "nvlink_gb_s_bidir", PCIE_GB_S),
    ):  # fmt: skip
        value = number(row, column)
        if value is None:
            guesses.append(column)
        values[field] = value if value is not None else fallback
    family = family_of(row["chip"])
    return Chip(
        name=row["chip"], family=family, bf16=bf16 * 1e12, fp8=(fp8 or bf16) * 1e12,
        memory_bytes=(number(row, "hbm_gb") or 0) * 1e9, memory_bw=(number(row, "hbm_tb_s") or 0) * 1e12,
        link_bw=values["link"] / 2 * 1e9, net_bw=values["net"] / 8 * 1e9,
        node_size=NODE_SIZES.get(row["chip"], 8), tdp_w=values["tdp"],
        rent_low=number(row, "rent_usd_h_low"), rent_high=number(row, "rent_usd_h_high"), rent_date=row["rent_date"],
        datacenter=row["datacenter"] == "yes",
        has_fp8=fp8 is not None, efficiency=_efficiency(family), source=row["source"], notes=row["notes"],
        guesses=tuple(guesses),
    )  # fmt: skip


@cache
def all_chips() -> dict[str, Chip]:
    """Chips that can be planned on, by name."""
    chips = (_chip(row) for row in shipped_rows("chips"))
    return {chip.name: chip for chip in chips if chip}


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("google", ""))


PREFERRED = {
    "a100": "A100-SXM-80",
    "h100": "H100-SXM",
    "a800": "A800-SXM-80",
    "v100": "V100-SXM2-32",
    "4090": "RTX 4090",
}


def find_chip(name: str) -> Chip:
    """A chip by its name or a usual short form ('H800', 'a100 80gb', 'tpu-v4')."""
    chips = all_chips()
    key = _squash(name)
    if key in PREFERRED:
        return chips[PREFERRED[key]]
    short = {_squash(n): n for n in chips}
    if key in short:
        return chips[short[key]]
    starts = [n for s, n in short.items() if len(key) >= 3 and s.startswith(key)]
    if starts:
        return chips[starts[0]]
    loose = [
        n for s, n in short.items() if s and _squash(s.replace("sxm", "")) == key.replace("sxm", "").replace("gb", "")
    ]
    if loose:
        return chips[loose[0]]
    if any(_squash(r["chip"]) == key for r in shipped_rows("chips")):
        raise UserError(f'chip "{name}" is listed without a peak rate, so nothing can be planned on it.')
    bare = {re.sub(r"sxm\d?|pcie", "", s): n for s, n in reversed(short.items())} | {k: v for k, v in PREFERRED.items()}
    close = difflib.get_close_matches(key, sorted(bare, reverse=True), n=1, cutoff=0.5)
    hint = f' Did you mean "{bare[close[0]]}"?' if close else did_you_mean(name, chips)
    raise UserError(f'unknown chip "{name}".{hint}')


@dataclass(frozen=True, slots=True)
class Cluster:
    """`n` chips of one kind; `node_size` of them share the fast link."""

    chip: Chip
    n: int

    @property
    def nodes(self) -> int:
        return -(-self.n // self.chip.node_size)

    @property
    def label(self) -> str:
        return f"{self.n} x {self.chip.name}"


def parse_cluster(text: str) -> Cluster:
    """'2048xH800', '2048 H800', '8 x H100-SXM', 'H100' (one). Raises UserError for anything else."""
    if re.fullmatch(r"\s*\d[\d.,]*[kKmM]?\s*", text):
        raise UserError(f'--on "{text}" names no chip; write it like 2048xH800.')
    if len(re.findall(r"(?:^|[\s,;+&])\s*\d[\d.,]*\s*[x×*]", text)) > 1:
        raise UserError(
            f'--on "{text}" names several kinds of chip; a run is planned on one kind, plan each by itself.'
        )
    match = re.match(r"^\s*([+-]?[\d.,]+(?:e\d+)?[kKmMbBtT]?)\s*(?:[x×*]\s*|\s+)(.+?)\s*$", text)
    count, name = (match.group(1), match.group(2)) if match else ("1", text)
    n = parse_count(count, "number of chips", "2048 or 16K", 1e7)
    if n != int(n):
        raise UserError(f"number of chips is {count}; it must be a whole number.")
    return Cluster(find_chip(name), int(n))
