"""How long a part of a training step takes at sizes that were not measured, from sizes that were.

A part's seconds, forward and backward, are a sum of counts with unknown prices that cannot be negative:

    linear     1, N n k (arithmetic), N k, n k, N n (reading and writing the three matrices)
    attention  for each measured length: per token and head, a + b (width of a query + width of a value)
    gqa, mla, ffn, moe, head   what such a part takes beside its products and attention: norms, rotation, activations,
               sorting, the pass over the vocabulary, calls
    update     tensors, numbers

Prices are fitted to relative errors. What is left of a product's misses is carried to its neighbours (in the logs of
the sizes), because libraries do not run all shapes at one rate. Pure arithmetic: `shoestring.cli_measure` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log

Sizes = tuple[float, ...]
Sample = tuple[str, Sizes, float]  # part, its sizes in the order of SIZES, seconds forward and backward

SIZES = {
    "linear": ("tokens", "out", "in"),
    "attention": ("tokens", "length", "heads", "query", "value"),
    "gqa": ("tokens", "length", "width", "heads", "kv_heads", "head"),
    "mla": ("tokens", "length", "width", "heads", "q_lora", "kv_lora", "nope", "rope", "value"),
    "ffn": ("tokens", "width", "hidden"),
    "moe": ("tokens", "width", "hidden", "experts", "active", "shared"),
    "head": ("tokens", "width", "vocab"),
    "update": ("tensors", "numbers"),
}
LOCAL = 0.5  # how far a product's miss reaches, in the logs of its sizes
TRUST = 0.5  # weight of "no miss" beside that of a measured product at no distance, which is 1


@dataclass(frozen=True, slots=True)
class Law:
    """Prices of a part's counts, and the misses that stay near where they were made."""

    prices: Sizes
    near: tuple[tuple[Sizes, float], ...] = ()  # logs of sizes, log(measured / priced)

    def seconds(self, counts: Sizes, logs: Sizes | None = None) -> float:
        """The price of these counts; `logs` of the sizes ask for the neighbours' misses too."""
        value = sum(p * c for p, c in zip(self.prices, counts, strict=True))
        if logs is None or not self.near:
            return value
        total, weight = 0.0, TRUST
        for place, miss in self.near:
            w = exp(-sum((a - b) ** 2 for a, b in zip(logs, place, strict=True)) / (2 * LOCAL**2))
            total, weight = total + w * miss, weight + w
        return value * exp(total / weight)


def prices(rows: Sequence[tuple[Sizes, float, float]], sweeps: int = 2000) -> Sizes:
    """Prices >= 0 that minimise the sum of ((counts x prices - seconds) / scale)^2: one price at a time, in turn."""
    n = len(rows[0][0])
    scaled = [([c / scale for c in counts], seconds / scale) for counts, seconds, scale in rows]
    square = [[sum(r[i] * r[j] for r, _ in scaled) for j in range(n)] for i in range(n)]
    target = [sum(r[i] * y for r, y in scaled) for i in range(n)]
    found = [0.0] * n
    for _ in range(sweeps):
        moved = 0.0
        for i in range(n):
            if square[i][i] <= 0:
                continue
            rest = sum(square[i][j] * found[j] for j in range(n)) - square[i][i] * found[i]
            new = max(0.0, (target[i] - rest) / square[i][i])
            moved = max(moved, abs(new - found[i]) * square[i][i] ** 0.5)
            found[i] = new
        if moved < 1e-6:
            break
    return tuple(found)


def _linear(tokens: float, out: float, inner: float) -> Sizes:
    return (1.0, tokens * out * inner, tokens * inner, out * inner, tokens * out)


def _gqa(tokens: float, length: float, width: float, heads: float, kv_heads: float, head: float) -> Sizes:
    values = (heads + 2 * kv_heads) * head
    return (1.0, tokens * width, tokens * values, (values + heads * head) * width)


def _mla(
    tokens: float, length: float, width: float, heads: float, q_lora: float, kv_lora: float, nope: float, rope: float,
    value: float,
) -> Sizes:  # fmt: skip
    latent = q_lora + kv_lora + rope
    return (1.0, tokens * width, tokens * latent, tokens * heads * (2 * (nope + rope) + value), latent * width)


def _ffn(tokens: float, width: float, hidden: float) -> Sizes:
    return (1.0, tokens * width, tokens * hidden, width * hidden)


def _moe(tokens: float, width: float, hidden: float, experts: float, active: float, shared: float) -> Sizes:
    pairs = tokens * active
    return (1.0, experts, tokens * width + pairs * width, pairs * hidden + tokens * shared * hidden, tokens * experts,
            (experts + shared) * width * hidden)  # fmt: skip


def _head(tokens: float, width: float, vocab: float) -> Sizes:
    return (1.0, tokens * width, tokens * vocab, vocab * width)


def _update(tensors: float, numbers: float) -> Sizes:
    return (tensors, numbers)


def products_of(part: str, s: Sizes) -> list[tuple[float, float, float, float, bool]]:
    """(tokens, out, in, how many, one of a stack) of the products inside a part."""
    if part == "gqa":
        tokens, _, d, h, g, k = s
        return [(tokens, (h + 2 * g) * k, d, 1, False), (tokens, d, h * k, 1, False)]
    if part == "mla":
        tokens, _, d, h, q, c, nope, rope, v = s
        out = [(tokens, h * (nope + v), c, 1, False), (tokens, d, h * v, 1, False)]
        if q:
            return [(tokens, q + c + rope, d, 1, False), (tokens, h * (nope + rope), q, 1, False), *out]
        return [(tokens, h * (nope + rope) + c + rope, d, 1, False), *out]
    if part == "ffn":
        tokens, d, f = s
        return [(tokens, 2 * f, d, 1, False), (tokens, d, f, 1, False)]
    if part == "moe":
        tokens, d, f, e, a, shared = s
        rows = tokens * a / e
        routed = [(rows, 2 * f, d, e, True), (rows, d, f, e, True), (tokens, e, d, 1, False)]
        return routed + (products_of("ffn", (tokens, d, shared * f)) if shared else [])
    if part == "head":
        tokens, d, v = s
        return [(tokens, v, d, 1, True)]
    return []


COUNTS: dict[str, Callable[..., Sizes]] = {
    "linear": _linear, "gqa": _gqa, "mla": _mla, "ffn": _ffn, "moe": _moe,
    "head": _head, "update": _update,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Laws:
    """The law of each part that was measured."""

    of: dict[str, Law]
    attention: tuple[tuple[float, float, float], ...]  # length, seconds a token and head: fixed, and a unit of width

    def product(self, tokens: float, out: float, inner: float, stacked: bool = False) -> float:
        """Seconds of y = x W and of both gradients; one of a `stacked` pays no call of its own."""
        law, counts = self.of["linear"], _linear(tokens, out, inner)
        if stacked:
            counts = (0.0, *counts[1:])
        return law.seconds(counts, tuple(log(max(1.0, x)) for x in (tokens, out, inner)))

    def products(self, part: str, sizes: Sizes) -> float:
        """Seconds of all products inside a part."""
        return sum(n * self.product(t, o, i, stacked) for t, o, i, n, stacked in products_of(part, sizes))

    def attend(self, tokens: float, length: float, heads: float, query: float, value: float) -> float:
        """Seconds of attention alone, between the two measured lengths around this one; in proportion beyond them."""
        points = self.attention

        def at(point: tuple[float, float, float]) -> float:
            return max(1e-12, point[1] + point[2] * (query + value))

        below = [p for p in points if p[0] <= length] or [points[0]]
        above = [p for p in points if p[0] >= length] or [points[-1]]
        low, high = below[-1], above[0]
        if low[0] == high[0]:
            each = at(low) * max(1.0, length / low[0])
        else:
            share = log(length / low[0]) / log(high[0] / low[0])
            each = at(low) ** (1 - share) * at(high) ** share
        return tokens * heads * each

    def beside(self, part: str, sizes: Sizes) -> float:
        """Seconds of a part without its products and attention; 0 for a part that was not measured."""
        law = self.of.get(part)
        return 0.0 if law is None else law.seconds(COUNTS[part](*sizes))


def attention_inside(part: str, s: Sizes) -> Sizes | None:
    """Sizes of the attention inside a part, if it has any."""
    if part == "gqa":
        return (s[0], s[1], s[3], s[5], s[5])
    return (s[0], s[1], s[3], s[6] + s[7], s[8]) if part == "mla" else None


@lru_cache(maxsize=8)
def fit(samples: tuple[Sample, ...]) -> Laws:
    """The laws of what was measured. `linear` and `attention` must be among it."""
    by: dict[str, list[tuple[Sizes, float]]] = {}
    for part, sizes, seconds in samples:
        by.setdefault(part, []).append((sizes, seconds))
    linear = Law(prices([(_linear(*s), t, t) for s, t in by["linear"]]))
    near = tuple((tuple(log(x) for x in s), log(t / linear.seconds(_linear(*s)))) for s, t in by["linear"])
    laws = Laws({"linear": Law(linear.prices, near)}, _attended(by["attention"]))
    for part in ("gqa", "mla", "ffn", "moe", "head", "update"):
        if part in by:
            laws.of[part] = Law(_beside(laws, part, by[part]))
    return laws


def _attended(rows: list[tuple[Sizes, float]]) -> tuple[tuple[float, float, float], ...]:
    lengths = sorted({s[1] for s, _ in rows})
    found = []
    for length in lengths:
        here = [(s[3] + s[4], t / (s[0] * s[2])) for s, t in rows if s[1] == length]
        fixed, width = prices([((1.0, wide), each, each) for wide, each in here])
        found.append((length, fixed, width))
    return tuple(found)


def _beside(laws: Laws, part: str, rows: list[tuple[Sizes, float]]) -> Sizes:
    """Prices of what a part does beside products and attention, so that the whole part is least wrong, relatively."""
    left = []
    for sizes, seconds in rows:
        inside = attention_inside(part, sizes)
        known = laws.products(part, sizes) + (laws.attend(*inside) if inside else 0.0)
        left.append((COUNTS[part](*sizes), seconds - known, seconds))
    return prices(left)
