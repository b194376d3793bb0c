"""One training step of a 12M-parameter DeepSeek-V3 model: ours, transformers' in its best mode, and the GEMM limit.

The same weights (ours, saved and loaded there), the same tokens, batch 8 x 512, forward, loss over the vocabulary,
backward, clip, AdamW. transformers runs DeepseekV3ForCausalLM with SDPA in {fp32, bf16, bf16 autocast} x {eager,
grouped_mm} experts; all are tried alone first and the best two go on, in turn with ours.

    python bench/train_step.py --peers all --repeats 7
    python bench/train_step.py --peers none --small
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import _bench

CONFIG = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 128,
    "num_hidden_layers": 6, "num_attention_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "initializer_range": 0.02,
    "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
PEERS = [f"{dtype} {experts}" for dtype in ("fp32", "bf16", "autocast") for experts in ("eager", "grouped_mm")]


def sizes(small: bool) -> tuple[dict[str, Any], int, int]:
    return (CONFIG | SMALL, 2, 64) if small else (CONFIG, 8, 512)


def tokens(rows: int, length: int, vocab: int) -> Any:
    import torch

    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def serve_ours(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch
    from shoestring.nn.choose import choose_kernels

    from shoestring.data.batch import stream_batch
    from shoestring.losses import next_token
    from shoestring.models import checkpoint
    from shoestring.nn.kernels import Kernels
    from shoestring.optim.make import optimizers
    from shoestring.recipes.quickstart import LEARN
    from shoestring.train.configs import Optim, SftStage, Textbook
    from shoestring.train.step import TrainState, train_step

    torch.set_num_threads(options["threads"])
    model, _ = checkpoint.load(options["folder"], dtype="float32")
    if options["dtype"] == "auto":
        model.kernels, _ = choose_kernels(model.config, options["rows"] * options["length"], options["length"])
    else:
        model.kernels = Kernels(dtype=options["dtype"])
    stage = SftStage(name="bench", steps=1, textbook=Textbook(mix=LEARN), optim=Optim(lr=1e-4, warmup_steps=0),
                     balance_alpha=0.0)  # fmt: skip
    made = optimizers(model, "adamw", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    state = TrainState(model, made)
    batch = stream_batch(tokens(options["rows"], options["length"], model.config.vocab_size).numpy())

    def step() -> dict[str, Any]:
        return {"loss": train_step(state, [batch], next_token.loss, stage, progress=0.0).loss}

    limit = max(_gemm(dtype) for dtype in (torch.float32, torch.bfloat16))
    flops = options["rows"] * options["length"] * model.config.shape().flops_per_token(options["length"])
    channel.serve(step, kernels=str(model.kernels), gemm=limit, flops=flops)


def _gemm(dtype: Any) -> float:
    from shoestring.train.machine import gemm_rate

    return gemm_rate(dtype, size=2048)


def serve_peer(who: str, options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options["threads"])
    dtype, experts = who.split()
    model = AutoModelForCausalLM.from_pretrained(
        options["folder"], dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, attn_implementation="sdpa",
        experts_implementation=experts,
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
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

    channel.serve(step)


def make_weights(folder: Path, config: dict[str, Any]) -> None:
    import torch

    from shoestring.models import checkpoint
    from shoestring.models.deepseek import Deepseek, DeepseekConfig

    model = Deepseek(DeepseekConfig.from_dict(config), generator=torch.Generator().manual_seed(0))
    checkpoint.save(model, None, folder)


def main() -> int:
    options = _bench.parser(__doc__ or "", repeats=7).parse_args()
    if options.serve:
        serve_ours(options.options) if options.serve == "ours" else serve_peer(options.serve, options.options)
        return 0
    config, rows, length = sizes(options.small)
    script = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder), config)
        asked = {"folder": folder, "rows": rows, "length": length, "threads": options.threads, "dtype": options.dtype}

        def contestant(who: str, python: str) -> _bench.Contestant:
            return _bench.Contestant(who, script, who, asked, options.threads, python)

        peers = [contestant(who, options.peer_python) for who in _bench.wanted(options.peers, PEERS)]
        ran, reasons = _bench.scout(peers, warm_up=1, repeats=2)
        best = [contestant(peer.name, options.peer_python) for peer in ran[:2]]
        with _bench.opened([contestant("ours", sys.executable), *best]) as everyone:
            _bench.interleave(everyone, warm_up=options.warm_up, repeats=options.repeats)
    return report(everyone, ran, reasons, options)


def report(everyone: list[Any], scouted: list[Any], reasons: dict[str, str], options: Any) -> int:
    ours, limit = everyone[0], everyone[0].facts["flops"] / everyone[0].facts["gemm"]
    lines = [
        [c.name, _bench.spread(c.kept()), _bench.spread(c.kept("cpu_seconds")), f"{c.peak_mb:.0f}",
         f"{c.steps[0]['loss']:.4f}", f"{limit / statistics.median(c.kept()):.1%}"]
        for c in [*everyone, *(s for s in scouted if s.name not in {e.name for e in everyone})]
    ]  # fmt: skip
    lines += [[name, reason, "-", "-", "-", "-"] for name, reason in reasons.items()]
    print(_bench.table(["who", "s a step", "CPU s", "peak MB", "first loss", "of the GEMM limit"], lines))
    print(f"\nours: {ours.facts['kernels']}; GEMM {ours.facts['gemm'] / 1e9:.0f} GFLOP/s: {limit:.3f} s at that rate")
    seconds = {c.name: statistics.median(c.kept()) for c in everyone[1:]}
    memory = {c.name: c.peak_mb for c in everyone[1:]}
    packages = _bench.versions("torch", "transformers", "shoestring")
    print(json.dumps([
        _bench.result("train_step", "time", "s", statistics.median(ours.kept()), seconds, limit=limit,
                      versions=packages, small=options.small),
        _bench.result("train_step", "peak memory", "MB", ours.peak_mb, memory, versions=packages, small=options.small),
    ]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
