"""One training step of a 12M-parameter DeepSeek-V3 model: ours, transformers' in its best mode, and the GEMM limit.

Batch 8 x 512: forward, loss over the vocabulary, backward, clipping, AdamW. The same weights (ours, saved and loaded
there), the same tokens, the same two parameter groups; no multi-token prediction, balance loss or router-bias update on
either side, so that the losses can be compared step by step. transformers runs DeepseekV3ForCausalLM in {fp32, bf16
weights, bf16 autocast} x {eager, grouped_mm} experts x {sdpa, eager} attention: each is tried alone first, and the best
two go on in turn with ours. The limit: the step's FLOPs (ModelShape.flops_per_token) at the rate of a square product
of 2048, in whichever of fp32 and bf16 is faster, measured in the same rounds. torch.compile is left out: it needs a
C++ compiler.

    python bench/train_step.py --peers all --repeats 7
    python bench/train_step.py --peers none --small
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import _bench

CONFIG = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 128,
    "num_hidden_layers": 6, "num_attention_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "initializer_range": 0.02,
    "max_position_embeddings": 1024, "num_nextn_predict_layers": 0,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
PEERS = [" ".join(mode) for mode in product(("fp32", "bf16", "autocast"), ("eager", "grouped_mm"), ("sdpa", "eager"))]
OPTIM = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def sizes(small: bool) -> tuple[dict[str, Any], int, int]:
    """Config, rows and length."""
    return (CONFIG | SMALL, 2, 64) if small else (CONFIG, 8, 512)


def tokens(rows: int, length: int, vocab: int) -> Any:
    import torch

    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


# ---- the contestants, each in a process of its own
def serve_ours(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch

    from shoestring.data.batch import stream_batch
    from shoestring.losses import next_token
    from shoestring.models import checkpoint
    from shoestring.nn.choose import choose_kernels
    from shoestring.optim.make import optimizers
    from shoestring.recipes.quickstart import LEARN
    from shoestring.train.configs import Optim, SftStage, Textbook
    from shoestring.train.machine import keep_freed_memory
    from shoestring.train.step import TrainState, train_step

    torch.set_num_threads(options["threads"])
    keep_freed_memory()  # as every stage does
    rows, length = options["rows"], options["length"]
    model, _ = checkpoint.load(options["folder"], dtype="float32")
    fixed = None if options["dtype"] == "auto" else options["dtype"]
    model.kernels, record = choose_kernels(model.config, rows * length, length, dtype=fixed)
    stage = SftStage(name="bench", steps=1, textbook=Textbook(mix=LEARN), balance_alpha=0.0, bias_gamma=0.0,
                     optim=Optim(warmup_steps=0, schedule="constant", **OPTIM))  # fmt: skip
    state = TrainState(model, optimizers(model, "adamw", **OPTIM))
    batch = stream_batch(tokens(rows, length, model.config.vocab_size).numpy())

    def step() -> dict[str, Any]:
        return {"loss": train_step(state, [batch], next_token.loss, stage, progress=0.0).loss}

    if options.get("profile"):
        profile(step)
    flops = rows * length * model.config.shape().flops_per_token(length)
    channel.serve(step, kernels=record, flops=flops, parameters=model.config.shape().params().total)


def profile(step: Any) -> None:
    """Where our step spends its time, operation by operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for _ in range(2):
        step()
    with record(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
    totals = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(e.self_cpu_time_total for e in totals)
    for e in totals[:15]:
        milliseconds = e.self_cpu_time_total / 3e3
        print(f"{e.self_cpu_time_total / whole:6.1%} {milliseconds:8.1f} ms a step {e.count // 3:5d} x {e.key}")


def serve_gemm(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch

    from shoestring.train.machine import gemm_rate

    torch.set_num_threads(options["threads"])

    size = options["gemm_size"]

    def step() -> dict[str, Any]:
        return {name: gemm_rate(getattr(torch, name), size=size, repeats=3) for name in ("float32", "bfloat16")}

    channel.serve(step)


def serve_peer(who: str, options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options["threads"])
    dtype, experts, attention = who.split()
    model = AutoModelForCausalLM.from_pretrained(
        options["folder"], dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, attn_implementation=attention,
        experts_implementation=experts,
    ).train()  # fmt: skip
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True, **OPTIM)
    ids = tokens(options["rows"], options["length"], model.config.vocab_size)

    def step() -> dict[str, Any]:
        cast = torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()
        with cast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach())}

    channel.serve(step, versions=_bench.versions("torch", "transformers"))


def serve(who: str, options: dict[str, Any]) -> None:
    if who in ("ours", "gemm"):
        (serve_ours if who == "ours" else serve_gemm)(options)
    else:
        serve_peer(who, options)


# ---- the benchmark
def make_weights(folder: Path, config: dict[str, Any]) -> None:
    import torch

    from shoestring.models import checkpoint
    from shoestring.models.deepseek import Deepseek, DeepseekConfig

    model = Deepseek(DeepseekConfig.from_dict(config), generator=torch.Generator().manual_seed(0))
    checkpoint.save(model, None, folder)


def main() -> int:
    parser = _bench.parser(__doc__ or "", repeats=7)
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time, and stop")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.options)
        return 0
    config, rows, length = sizes(options.small)
    script = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder), config)
        asked = {"folder": folder, "rows": rows, "length": length, "threads": options.threads, "dtype": options.dtype}
        asked["gemm_size"] = 256 if options.small else 2048
        if options.profile:
            serve_ours(asked | {"profile": True})
            return 0

        def contestant(who: str, python: str = sys.executable) -> _bench.Contestant:
            return _bench.Contestant(who, script, who, asked, options.threads, python)

        peers = [contestant(who, options.peer_python) for who in _bench.wanted(options.peers, PEERS)]
        ran, reasons = _bench.scout(peers, warm_up=1, repeats=2)
        best = [contestant(peer.name, options.peer_python) for peer in ran[:2]]
        with _bench.opened([contestant("ours"), *best, contestant("gemm")]) as everyone:
            _bench.interleave(everyone, warm_up=options.warm_up, repeats=options.repeats)
    *timed, gemm = everyone
    report(timed, gemm, ran, reasons, options)
    return 0


def report(
    timed: list[_bench.Contestant], gemm: _bench.Contestant, scouted: list[_bench.Contestant],
    reasons: dict[str, str], options: Namespace,
) -> None:  # fmt: skip
    """The table, and the JSON line. A mode that was only tried counts with what the trial gave."""
    ours = timed[0]
    rates = {name: statistics.median(gemm.kept(name)) for name in ("float32", "bfloat16")}
    limit = ours.facts["flops"] / max(rates.values())
    finalists = {c.name for c in timed}
    shown = [*timed, *(c for c in scouted if c.name not in finalists)]
    lines = []
    for c in shown:
        losses = [step["loss"] for step in c.steps]
        lines.append([
            c.name, str(len(c.kept())), _bench.spread(c.kept()), _bench.spread(c.kept("cpu_seconds")),
            f"{c.peak_mb:.0f} ({c.facts['start_mb']:.0f})", f"{losses[0]:.4f}, {losses[2]:.4f}" if losses[2:] else "-",
            f"{limit / statistics.median(c.kept()):.1%}",
        ])  # fmt: skip
    lines += [[name, "0", reason, *["-"] * 4] for name, reason in reasons.items()]
    head = ["who", "steps", "s a step", "CPU s", "peak MB (at start)", "loss of steps 1, 3", "of the GEMM limit"]
    print(_bench.table(head, lines))
    print(
        f"\nours: {ours.facts['kernels']['chosen']}, {ours.facts['parameters']:,} parameters, "
        f"{ours.facts['flops'] / 1e9:.0f} GFLOP a step; products: "
        + ", ".join(f"{name} {_bench.spread([r / 1e9 for r in gemm.kept(name)], 0)} GFLOP/s" for name in rates)
    )
    versions = _bench.versions("torch", "shoestring") | {
        f"peer {name}": number for c in scouted[:1] for name, number in c.facts["versions"].items()
    }
    seconds = {c.name: statistics.median(c.kept()) for c in shown[1:]}
    processor = {c.name: statistics.median(c.kept("cpu_seconds")) for c in shown[1:]}
    memory = {c.name: c.peak_mb for c in shown[1:]}
    common: dict[str, Any] = {"versions": versions, "small": options.small, "failed": reasons}
    print(json.dumps([
        _bench.result("train_step", "time", "s", statistics.median(ours.kept()), seconds, limit=limit,
                      gemm_flops=rates, kernels=ours.facts["kernels"], **common),
        _bench.result("train_step", "processor time", "s", statistics.median(ours.kept("cpu_seconds")), processor,
                      **common),
        _bench.result("train_step", "peak memory", "MB", ours.peak_mb, memory, **common),
    ]))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
