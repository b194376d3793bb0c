"""Measuring this machine for `plan calibrate`: the parts of a step, copies, messages, then real training steps.

The best of repeated runs after a warm-up, in rounds; a machine that is never quiet is measured as it is.
"""

# ruff: noqa: E501 (tables of sizes)
from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shoestring.cli_exchange import measure_exchange
from shoestring.cli_timed import ROUNDS, Bench, samples, timed
from shoestring.core.errors import UserError
from shoestring.cost.calibrate import Calibration, Exchange, Step
from shoestring.cost.laws import Sample
from shoestring.nn.choose import choose_kernels, label
from shoestring.nn.kernels import Kernels
from shoestring.train.machine import keep_freed_memory

# Real steps: (kind, width, layers, heads, ffn, experts, vocabulary, sequences, length).
STEPS = (
    ("dense", 128, 2, 4, 384, 0, 512, 16, 128), ("dense", 256, 4, 8, 768, 0, 1024, 8, 256), ("dense", 192, 6, 6, 512, 0, 256, 32, 64),
    ("dense", 384, 2, 6, 1024, 0, 4096, 4, 256), ("dense", 96, 3, 3, 256, 0, 8192, 4, 512),
    ("moe", 128, 3, 4, 256, 8, 512, 16, 128), ("moe", 256, 4, 8, 512, 16, 1024, 4, 256), ("moe", 96, 2, 4, 256, 8, 256, 32, 64),
    ("moe", 192, 3, 6, 768, 8, 8192, 8, 128), ("moe", 320, 2, 5, 1024, 32, 512, 4, 512),
)  # fmt: skip


def bandwidth(device: torch.device, numbers: int = 16_000_000) -> float:
    """Bytes a second of an addition into a third array (two reads, one write)."""
    a, b, out = (torch.ones(numbers, device=device) for _ in range(3))
    return 12 * numbers / timed(lambda: torch.add(a, b, out=out), device=device)


def step_model(
    kind: str, d: int, layers: int, heads: int, ffn: int, experts: int, vocab: int, *, device: str = "cpu"
) -> Any:
    """A small model of ours, dense (Llama) or V3-shaped."""
    generator = torch.Generator(device).manual_seed(0)
    if kind == "dense":
        from shoestring.models.dense import Dense, DenseConfig

        return Dense(DenseConfig.from_hf({
            "model_type": "llama", "vocab_size": vocab, "hidden_size": d, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": ffn,
        }), device=device, generator=generator)  # fmt: skip
    from shoestring.models.deepseek import Deepseek, DeepseekConfig

    return Deepseek(DeepseekConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=ffn, moe_intermediate_size=ffn // 4, num_hidden_layers=layers,
        num_attention_heads=heads, q_lora_rank=None, kv_lora_rank=d // 4, qk_nope_head_dim=d // heads,
        qk_rope_head_dim=max(4, d // heads // 2), v_head_dim=d // heads, first_k_dense_replace=1, n_routed_experts=experts,
        num_experts_per_tok=2, n_shared_experts=1,
    ), device=device, generator=generator)  # fmt: skip


def training_step(model: Any, sequences: int, length: int) -> Callable[[], Any]:
    """The optimiser step of every stage (train/step.py) on this model and random tokens, ready to be taken."""
    from shoestring.data.batch import stream_batch
    from shoestring.losses import next_token
    from shoestring.optim.make import optimizers
    from shoestring.train.configs import Optim, PretrainStage, TextFiles
    from shoestring.train.step import TrainState, train_step

    stage = PretrainStage(name="timed", steps=1, inputs={"model": ""}, corpus=TextFiles(files=("",)), corpus_tokens=1,
                          optim=Optim(lr=1e-4, warmup_steps=0, schedule="constant"))  # fmt: skip
    optim = stage.optim
    made = optimizers(model, "adamw", lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    state = TrainState(model, made)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (sequences, length))
    batch = stream_batch(ids)
    return lambda: train_step(state, [batch], next_token.loss, stage, progress=0.0)


def step_seconds(model: Any, sequences: int, length: int, repeats: int = 5) -> float:
    """Seconds of a real training step: forward, loss, backward, clipping, AdamW, balance."""
    return timed(training_step(model, sequences, length), repeats, model.embedding.device)


def real_steps(bench: Bench, cases: tuple[Any, ...] = STEPS, rounds: int = 2, each: int = 3) -> list[Step]:
    """(shape, sequences, length, seconds) of real steps of our own models: the best over rounds, the cases in turn.

    In turn, so that a machine that slows down slows all of them.
    """
    best = [float("inf")] * len(cases)
    shapes: list[Any] = [None] * len(cases)
    for _ in range(rounds):
        for i, (*sizes, sequences, length) in enumerate(cases):
            model = step_model(*sizes, device=bench.device.type)
            model.kernels = bench.kernels
            shapes[i] = model.config.shape()
            best[i] = min(best[i], step_seconds(model, sequences, length, each))
    return [(shapes[i], case[-2], case[-1], best[i]) for i, case in enumerate(cases)]


def in_rounds(bench: Bench, cases: tuple[Any, ...], rounds: int) -> tuple[tuple[Sample, ...], list[Step]]:
    """Parts and real steps in the same rounds, the least of each.

    A processor has faster and slower minutes. Parts timed in one and steps in another disagree by as much, and the
    multipliers can make that good for large models only: products are most of those, and calls of small ones.
    """
    parts: tuple[Sample, ...] = ()
    steps: list[Step] = []
    for _ in range(rounds):
        parts = tuple(_quieter(parts, samples(bench, rounds=1)))
        steps = _quieter(steps, real_steps(bench, cases, 1))
    return parts, steps


def _quieter(before: Sequence[Any], now: Sequence[Any]) -> list[Any]:
    """Rows whose last entry is seconds: the lesser of both."""
    if not before:
        return list(now)
    return [(*new[:-1], min(old[-1], new[-1])) for old, new in zip(before, now, strict=True)]


def chosen_kernels(device: str, dtype: str = "float32") -> Kernels:
    """What training would choose here for a small V3 model in this format, experts one after another."""
    config = step_model("moe", 256, 2, 8, 512, 8, 512).config
    experts = "loop" if device == "cpu" else None
    return choose_kernels(config, 2048, 256, dtype=dtype, experts=experts, device=device)[0]


def memory_of(device: torch.device) -> float:
    """Bytes of memory of the device."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def name_of(device: torch.device) -> str:
    """What the plan calls it; no host name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def make_bench(device: str = "cpu", dtype: str = "float32") -> Bench:
    """Raises UserError for a device that is not there."""
    if device != "cpu":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f'--device is "{device}", which torch does not find here; use cpu.') from error
    keep_freed_memory()  # as every stage does
    return Bench(device, chosen_kernels(device, dtype))


def together(device: torch.device) -> int:
    """How many devices compute at once at the measured rates: GPUs, or processes of as many threads as were used."""
    if device.type != "cpu":
        return torch.accelerator.device_count() if device.type == "cuda" else 1
    return max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())


def bare(bench: Bench, parts: tuple[Sample, ...]) -> Calibration:
    """The parts of a step, without real steps and messages."""
    return Calibration(
        host=name_of(bench.device), threads=torch.get_num_threads(), samples=parts,
        bandwidth=bandwidth(bench.device), memory_bytes=memory_of(bench.device), device=bench.device.type,
        devices=together(bench.device), kernels=f"{label(bench.kernels)} {bench.kernels.elements}",
    )  # fmt: skip


def measure(
    threads: int = 0, steps: bool = True, *, device: str = "cpu", dtype: str = "float32", messages: bool = True
) -> Calibration:
    """Everything; two to four minutes on a CPU. Raises UserError for a device that is not there."""
    if threads:
        torch.set_num_threads(threads)
    bench = make_bench(device, dtype)
    exchange = Exchange(1, "", (), "left out by --no-messages")
    if messages:
        exchange = measure_exchange(device, max(2, together(bench.device)))
    parts, taken = in_rounds(bench, STEPS, ROUNDS) if steps else (samples(bench), [])
    return replace(bare(bench, parts), exchange=exchange).fitted(taken)


def measured_with(cases: tuple[Any, ...], rounds: int, fitted: int) -> tuple[Calibration, list[Step]]:
    """The CPU fitted to the first cases' real steps, and the steps of all cases, timed in the same rounds."""
    bench = make_bench()
    parts, steps = in_rounds(bench, cases, rounds)
    return bare(bench, parts).fitted(steps[:fitted]), steps
