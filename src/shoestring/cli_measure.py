"""Measuring this machine for `plan calibrate`: products, attention, copies, operations, then real training steps.

Medians of repeated runs after a warm-up; on a busy machine the figures are those of a busy machine.
"""

# ruff: noqa: E501 (tables of sizes)
from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from shoestring.cost.calibrate import Calibration
from shoestring.cost.shape import ModelShape

SIDES = ((512, 64, 64), (512, 256, 256), (2048, 64, 64), (2048, 256, 64), (2048, 256, 256), (2048, 512, 256), (2048, 1024, 512),
         (256, 256, 2048), (256, 64, 2048), (4096, 768, 256), (4096, 4096, 256), (4096, 256, 4096), (256, 4096, 4096))  # fmt: skip
# Real steps: (kind, width, layers, heads, ffn, experts, vocabulary, sequences, length).
STEPS = (("dense", 128, 2, 4, 384, 0, 512, 16, 128), ("dense", 256, 4, 8, 768, 0, 1024, 8, 256), ("dense", 192, 6, 6, 512, 0, 256, 32, 64),
         ("moe", 128, 3, 4, 256, 8, 512, 16, 128), ("moe", 256, 4, 8, 512, 16, 1024, 4, 256), ("moe", 96, 2, 4, 256, 8, 256, 32, 64))  # fmt: skip


def timed(work: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds after two warm-ups. One thread is timed by its CPU time, so that neighbours disturb it less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work(), work()
    taken = []
    for _ in range(repeats):
        start = clock()
        work()
        taken.append(clock() - start)
    return median(taken)


def gemm_rates() -> list[tuple[float, float, float, float]]:
    """FLOP/s of FP32 products."""
    out = []
    for m, n, k in SIDES:
        a, b = torch.randn(m, k), torch.randn(k, n)
        out.append((float(m), float(n), float(k), 2 * m * n * k / timed(partial(torch.mm, a, b))))
    return out


def attention_rates(length: int, heads: int = 8, dim: int = 32, tokens: int = 2048) -> tuple[float, float, float]:
    """(length, causal FLOP/s forward, backward) of our own CPU attention."""
    from shoestring.nn.attention_blocks import attend_blocks

    batch = max(1, tokens // length)
    q, k, v = (torch.randn(batch, heads, length, dim, requires_grad=True) for _ in range(3))
    flops = 2 * batch * heads * length * length * dim * 2 / 2

    def both() -> None:
        attend_blocks(q, k, v, dim**-0.5, None).sum().backward()

    with torch.no_grad():
        forward = timed(partial(attend_blocks, q, k, v, dim**-0.5, None))
    return float(length), flops / forward, 2.5 * flops / max(timed(both) - forward, 0.2 * forward)


def bandwidth(numbers: int = 16_000_000) -> float:
    """Bytes a second of an addition into a third array (two reads, one write)."""
    a, b, out = torch.ones(numbers), torch.ones(numbers), torch.empty(numbers)
    return 12 * numbers / timed(lambda: torch.add(a, b, out=out))


def per_operation() -> float:
    """Seconds of an operation on almost nothing."""
    a = torch.ones(8)

    def many() -> None:
        for _ in range(200):
            a.add(1.0)

    return timed(many) / 200


def step_model(kind: str, d: int, layers: int, heads: int, ffn: int, experts: int, vocab: int) -> Any:
    """A small model of ours, dense (Llama) or V3-shaped."""
    if kind == "dense":
        from shoestring.models.dense import Dense, DenseConfig

        return Dense(DenseConfig.from_hf({
            "model_type": "llama", "vocab_size": vocab, "hidden_size": d, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": ffn,
        }))  # fmt: skip
    from shoestring.models.deepseek import Deepseek, DeepseekConfig

    return Deepseek(DeepseekConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=ffn, moe_intermediate_size=ffn // 4, num_hidden_layers=layers,
        num_attention_heads=heads, q_lora_rank=None, kv_lora_rank=d // 4, qk_nope_head_dim=d // heads,
        qk_rope_head_dim=max(4, d // heads // 2), v_head_dim=d // heads, first_k_dense_replace=1, n_routed_experts=experts,
        num_experts_per_tok=2, n_shared_experts=1,
    ))  # fmt: skip


def step_seconds(model: Any, sequences: int, length: int, repeats: int = 5) -> float:
    """Median seconds of a real training step: forward, loss, backward, clipping, AdamW."""
    from shoestring.losses import next_token
    from shoestring.losses._tokens import Tokens

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, model.config.vocab_size, (sequences, length + 1))
    ids = tokens[:, 1:].flatten()

    def step() -> None:
        hidden = model(tokens[:, :-1], logits=False).hidden_BTD.flatten(0, 1)
        loss, _ = next_token.loss(hidden, model.head_weight, Tokens(ids, torch.ones(len(ids))))
        (loss / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, repeats)


def real_steps(cases: tuple[Any, ...] = STEPS) -> list[tuple[ModelShape, int, int, float]]:
    """(shape, sequences, length, seconds) of real steps of our own models."""
    out = []
    for *sizes, sequences, length in cases:
        torch.manual_seed(0)
        model = step_model(*sizes)
        out.append((model.config.shape(), sequences, length, step_seconds(model, sequences, length)))
    return out


def measure(threads: int = 0, steps: bool = True) -> Calibration:
    """Everything; about a minute."""
    if threads:
        torch.set_num_threads(threads)
    bare = Calibration(
        host=f"{platform.machine()} {platform.node() and 'CPU'}".strip(), threads=torch.get_num_threads(),
        gemms=tuple(gemm_rates()), attention=tuple(attention_rates(t) for t in (32, 64, 128, 256, 512, 1024)),
        bandwidth=bandwidth(),
        per_operation=per_operation(), memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    )  # fmt: skip
    return bare.fitted(real_steps()) if steps else bare
