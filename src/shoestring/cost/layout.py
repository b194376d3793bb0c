"""How a training step is laid over chips: parallel degrees, schedule, recomputation, precision.

Two spellings are read: ours (`pp=16,ep=64,schedule=dualpipe`) and that of papers ("TP8 PP16 DP64 ZeRO-1
interleaved"). What a spelling leaves open is chosen by `shoestring.cost.search`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.shape import ModelShape

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp16", "fp8", "fp32")


@dataclass(frozen=True, slots=True)
class Layout:
    """tp x pp x cp x dp chips. Experts are spread over `ep` of the tp*cp*dp chips that share a stage."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    zero: int = 1  # 0: plain data parallel; 1: optimizer sharded; 2: gradients too; 3: weights too (FSDP)
    schedule: str = "1f1b"
    virtual: int = 1  # model chunks a rank, for the interleaved schedule
    micro_batch: int = 1  # sequences
    recompute: str = "none"
    precision: str = "bf16"

    @property
    def chips(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def bidirectional(self) -> bool:
        """DualPipe keeps two stages, so two copies of the parameters, on each rank."""
        return self.schedule == "dualpipe"

    def short(self) -> str:
        """'TP8 PP16 DP64 ZeRO-1 interleaved2 mb1 full bf16'; degrees of 1 are left out."""
        parts = [f"{k.upper()}{getattr(self, k)}" for k in ("tp", "pp", "ep", "cp", "dp") if getattr(self, k) > 1]
        if self.dp > 1:
            parts.append("FSDP" if self.zero == 3 else f"ZeRO-{self.zero}")
        if self.pp > 1:
            parts.append(self.schedule + (f"x{self.virtual}" if self.schedule == "interleaved" else ""))
        recompute = {"none": "no recomputation", "selective": "selective recomputation", "full": "full recomputation"}
        return " ".join([*parts, f"mb{self.micro_batch}", self.precision]) + ", " + recompute[self.recompute]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def with_(self, **changes: Any) -> Layout:
        """A copy with some degrees changed."""
        return replace(self, **changes)


def parse_layout(text: str) -> dict[str, Any]:
    """'pp=16,ep=64,schedule=dualpipe' -> the fields that were given."""
    given: dict[str, Any] = {}
    words = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "precision": PRECISIONS}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, sep, value = (x.strip().lower() for x in part.partition("="))
        if not sep:
            raise UserError(f'layout "{part}" has no "="; write it like pp=16,ep=64,schedule=dualpipe.')
        if key in words:
            if value not in words[key]:
                raise UserError(f'layout: {key} "{value}" is not known.{did_you_mean(value, words[key])}')
            given[key] = value
            continue
        if key not in Layout.__slots__:
            raise UserError(f'layout: unknown key "{key}".{did_you_mean(key, Layout.__slots__)}')
        if not value.isdigit() or (int(value) < 1 and key != "zero") or (key == "zero" and int(value) > 3):
            raise UserError(
                f'layout: {key} is "{value}"; give a whole number{" from 0 to 3" if key == "zero" else ""}.'
            )
        given[key] = int(value)
    return given


def parse_published(text: str) -> dict[str, Any]:
    """What a paper's phrase ("PP16 DualPipe, EP64 over 8 nodes, ZeRO-1 DP128, no TP") fixes."""
    given: dict[str, Any] = {}
    words = text.lower()
    for key in ("tp", "pp", "ep", "cp", "dp"):
        found = re.findall(rf"\b{key}\s*=?\s*(\d+)", words.split(" at seq")[0] if key == "cp" else words)
        if found:
            given[key] = int(found[0])
    if "cp" in given and re.search(rf"\bcp\s*=?\s*{given['cp']}\s+at\b", words):
        del given["cp"]  # used in a later phase only
    if "no tp" in words:
        given["tp"] = 1
    zero = re.search(r"zero[- ]?(\d)?", words)
    if "fsdp" in words or "fully sharded" in words:
        given["zero"] = 3
    elif zero:
        given["zero"] = int(zero.group(1) or 1)
    elif re.search(r"\bddp\b", words):
        given.update(zero=0, tp=1, pp=1)
    if "zero-bubble" in words or "zero bubble" in words:
        given["schedule"] = "zb1p"
    for name in ("dualpipev", "dualpipe", "zbv", "zb1p", "gpipe", "interleaved"):
        if name in words:
            given["schedule"] = name
            break
    if given.get("zero") == 3:
        given.setdefault("tp", 1)
        given.setdefault("pp", 1)
    if "tp" in given and ("dp" in given or "zero" in given):
        given.setdefault("pp", 1)
    return given


def check_layout(shape: ModelShape, layout: Layout, chips: int) -> None:
    """Raises UserError when the degrees contradict each other, the model or the number of chips."""
    if layout.chips != chips:
        factors = f"tp{layout.tp} x pp{layout.pp} x cp{layout.cp} x dp{layout.dp}"
        raise UserError(
            f"layout: {factors} is {layout.chips} chips, not {chips}; change a degree or the number of chips."
        )
    if layout.pp > shape.layers:
        raise UserError(f"layout: pp={layout.pp} exceeds the model's {shape.layers} layers.")
    if shape.heads % layout.tp:
        raise UserError(f"layout: tp={layout.tp} does not divide {shape.heads} heads.")
    if layout.ep > 1 and not shape.n_routed:
        raise UserError(f"layout: ep={layout.ep} but the model has no experts; leave ep out.")
    if layout.ep > 1 and (shape.n_routed % layout.ep or (layout.dp * layout.tp * layout.cp) % layout.ep):
        group = layout.dp * layout.tp * layout.cp
        raise UserError(f"layout: ep={layout.ep} must divide both {shape.n_routed} experts and {group} chips a stage.")
    if layout.schedule == "dualpipe" and layout.pp % 2:
        raise UserError(f"layout: dualpipe needs an even pp; pp is {layout.pp}.")


def even_chunks(layers: int, pp: int) -> int:
    """Model chunks a rank where a layout says only "interleaved": the fewest, from 2, that share the layers evenly."""
    return next((v for v in range(2, layers // pp + 1) if layers % (pp * v) == 0), 2)


def complete(given: dict[str, Any], chips: int) -> Layout:
    """A Layout from partial fields, dp from the number of chips."""
    rest = given.get("tp", 1) * given.get("pp", 1) * given.get("cp", 1)
    if chips % rest:
        raise UserError(f"layout: tp x pp x cp = {rest} does not divide {chips} chips.")
    fields = dict(given)
    if given.get("schedule") == "interleaved":
        fields.setdefault("virtual", 2)
    fields.setdefault("dp", chips // rest)
    return Layout(**fields)
