"""What needs a trained checkpoint: the quality that int8 weights cost, and what the MTP module's drafts bring.

int8: both engines read the same texts (the completions that the checkpoint itself writes to a task's problems, at
temperature 1, after their prompts), once with the checkpoint's weights in bf16 and once in int8: perplexity, agreement
of the likeliest token. The speed of int8 is in bench/decode.py. Drafts: the same answers with and without, in turn:
the share of drafts that were right, tokens a second.

    python bench/trained.py runs/teacher-rl-quickstart-.../checkpoints/step_300
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import _bench
from grpo_step import problems


def read(engine: Any, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[list[float], list[int]]:
    """Logprob of every completion token, and the likeliest token there."""
    from shoestring.core.nouns import Sampling

    own, top = [], []
    groups = engine.generate(list(texts), Sampling(temperature=0.0, max_new_tokens=1, prompt_logprobs=1))
    for (completion,), text, start in zip(groups, texts, starts, strict=True):
        for pairs, token in list(zip(completion.prompt_logprobs, text, strict=True))[start:]:
            own.append(next(logprob for name, logprob in pairs if name == token))
            top.append(max(pairs, key=lambda pair: pair[1])[0])
    return own, top


def drafts(model: Any, tokenizer: Any, prompts: list[list[int]], repeats: int) -> list[list[str]]:
    """Rows of the second table: batch, temperature, acceptance, tokens a second without and with."""
    from shoestring.core.nouns import Sampling
    from shoestring.infer.engine import Engine

    rows = []
    for batch, temperature in ((1, 0.0), (16, 0.0), (16, 1.0), (64, 1.0)):
        sampling = Sampling(temperature=temperature, max_new_tokens=64, seed=0)
        engines = {way: Engine(model, tokenizer, speculative=way, prefix_cache=False) for way in (False, True)}
        paces: dict[bool, list[float]] = {False: [], True: []}
        for round_ in range(repeats + 1):
            for way, engine in engines.items():
                start, new = time.perf_counter(), 0
                for first in range(0, min(len(prompts), 8 * batch), batch):
                    groups = engine.generate(prompts[first : first + batch], sampling)
                    new += sum(len(one.token_ids) for (one,) in groups)
                if round_:
                    paces[way].append(new / (time.perf_counter() - start))
        stats = engines[True].stats()
        share = stats["spec_decode_num_accepted_tokens"] / max(1, stats["spec_decode_num_draft_tokens"])
        off, on = (statistics.median(paces[way]) for way in (False, True))
        rows.append([str(batch), str(temperature), f"{share:.1%}", f"{off:.0f}", f"{on:.0f}", f"{on / off:.2f}x"])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="?", help="a trained checkpoint with its tokenizer (default: a quickstart's)"
    )
    parser.add_argument("--problems", type=int, default=300, help="texts to read (default 300)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of the drafts (default 3)")
    options = parser.parse_args()
    here = sorted((_bench.ROOT / "runs").glob("teacher-rl-quickstart-*/checkpoints/step_*"))
    if options.checkpoint is None and not here:
        print("no trained checkpoint in runs/: name one, or run `make quickstart` first")
        return 0

    import torch

    from shoestring.core.nouns import Sampling
    from shoestring.infer.engine import Engine
    from shoestring.models import checkpoint
    from shoestring.train.rollouts import prompt_ids

    model, tokenizer = checkpoint.load(options.checkpoint or here[-1], dtype="bfloat16")
    if tokenizer is None:
        raise SystemExit(f"{options.checkpoint} has no tokenizer; name a checkpoint of a run.")
    prompts = [prompt_ids(problem, tokenizer) for problem in problems(options.problems)]
    engines = {"bf16": Engine(model, tokenizer), "int8": Engine(model, tokenizer, quantise="int8")}
    written = engines["bf16"].generate(prompts, Sampling(temperature=1.0, max_new_tokens=96, seed=0))
    texts = [[*prompt, *one.token_ids] for prompt, (one,) in zip(prompts, written, strict=True)]
    starts = [len(prompt) for prompt in prompts]
    found = {name: read(engine, texts, starts) for name, engine in engines.items()}
    same = sum(a == b for a, b in zip(found["bf16"][1], found["int8"][1], strict=True))
    tokens = len(found["bf16"][0])
    perplexity = {name: math.exp(-sum(own) / tokens) for name, (own, _) in found.items()}
    rows = [[name, f"{value:.4f}", f"{value / perplexity['bf16']:.4f}"] for name, value in perplexity.items()]
    print(_bench.table(["weights", "perplexity", "of bf16's"], rows))
    print(f"\nsame likeliest token at {same / tokens:.2%} of {tokens} tokens; {torch.get_num_threads()} threads")
    if len(model.mtp):
        head = ["batch", "temperature", "drafts right", "tokens/s without", "with", ""]
        for dtype in ("bfloat16", "float32"):
            model, tokenizer = checkpoint.load(options.checkpoint or here[-1], dtype=dtype)
            print(f"\n{dtype}\n" + _bench.table(head, drafts(model, tokenizer, prompts, options.repeats)))
    print(json.dumps([{"name": "int8", "perplexity": perplexity, "same_top": same / tokens, "tokens": tokens,
                       "versions": _bench.versions("torch", "shoestring")}]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
