"""Planning on a machine that was measured: its parts of a training step, messages, then real steps.

The parts of `shoestring.cost.laws` are timed as our own models run them; a step on one chip is, in seconds,

    a*products + b*attention + c*beside + d*experts + e*loss + f*update

where each term is the laws' answer for the shape, and a..f are multipliers near 1, fitted to a few real steps with a
prior at 1 (ridge). Without real steps they are 1. Several chips share the sequences of a step: gradients are reduced
and, with experts spread out, tokens exchanged at the measured rates. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import exp, log
from pathlib import Path
from typing import Any

from shoestring.core.atomic import write_json
from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster, Efficiency
from shoestring.cost.laws import Laws, Sample, Sizes, attention_inside, fit
from shoestring.cost.layout import Layout
from shoestring.cost.memory import memory_per_rank
from shoestring.cost.residual import inverse
from shoestring.cost.search import Found
from shoestring.cost.shape import ModelShape
from shoestring.cost.step import StepTime

SCHEMA = 2
TERMS = ("products", "attention", "beside", "experts", "loss", "update")
PRIOR_WEIGHT = 0.07  # of multipliers at 1 against relative errors of steps: (4% / 15%)^2, both estimates
RATES_SD = 0.13  # of the log of a plan's time from measured rates alone: -10/+25% at 80%, an estimate
STEPS_SD = 0.08  # the same after real steps, -5/+15%: an estimate, which the misses of left-out steps then move
STEPS_WEIGHT = 4  # how many left-out steps that estimate is worth
ENOUGH = 4  # shapes from which on leaving one out says something
ALONE = "one device: there is nobody to exchange with"

Step = tuple[ModelShape, int, int, float]  # shape, sequences, sequence length, measured seconds of one optimizer step


@dataclass(frozen=True, slots=True)
class Exchange:
    """All-to-all between the devices of one machine: (bytes each sends in all, seconds), and who carried it."""

    devices: int
    by: str
    measured: tuple[tuple[float, float], ...] = ()
    why: str = ""  # why nothing was measured

    def line(self) -> tuple[float, float]:
        """(seconds before the first byte, bytes a second) through the measured points; relative least squares."""
        if len(self.measured) < 2:
            raise UserError(f"messages between devices were not measured ({self.why or 'too few points'}).")
        n = sx = sy = sxx = sxy = 0.0
        for size, seconds in self.measured:
            w = 1 / seconds**2
            n, sx, sy = n + w, sx + w * size, sy + w * seconds
            sxx, sxy = sxx + w * size * size, sxy + w * size * seconds
        slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
        slope = max(slope, 1e-15)
        return max(0.0, (sy - slope * sx) / n), 1 / slope

    def seconds(self, size: float) -> float:
        """Of an exchange in which each device sends `size` bytes to others."""
        first, rate = self.line()
        return first + size / rate

    def text(self) -> str:
        if not self.measured:
            return f"all-to-all not measured: {self.why}"
        first, rate = self.line()
        return f"all-to-all of {self.devices} by {self.by}: {first * 1e6:.0f} us and {rate / 1e9:.2f} GB/s a device"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one machine. `samples`: the parts of `cost.laws`, one device, in the training format."""

    host: str
    threads: int
    samples: tuple[Sample, ...]
    bandwidth: float  # bytes/s of a large copy, read and write counted
    memory_bytes: float
    device: str = "cpu"
    devices: int = 1  # that compute at once at these rates
    kernels: str = "float32"  # products' format first
    exchange: Exchange = Exchange(1, "", (), ALONE)
    multipliers: tuple[float, ...] = (1.0,) * len(TERMS)
    steps_measured: int = 0  # shapes whose real steps were fitted
    left_out: tuple[float, ...] = ()  # log(predicted / measured) of each, with multipliers fitted to the others
    schema: int = SCHEMA
    notes: tuple[str, ...] = field(default=())

    @property
    def laws(self) -> Laws:
        return fit(self.samples)

    @property
    def peak(self) -> float:
        """FLOP/s of the best measured product with both its gradients."""
        return max(6 * s[0] * s[1] * s[2] / t for part, s, t in self.samples if part == "linear")

    @property
    def step_ratio(self) -> float:
        return 1.0  # real steps are in the multipliers already

    @property
    def spread(self) -> float:
        """Standard deviation of the log of a predicted step: what is usual, moved by how left-out steps were missed."""
        if not self.left_out:
            return RATES_SD
        squares = STEPS_WEIGHT * STEPS_SD**2 + sum(x * x for x in self.left_out)
        return (squares / (STEPS_WEIGHT + len(self.left_out))) ** 0.5

    def terms(self, shape: ModelShape, sequences: int, seq_len: int, *, mtp: bool = False) -> tuple[float, ...]:
        """Seconds of each term before its multiplier."""
        laws, total = self.laws, dict.fromkeys(TERMS, 0.0)
        for part, sizes, count in _parts(shape, float(sequences * seq_len), seq_len, mtp):
            inside = attention_inside(part, sizes)
            total["products"] += count * laws.products(part, sizes)
            total["attention"] += count * laws.attend(*inside) if inside else 0.0
            total[_TERM.get(part, "beside")] += count * laws.beside(part, sizes)
        if mtp and shape.mtp_layers:
            total["products"] += shape.mtp_layers * laws.product(sequences * seq_len, shape.d_model, 2 * shape.d_model)
        return tuple(total.values())

    def step_seconds(self, shape: ModelShape, sequences: int, seq_len: int, *, mtp: bool = False) -> float:
        """One optimizer step over `sequences` sequences, in one micro-batch on one device."""
        terms = self.terms(shape, sequences, seq_len, mtp=mtp)
        return sum(a * t for a, t in zip(self.multipliers, terms, strict=True))

    def fitted(self, steps: Sequence[Step]) -> Calibration:
        """With multipliers fitted to real steps, and each step missed by the fit to the others."""
        if not steps:
            return self
        left_out = []
        for i, (shape, sequences, seq_len, seconds) in enumerate(steps if len(steps) >= ENOUGH else ()):
            others = replace(self, multipliers=self._multipliers([*steps[:i], *steps[i + 1 :]]))
            left_out.append(log(others.step_seconds(shape, sequences, seq_len) / seconds))
        return replace(self, multipliers=self._multipliers(steps), steps_measured=len(steps), left_out=tuple(left_out))

    def _multipliers(self, steps: Sequence[Step]) -> tuple[float, ...]:
        n = len(TERMS)
        matrix = [[PRIOR_WEIGHT * (i == j) for j in range(n)] for i in range(n)]
        target = [PRIOR_WEIGHT] * n
        for shape, sequences, seq_len, seconds in steps:
            row = [t / seconds for t in self.terms(shape, sequences, seq_len)]
            for i in range(n):
                target[i] += row[i]
                for j in range(n):
                    matrix[i][j] += row[i] * row[j]
        solved = [sum(c * t for c, t in zip(line, target, strict=True)) for line in inverse(matrix)]
        return tuple(max(0.05, x) for x in solved)

    # ---- for plans
    def chip(self) -> Chip:
        """The machine's device as a chip whose peak is its best measured product."""
        rate = self.exchange.line()[1] if self.exchange.measured else 1.0
        return Chip(
            name=self.host, family="measured", bf16=self.peak, fp8=self.peak, memory_bytes=self.memory_bytes,
            memory_bw=self.bandwidth, link_bw=rate, net_bw=rate,
            node_size=self.exchange.devices, tdp_w=200.0, rent_low=0.05, rent_high=0.2,
            rent_date="a guess", datacenter=False, has_fp8=False,
            efficiency=Efficiency(1, 1, 1, 1, 1, 1, "measured"), source="measured", calibrated=True,
            guesses=("rent and power of this machine",),
        )  # fmt: skip

    def cluster(self, devices: int = 1) -> Cluster:
        return Cluster(self.chip(), devices)

    def found(self, shape: ModelShape, seq_len: int, batch: float, devices: int = 1) -> Found:
        """The faster layout of these devices (experts on each, or spread out): micro-batches of up to 8192 tokens.

        Raises UserError for more devices than there are, or whose messages were not measured.
        """
        if devices > self.devices:
            raise UserError(f"{devices} devices are asked for; {self.devices} of this machine compute at once.")
        if devices > 1 and not self.exchange.measured:
            raise UserError(f"messages between devices were not measured ({self.exchange.why}); plan for one device.")
        spread = [1, devices] if devices > 1 and shape.n_routed and shape.n_routed % devices == 0 else [1]
        each = max(1.0, batch / devices)
        return min((self._laid_out(shape, seq_len, each, devices, ep) for ep in spread), key=lambda f: f.step.seconds)

    def _laid_out(self, shape: ModelShape, seq_len: int, batch: float, devices: int, ep: int) -> Found:
        micro = max(1, min(int(batch), 8192 // seq_len or 1))
        precision = "bf16" if self.kernels.startswith("bfloat16") else "fp32"
        layout = Layout(micro_batch=micro, precision=precision, zero=0, dp=devices, ep=ep)
        times = max(1, round(batch / micro))
        terms = self.terms(shape, micro, seq_len)
        kinds = {name: a * t for name, a, t in zip(TERMS, self.multipliers, terms, strict=True)}
        phases = {k: v * (1 if k == "update" else times) for k, v in kinds.items()}
        if devices > 1:
            phases |= self._messages(shape, micro * seq_len, times, devices, ep)
        step = StepTime(sum(phases.values()), phases, kinds, times, 1.0, micro * times * seq_len * devices)
        return Found(layout, step, memory_per_rank(shape, layout, seq_len, times))

    def _messages(self, shape: ModelShape, tokens: float, times: int, devices: int, ep: int) -> dict[str, float]:
        """Seconds of a step's messages, none of them hidden: FP32 gradients once, tokens there and back twice."""
        count, others = shape.params(), 1 - 1 / devices
        shared = count.total - (count.experts if ep > 1 else 0)
        found = {"gradients": 2 * self.exchange.seconds(4 * shared * others)}  # reduce-scatter and all-gather
        if ep > 1:
            size = 2.0 if self.kernels.startswith("bfloat16") else 4.0
            sent = tokens * shape.n_active * shape.d_model * size * others
            found["all-to-all"] = 4 * times * shape.moe_layers * self.exchange.seconds(sent)
        return found

    def save(self, path: Path) -> None:
        """As JSON, in one move. Raises OSError where it cannot be written."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote. Raises UserError for anything else."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("schema") != SCHEMA:
                raise UserError(f"{path} has schema {raw.get('schema')!r}; run `shoestring plan calibrate` again.")
            kept = {f.name: raw[f.name] for f in fields(cls)}
            kept["samples"] = tuple((part, tuple(sizes), seconds) for part, sizes, seconds in raw["samples"])
            messages = raw["exchange"]
            kept["exchange"] = Exchange(**messages | {"measured": tuple(map(tuple, messages["measured"]))})
            for name in ("multipliers", "left_out", "notes"):
                kept[name] = tuple(raw[name])
            found = cls(**kept)
            if len(found.multipliers) != len(TERMS) or not found.laws.attention:
                raise ValueError("not as many multipliers as terms")
            return found
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no calibration file; make one with `shoestring plan calibrate`.") from None

    def text(self) -> str:
        """For the terminal."""
        pairs = ", ".join(f"{k} x{m:.2f}" for k, m in zip(TERMS, self.multipliers, strict=True))
        missed = ", ".join(f"{exp(x) - 1:+.0%}" for x in self.left_out) or "(too few)"
        tokens, width = 2048.0, 64.0
        attended = self.laws.attend(tokens, 256, 1, width, width)
        rate = 3.5 * 2 * tokens * 256 * (2 * width) / 2 / attended
        return (f"{self.host}, {self.threads} threads, {self.kernels}: best product {self.peak / 1e9:.1f} GFLOP/s with "
                f"its gradients, attention {rate / 1e9:.1f} at length 256 and heads of 64, copy "
                f"{self.bandwidth / 1e9:.1f} GB/s; "
                f"{self.exchange.text()}\n"
                f"from real steps of {self.steps_measured} shapes: {pairs}\n"
                f"80% of predicted steps within {exp(1.2816 * self.spread) - 1:.0%}; left out of the fit, each was "
                f"missed by {missed}")  # fmt: skip


_TERM = {"moe": "experts", "head": "loss", "update": "update"}


def _parts(shape: ModelShape, tokens: float, seq_len: int, mtp: bool) -> list[tuple[str, Sizes, float]]:
    """(part, sizes, how many) of one step: attention and feed-forward of every layer, the head, the update."""
    extra = shape.mtp_layers if mtp else 0
    d, h = shape.d_model, shape.heads
    t, s = tokens, float(seq_len)
    layers = float(shape.layers + extra)
    if shape.kind == "mla":
        latent = (shape.q_lora or 0, shape.kv_lora, shape.qk_nope, shape.qk_rope, shape.v_dim)
        out: list[tuple[str, Sizes, float]] = [("mla", (t, s, d, h, *latent), layers)]
    else:
        out = [("gqa", (t, s, d, h, shape.kv_heads, shape.head_dim), layers)]
    moe = shape.moe_layers + (extra if shape.n_routed else 0)
    dense = layers if shape.dense_residual else layers - moe
    if dense:
        out.append(("ffn", (t, d, shape.ffn), dense))
    if moe:
        shared = shape.shared_width / shape.expert_ffn
        out.append(("moe", (t, d, shape.expert_ffn, shape.n_routed, shape.n_active, shared), float(moe)))
    out.append(("head", (t, d, shape.vocab), 1.0 + extra))
    count = shape.params()
    tensors = layers * (2 + (6 if shape.kind == "mla" else 4)) + 3 * dense + 6 * moe + 3
    return [*out, ("update", (tensors, count.total + (count.mtp if mtp else 0)), 1.0)]
