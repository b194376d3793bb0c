"""Planning on a machine that was measured: products, attention, copies, then real steps.

A step of training on one chip is, in seconds,

    a*products + b*attention + c*element-wise + d*operations + e*update

where each term is counted from the shape and divided by a measured rate, and a..e are multipliers near 1, fitted to
a few real steps with a prior at 1 (ridge). Without real steps they are 1. No messages: one chip. No torch here;
`shoestring.cli_measure` takes the measurements.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import exp, log
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster, Efficiency
from shoestring.cost.layout import Layout
from shoestring.cost.memory import memory_per_rank
from shoestring.cost.residual import inverse
from shoestring.cost.search import Found
from shoestring.cost.shape import ModelShape
from shoestring.cost.step import StepTime
from shoestring.cost.work import Gemm, layer_gemms

SCHEMA = 1
TERMS = ("products", "attention", "element-wise", "operations", "update")
OPERATIONS = 90  # of one layer, forward and backward: counted in a profile of a small model; scaled by the fit
TRAFFIC = 3.0  # forward and backward over forward
UPDATE_BYTES = 36  # AdamW in FP32: read parameter, gradient, two moments; write three; the norm reads once more
PRIOR_WEIGHT = 0.02  # of the prior at 1, against relative errors of real steps
RATES_SD = 0.13  # of the log of a plan's time from measured rates alone: -10/+25% at 80%, an estimate
STEPS_SD = 0.08  # the same after real steps, -5/+15%: an estimate, which the misses of left-out steps then move
STEPS_WEIGHT = 4  # how many left-out steps that estimate is worth
ENOUGH = 4  # shapes from which on leaving one out says something

Step = tuple[ModelShape, int, int, float]  # shape, sequences, sequence length, measured seconds of one optimizer step


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured rates of one machine. `gemms`: (m, n, k, FLOP/s) of single products in the training format."""

    host: str
    threads: int
    gemms: tuple[tuple[float, float, float, float], ...]
    attention: tuple[
        tuple[float, float, float], ...
    ]  # length, causal FLOP/s forward and backward, as our kernel does it
    bandwidth: float  # bytes/s of a large copy, read and write counted
    per_operation: float  # seconds
    memory_bytes: float
    multipliers: tuple[float, ...] = (1.0,) * len(TERMS)
    steps_measured: int = 0  # shapes whose real steps were fitted
    left_out: tuple[float, ...] = ()  # log(predicted / measured) of each, with multipliers fitted to the others
    schema: int = SCHEMA
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> float:
        return max(g[3] for g in self.gemms)

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

    def gemm_rate(self, m: float, n: float, k: float) -> float:
        """FLOP/s of a product, from the measured ones nearest in the logs of its sides (inverse square distance)."""
        total = weight = 0.0
        for gm, gn, gk, rate in self.gemms:
            away = log(m / gm) ** 2 + log(n / gn) ** 2 + log(k / gk) ** 2
            w = 1 / (away + 0.05)
            total, weight = total + w * log(rate), weight + w
        return float(2.718281828459045 ** (total / weight))

    def attention_rates(self, length: int) -> tuple[float, float]:
        """(forward, backward) FLOP/s at a length, between the two measured ones around it; the nearest beyond them."""
        points = sorted(self.attention)
        below = [p for p in points if p[0] <= length] or points[:1]
        above = [p for p in points if p[0] >= length] or points[-1:]
        (x0, f0, b0), (x1, f1, b1) = below[-1], above[0]
        share = 0.0 if x0 == x1 else log(length / x0) / log(x1 / x0)
        return f0 * (f1 / f0) ** share, b0 * (b1 / b0) ** share

    def terms(self, shape: ModelShape, sequences: int, seq_len: int, *, mtp: bool = False) -> tuple[float, ...]:
        """Seconds of each term before its multiplier."""
        tokens = float(sequences * seq_len)
        products = sum(self._three(g) for g in _products(shape, tokens, mtp))
        flops = tokens * shape.attention_flops(seq_len, mtp=mtp)
        forward, backward = self.attention_rates(seq_len)
        attention = flops / forward + 2.5 * flops / backward
        layers = shape.layers + (shape.mtp_layers if mtp else 0)
        bytes_moved = TRAFFIC * tokens * (layers * _numbers(shape) + 3 * shape.vocab) * 4
        experts = shape.moe_layers * shape.n_routed * 12
        count = shape.params().total + (shape.params().mtp if mtp else 0)
        return (products, attention, bytes_moved / self.bandwidth, (layers * OPERATIONS + experts) * self.per_operation,
                count * UPDATE_BYTES / self.bandwidth)  # fmt: skip

    def _three(self, g: Gemm) -> float:
        flops = 2 * g.m * g.n * g.k * g.count
        rates = (self.gemm_rate(g.m, g.n, g.k), self.gemm_rate(g.m, g.k, g.n), self.gemm_rate(g.k, g.n, g.m))
        return sum(flops / rate for rate in rates)

    def step_seconds(self, shape: ModelShape, sequences: int, seq_len: int, *, mtp: bool = False) -> float:
        """One optimizer step over `sequences` sequences, in one micro-batch."""
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
        """The machine as a chip whose peak is its best measured product."""
        return Chip(
            name=self.host, family="measured", bf16=self.peak, fp8=self.peak, memory_bytes=self.memory_bytes,
            memory_bw=self.bandwidth, link_bw=1.0, net_bw=1.0, node_size=1, tdp_w=200.0, rent_low=0.05, rent_high=0.2,
            rent_date="a guess", tpp=None, pd=None, io_gb_s=0.0, datacenter=False, has_fp8=False,
            efficiency=Efficiency(1, 1, 1, 1, 1, 1, "measured"), source="measured", calibrated=True,
            guesses=("rent and power of this machine",),
        )  # fmt: skip

    def cluster(self) -> Cluster:
        return Cluster(self.chip(), 1)

    def found(self, shape: ModelShape, seq_len: int, batch: float) -> Found:
        """The one layout of one machine: micro-batches of up to 8192 tokens in FP32."""
        micro = max(1, min(int(batch), 8192 // seq_len or 1))
        layout = Layout(micro_batch=micro, precision="fp32", zero=0)
        times = max(1, round(batch / micro))
        terms = self.terms(shape, micro, seq_len)
        kinds = {name: a * t for name, a, t in zip(TERMS, self.multipliers, terms, strict=True)}
        phases = {k: v * (1 if k == "update" else times) for k, v in kinds.items()}
        step = StepTime(sum(phases.values()), phases, kinds, times, 1.0, micro * times * seq_len)
        return Found(layout, step, memory_per_rank(shape, layout, seq_len, times))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

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
            raw = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            return cls(**raw | {k: tuple(map(tuple, raw[k])) for k in ("gemms", "attention")})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no calibration file; make one with `shoestring plan calibrate`.") from None

    def text(self) -> str:
        """For the terminal."""
        pairs = ", ".join(f"{k} x{m:.2f}" for k, m in zip(TERMS, self.multipliers, strict=True))
        missed = ", ".join(f"{exp(x) - 1:+.0%}" for x in self.left_out) or "(too few)"
        return (f"{self.host}, {self.threads} threads: best product {self.peak / 1e9:.1f} GFLOP/s, attention "
                f"{self.attention_rates(256)[0] / 1e9:.1f} and {self.attention_rates(256)[1] / 1e9:.1f} at 256, copy "
                f"{self.bandwidth / 1e9:.1f} GB/s, {self.per_operation * 1e6:.1f} us an operation\n"
                f"from real steps of {self.steps_measured} shapes: {pairs}\n"
                f"80% of predicted steps within {exp(1.2816 * self.spread) - 1:.0%}; left out of the fit, each was "
                f"missed by {missed}")  # fmt: skip


def _products(shape: ModelShape, tokens: float, mtp: bool) -> list[Gemm]:
    """All products of one forward pass."""
    out: list[Gemm] = []
    extra = shape.mtp_layers if mtp else 0
    for moe, layers in ((True, shape.moe_layers + (extra if shape.n_routed else 0)),
                        (False, shape.layers - shape.moe_layers + (0 if shape.n_routed else extra))):  # fmt: skip
        if layers:
            out += [replace(g, count=g.count * layers) for g in layer_gemms(shape, tokens, 1, 1, moe)]
    out.append(Gemm(tokens, shape.vocab, shape.d_model, 1 + extra))
    if extra:
        out.append(Gemm(tokens, shape.d_model, 2 * shape.d_model, extra))
    return out


def _numbers(shape: ModelShape) -> float:
    """Numbers read and written outside products, forward, one token and layer (norms, residuals, rope, activation)."""
    d = shape.d_model
    heads = shape.heads * (2 * shape.qk_dim + shape.value_dim)
    share = shape.moe_layers / shape.layers if shape.n_routed else 0.0
    width = (1 - share) * shape.ffn + share * (shape.n_active * shape.expert_ffn + shape.shared_width)
    return 12 * d + 2 * heads + 3 * width + share * 4 * shape.n_active * d
