"""Which kernels a machine runs fastest for a model: measured on a small probe at the model's own sizes.

The probe is one pair of the model's blocks with fresh weights. Candidates take turns, so that a machine that slows
down for a moment slows them all; each counts by its best time, since what disturbs only ever adds.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from shoestring.core.config import Config
from shoestring.nn import attention_native
from shoestring.nn.decoder import Decoder
from shoestring.nn.experts import Experts
from shoestring.nn.kernels import Kernels, wait

REPEATS = 5
SECONDS = 1.5  # no new round after this
TOKENS = 8192  # a probe takes no more than this; rates change little beyond


class Probed(Protocol):
    """A family's config: it knows how to build the probe."""

    def probe(self, *, device: str, generator: torch.Generator) -> Decoder: ...


def candidates(
    probe: Decoder, *, dtype: str | None = None, experts: str | None = None, device: str = "cpu"
) -> list[Kernels]:
    """All kernels that apply to this model on this device, but for what the caller has fixed."""
    routed = next((module for module in probe.modules() if isinstance(module, Experts)), None)
    found = []
    for kind in ("float32", "bfloat16") if dtype is None else (dtype,):
        ways = ["loop"]
        if routed is not None:
            aligned = 8 if kind == "bfloat16" else 4  # 16 bytes
            grouped = all(size % aligned == 0 for size in routed.down_proj.shape[1:])
            ways = [experts] if experts is not None else ["loop", "bmm", *(["grouped"] if grouped else [])]
        attention, elements = attentions(kind, device)[0], between(kind, device)
        found += [
            Kernels(dtype=cast(Any, kind), experts=cast(Any, way), attention=attention, elements=elements)
            for way in ways
        ]
    return found


def attentions(dtype: str, device: str = "cpu") -> list[Literal["native", "blocks", "sdpa"]]:
    """The ways to attend that apply here; first the one to take where nothing is measured."""
    if device != "cpu":
        return ["sdpa"]
    if attention_native.why_not(Kernels(dtype=cast(Any, dtype)).torch_dtype, torch.device(device)) is not None:
        return ["blocks"]
    return ["native", "blocks"] if attention_native.is_fast() else ["blocks", "native"]


def between(dtype: str, device: str = "cpu") -> Literal["native", "torch"]:
    """How to compute what lies between the products: in C where it can be had, which was faster at every size tried."""
    missing = attention_native.why_not(Kernels(dtype=cast(Any, dtype)).torch_dtype, torch.device(device))
    return "native" if missing is None else "torch"


def label(kernels: Kernels) -> str:
    """A candidate's name in the record."""
    return f"{kernels.dtype} {kernels.experts} {kernels.attention}"


def choose_kernels(
    config: Config, tokens: int, seq_len: int, *, dtype: str | None = None, experts: str | None = None,
    device: str = "cpu",
) -> tuple[Kernels, dict[str, Any]]:  # fmt: skip
    """The fastest candidate for a step over `tokens` tokens in sequences of `seq_len`, and what was measured.

    `dtype` and `experts` fix that choice. The record: {"tokens", "seq_len", "ms": {candidate: best},
    "chosen"}. Uses a generator of its own: torch's global one is not touched.
    """
    generator = torch.Generator(device).manual_seed(0)
    probe = cast(Probed, config).probe(device=device, generator=generator)
    T = max(1, min(seq_len, tokens, TOKENS))
    shape = (max(1, min(tokens, TOKENS) // T), T)
    tokens_BT = torch.randint(0, len(probe.embedding), shape, generator=generator, device=device)
    least = _least(probe, candidates(probe, dtype=dtype, experts=experts, device=device), tokens_BT)
    best = min(least, key=lambda kernels: least[kernels])
    others = [dataclasses.replace(best, attention=way) for way in attentions(best.dtype, device)]
    if len(others) > 1:  # only now: with all candidates it would take twice as long, and one does not hang on the other
        for kernels, time_taken in _least(probe, others, tokens_BT).items():
            least[kernels] = min(time_taken, least.get(kernels, time_taken))
        best = min(others, key=lambda kernels: least[kernels])
    ms = {label(kernels): round(1e3 * time_taken, 3) for kernels, time_taken in least.items()}
    return best, {"tokens": tokens_BT.numel(), "seq_len": T, "ms": ms, "chosen": label(best)}


def _least(probe: Decoder, choices: list[Kernels], tokens_BT: Tensor) -> dict[Kernels, float]:
    """The best time of each, taking turns."""
    seconds: dict[Kernels, list[float]] = {kernels: [] for kernels in choices}
    for kernels in choices:  # the first time compiles and allocates
        _step(probe, kernels, tokens_BT)
    end = time.perf_counter() + SECONDS
    for repeat in itertools.count():
        if repeat == REPEATS or (repeat and time.perf_counter() > end):
            break
        for kernels in choices:
            seconds[kernels].append(_step(probe, kernels, tokens_BT))
    return {kernels: min(times) for kernels, times in seconds.items()}


@torch.enable_grad()
def _step(probe: Decoder, kernels: Kernels, tokens_BT: Tensor) -> float:
    """Seconds of one forward and backward, without the head (it is the same for all)."""
    probe.kernels = kernels
    probe.zero_grad(set_to_none=True)
    wait(tokens_BT.device)
    start = time.perf_counter()
    probe(tokens_BT, logits=False).hidden_BTD.float().square().mean().backward()
    wait(tokens_BT.device)
    return time.perf_counter() - start
