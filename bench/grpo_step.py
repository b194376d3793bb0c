"""One GRPO step: 32 prompts x 8 samples x 128 new tokens, ours against TRL's GRPOTrainer, same weights and reward.

The model is the 12M-parameter V3 configuration of train_step.py; every completion runs to 128 tokens (no end token), no
KL, one update a rollout. TRL is timed as its users run it on a CPU: SDPA, all threads, fp32 and bf16, one batch or
micro-batches of 64 completions; all are tried first and the best goes on, in turn with ours.

    python bench/grpo_step.py --peers all --repeats 3
    python bench/grpo_step.py --peers none --small
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import _bench
from train_step import CONFIG, SMALL

PEERS = [f"trl {dtype} {batch}" for dtype in ("fp32", "bf16") for batch in ("256", "64x4")]


def share_of_digits(texts: list[str]) -> list[float]:
    """The reward of both: cheap, and different from completion to completion."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def serve_ours(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import functools

    import torch

    from shoestring.core.nouns import Sampling
    from shoestring.data.batch import packed_batches
    from shoestring.infer.engine import Engine
    from shoestring.losses import policy
    from shoestring.models import checkpoint
    from shoestring.nn.kernels import Kernels
    from shoestring.optim.make import optimizers
    from shoestring.recipes.quickstart import EXAM
    from shoestring.train.advantage import advantages
    from shoestring.train.configs import Optim, RlStage
    from shoestring.train.rollouts import answer_groups, rollout_example
    from shoestring.train.step import TrainState, train_step

    torch.set_num_threads(options["threads"])
    model, tokenizer = checkpoint.load(options["folder"], dtype="float32")
    dtype = "bfloat16" if options["dtype"] == "auto" else options["dtype"]
    model.kernels = Kernels(dtype=dtype)
    stage = RlStage(name="bench", steps=1, mix=EXAM, optim=Optim(lr=1e-5, warmup_steps=0), balance_alpha=0.0)
    state = TrainState(model, optimizers(model, "adamw", lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0))
    engine, asked = Engine(model, tokenizer), _problems(options)
    never = (model.config.vocab_size - 1,)  # an id no token of the tokenizer has
    sampling = Sampling(n=options["group"], max_new_tokens=options["new"], stop_ids=never)

    def step() -> dict[str, Any]:
        clock = [time.perf_counter()]
        groups = answer_groups(engine, tokenizer, asked, sampling)
        clock.append(time.perf_counter())
        for group in groups:
            rewards = share_of_digits([r.completion.text for r in group])
            for rollout, advantage in zip(group, advantages(rewards, "grpo"), strict=True):
                rollout.advantage = advantage
        examples = [rollout_example(r) for group in groups for r in group]
        batches = packed_batches(examples, row_tokens=256, tokens_per_microbatch=8192, pad_id=tokenizer.pad)
        clock.append(time.perf_counter())
        train_step(state, batches, functools.partial(policy.loss, clip_high=0.2), stage, progress=0.0)
        engine.update_weights(model)
        clock.append(time.perf_counter())
        parts = [b - a for a, b in pairwise(clock)]
        new = sum(len(r.completion.token_ids) for group in groups for r in group)
        return dict(zip(("generate_s", "reward_s", "update_s"), parts, strict=True)) | {"new_tokens": new}

    channel.serve(step, kernels=str(model.kernels))


def _problems(options: dict[str, Any]) -> list[Any]:
    from itertools import islice

    from shoestring.data.textbook import problems
    from shoestring.recipes.quickstart import EXAM

    return list(islice(problems(EXAM, 1), options["prompts"]))


def serve_trl(who: str, options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options["threads"])
    _, dtype, batch = who.split()
    rows, accumulate = (options["prompts"] * options["group"], 1) if batch == "256" else (
        options["prompts"] * options["group"] // 4, 4)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        options["folder"], dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(options["folder"])
    lengths: list[int] = []

    class OneStepEachTimeItIsAsked(TrainerCallback):  # type: ignore[misc]
        clock: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if channel.ask() is None:
                sys.exit(0)
            self.clock = _bench.Clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            channel.answer(*self.clock.read(), new_tokens=sum(lengths))
            lengths.clear()

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return share_of_digits(completions)

    config = GRPOConfig(
        output_dir=options["folder"] + "/trl", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate, num_generations=options["group"],
        max_completion_length=options["new"], temperature=1.0, top_k=0, top_p=1.0, beta=0.0, learning_rate=1e-5,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        max_steps=10_000, generation_kwargs={"min_new_tokens": options["new"]},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in options["texts"]]),
        callbacks=[OneStepEachTimeItIsAsked()],
    )  # fmt: skip
    channel.ready()
    trainer.train()


def make(folder: Path, small: bool) -> None:
    """A checkpoint with its tokenizer, both as ours saves them."""
    from itertools import islice

    import torch

    from shoestring.data.textbook import solved
    from shoestring.models import checkpoint
    from shoestring.models.deepseek import Deepseek, DeepseekConfig
    from shoestring.recipes.quickstart import LEARN
    from shoestring.text.tokenizer import Tokenizer

    texts = (f"{p.prompt} {p.voices['long'].thinking} {p.voices['long'].answer}" for p, _ in solved(LEARN, 0, 0.5))
    tokenizer = Tokenizer.train(list(islice(texts, 500)), 400)
    config = DeepseekConfig.from_dict(CONFIG | (SMALL if small else {}))
    checkpoint.save(Deepseek(config, generator=torch.Generator().manual_seed(0)), tokenizer, folder)


def main() -> int:
    options = _bench.parser(__doc__ or "", repeats=3).parse_args()
    if options.serve:
        serve_ours(options.options) if options.serve == "ours" else serve_trl(options.serve, options.options)
        return 0
    script, sizes = Path(__file__).resolve(), {"prompts": 32, "group": 8, "new": 128}
    if options.small:
        sizes = {"prompts": 4, "group": 4, "new": 8}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.small)
        asked = {"folder": folder, "threads": options.threads, "dtype": options.dtype, **sizes}
        asked["texts"] = [problem.prompt for problem in _problems(asked)]

        def contestant(who: str, python: str) -> _bench.Contestant:
            return _bench.Contestant(who, script, who, asked, options.threads, python)

        peers = [contestant(who, options.peer_python) for who in _bench.wanted(options.peers, PEERS)]
        ran, reasons = _bench.scout(peers, warm_up=0, repeats=1)
        best = [contestant(peer.name, options.peer_python) for peer in ran[:1]]
        with _bench.opened([contestant("ours", sys.executable), *best]) as everyone:
            _bench.interleave(everyone, warm_up=min(1, options.warm_up), repeats=options.repeats)
    return report(everyone, ran, reasons, options)


def report(everyone: list[Any], scouted: list[Any], reasons: dict[str, str], options: Any) -> int:
    ours = everyone[0]
    lines = [
        [c.name, _bench.spread(c.kept()), _bench.spread(c.kept("cpu_seconds")), f"{c.peak_mb:.0f}",
         str(c.steps[-1]["new_tokens"])]
        for c in [*everyone, *(s for s in scouted if s.name not in {e.name for e in everyone})]
    ]  # fmt: skip
    lines += [[name, reason, "-", "-", "-"] for name, reason in reasons.items()]
    print(_bench.table(["who", "s a step", "CPU s", "peak MB", "new tokens"], lines))
    parts = {p: statistics.median(ours.kept(p)) for p in ("generate_s", "reward_s", "update_s")}
    print(f"\nours: {ours.facts['kernels']}; " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    seconds = {c.name: statistics.median(c.kept()) for c in everyone[1:]}
    print(json.dumps([
        _bench.result("grpo_step", "time", "s", statistics.median(ours.kept()), seconds, small=options.small,
                      versions=_bench.versions("torch", "transformers", "shoestring"), **parts),
    ]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
