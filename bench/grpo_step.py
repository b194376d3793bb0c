"""One GRPO step: 32 prompts x 8 samples x 128 new tokens, ours against TRL's GRPOTrainer, same weights and reward.

The model is the 12M-parameter V3 configuration of train_step.py. Both read the same prompt ids; every completion runs
to 128 tokens (no end token), temperature 1 over the whole vocabulary, no KL, one update a rollout, on policy. Ours is
what the stage does (train/rollouts.py, losses/policy.py, train/step.py). TRL is timed as its users run it on a CPU at
its best: SDPA, no gradient checkpointing, fp32, bf16 weights or bf16 autocast, all 256 completions generated at once
and trained in micro-batches of 64 or 16. All are tried first, the best two go on in turn with ours, a turn ten
seconds at least (ours would else be timed after a minute's sleep, which costs it 0.4 s of 2.9). Their phases are
timed by wrapping `_generate_single_turn` and `_calculate_rewards`; the rest of a step is loss and update. The limit:
the FLOPs of rollout and update as our stage counts them, at the rate of a square product of 2048 in the faster of fp32
and bf16 (256 rows at once are bound by products, not by reading weights).

    python bench/grpo_step.py --peers all --repeats 3
    python bench/grpo_step.py --peers none --small
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import _bench
from train_step import CONFIG, SMALL, serve_gemm

PEERS = [f"trl {dtype} {parts}" for dtype, parts in product(("fp32", "bf16", "autocast"), ("4x64", "16x16"))]
PHASES = ("generate_s", "reward_s", "update_s")


def share_of_even(ids: Sequence[int]) -> float:
    """The reward of both: cheap, and different from completion to completion whatever the model says."""
    return sum(i % 2 == 0 for i in ids) / len(ids)


# ---- the contestants, each in a process of its own
def serve_ours(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch

    from shoestring.core.nouns import Sampling
    from shoestring.data.batch import packed_batches
    from shoestring.infer.engine import Engine
    from shoestring.losses import policy
    from shoestring.models import checkpoint
    from shoestring.nn.choose import choose_kernels
    from shoestring.optim.make import optimizers
    from shoestring.recipes.quickstart import EXAM
    from shoestring.train.configs import Optim, RlStage
    from shoestring.train.machine import keep_freed_memory
    from shoestring.train.rl import own_tokens, row_tokens
    from shoestring.train.rollouts import advantages, answer_groups, lengths_of, prompt_ids, rollout_example
    from shoestring.train.step import TrainState, sampling_flops, train_step

    torch.set_num_threads(options["threads"])
    keep_freed_memory()  # as every stage does
    model, tokenizer = checkpoint.load(options["folder"], dtype="float32")
    assert tokenizer is not None
    asked = problems(options["prompts"])
    length = max(len(prompt_ids(problem, tokenizer)) for problem in asked) + options["new"]
    fixed = None if options["dtype"] == "auto" else options["dtype"]
    model.kernels, record = choose_kernels(model.config, 8192, length, dtype=fixed)
    optim = Optim(lr=1e-5, weight_decay=0.0, warmup_steps=0, schedule="constant")
    stage = RlStage(name="bench", steps=1, mix=EXAM, optim=optim, balance_alpha=0.0, bias_gamma=0.0,
                    row_tokens=-(-length // 8) * 8)  # fmt: skip
    state = TrainState(model, optimizers(model, "adamw", lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0))
    engine, objective = Engine(model, tokenizer), partial(policy.loss, clip_high=0.2)
    sampling = Sampling(n=options["group"], max_new_tokens=options["new"], ignore_eos=True)

    def step() -> dict[str, Any]:
        clock = [time.perf_counter()]
        groups = answer_groups(engine, tokenizer, asked, sampling)
        engine.let_go()
        clock.append(time.perf_counter())
        for group in groups:
            rewards = [share_of_even(rollout.completion.token_ids) for rollout in group]
            for rollout, advantage in zip(group, advantages(rewards, "grpo"), strict=True):
                rollout.advantage = advantage
        clock.append(time.perf_counter())
        rollouts = [rollout for group in groups for rollout in group]
        batches = packed_batches(
            [rollout_example(rollout, own=own_tokens(stage, model)) for rollout in rollouts],
            row_tokens=row_tokens(stage, model, groups),
            tokens_per_microbatch=stage.tokens_per_microbatch, pad_id=tokenizer.pad,
        )  # fmt: skip
        stats = train_step(state, batches, objective, stage, progress=0.0)
        engine.update_weights(model)
        clock.append(time.perf_counter())
        seconds = zip(PHASES, (after - before for before, after in pairwise(clock)), strict=True)
        return dict(seconds) | {
            "new_tokens": sum(len(rollout.completion.token_ids) for rollout in rollouts),
            "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in rollouts),
            "ratio_error": stats.metrics["ratio_error"],
            "flops": stats.flops + sampling_flops(model, lengths_of(groups)),
        }

    if options.get("profile"):
        from train_step import profile

        profile(step)
    channel.serve(step, kernels=record)


def serve_trl(who: str, options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options["threads"])
    _, dtype, parts = who.split()
    completions, accumulated = options["prompts"] * options["group"], int(parts.split("x")[0])
    model = AutoModelForCausalLM.from_pretrained(
        options["folder"], dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, attn_implementation="sdpa"
    )
    seen: dict[str, float] = {}

    class OneStepEachTimeItIsAsked(TrainerCallback):  # type: ignore[misc]
        clock: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if channel.ask() is None:
                sys.exit(0)
            seen.clear()
            self.clock = _bench.Clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds, cpu_seconds = self.clock.read()
            update = seconds - seen["generate_s"] - seen["reward_s"]
            channel.answer(seconds, cpu_seconds, update_s=update, **seen)

    def timed(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = method(*args, **kwargs)
            seen[phase] = seen.get(phase, 0.0) + time.perf_counter() - start
            return found

        return call

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen["new_tokens"] = sum(map(len, completion_ids))
        return [share_of_even(ids) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=options["folder"] + "/trl", use_cpu=True, bf16=dtype != "fp32", fp16=False,
        gradient_checkpointing=False, per_device_train_batch_size=completions // accumulated,
        gradient_accumulation_steps=accumulated, num_generations=options["group"], beta=0.0, temperature=1.0, top_k=0,
        top_p=1.0, max_completion_length=options["new"], generation_kwargs={"min_new_tokens": options["new"]},
        learning_rate=1e-5, adam_beta2=0.95, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1, max_steps=10_000,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config,
        processing_class=AutoTokenizer.from_pretrained(options["folder"]),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in options["texts"]]),
        callbacks=[OneStepEachTimeItIsAsked()],
    )  # fmt: skip
    single_turn = timed("generate_s", trainer._generate_single_turn)

    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        seen["prompt_tokens"] = sum(map(len, prompt_ids))
        return single_turn(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = generate
    trainer._calculate_rewards = timed("reward_s", trainer._calculate_rewards)
    channel.ready(versions=_bench.versions("torch", "transformers", "trl", "accelerate"))
    trainer.train()


# ---- the benchmark
def problems(count: int) -> list[Any]:
    from shoestring.data.textbook import problems as stream
    from shoestring.recipes.quickstart import EXAM

    return list(islice(stream(EXAM, 1), count))


def make(folder: Path, small: bool) -> Any:
    """A checkpoint with its tokenizer, both as ours saves them. Returns the tokenizer."""
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
    return tokenizer


def main() -> int:
    parser = _bench.parser(__doc__ or "", repeats=3)
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time, and stop")
    options = parser.parse_args()
    if options.serve:
        known = {"ours": serve_ours, "gemm": serve_gemm}
        known.get(options.serve, partial(serve_trl, options.serve))(options.options)
        return 0
    script, sizes = Path(__file__).resolve(), {"prompts": 32, "group": 8, "new": 128}
    if options.small:
        sizes = {"prompts": 4, "group": 4, "new": 8}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make(Path(folder), options.small)
        from shoestring.train.rollouts import prompt_ids

        # TRL is given the rendered chat as text: its tokenizer is the same, and turns it into the same ids.
        texts = [tokenizer.decode(prompt_ids(problem, tokenizer)) for problem in problems(sizes["prompts"])]
        asked = {"folder": folder, "threads": options.threads, "dtype": options.dtype, "texts": texts,
                 "gemm_size": 256 if options.small else 2048, **sizes}  # fmt: skip
        if options.profile:
            serve_ours(asked | {"profile": True})
            return 0

        def contestant(who: str, python: str = sys.executable) -> _bench.Contestant:
            return _bench.Contestant(who, script, who, asked, options.threads, python)

        peers = [contestant(who, options.peer_python) for who in _bench.wanted(options.peers, PEERS)]
        ran, reasons = _bench.scout(peers, warm_up=0, repeats=1)
        best = [contestant(peer.name, options.peer_python) for peer in ran[:2]]
        with _bench.opened([contestant("ours"), *best, contestant("gemm")]) as everyone:
            _bench.interleave(everyone, warm_up=min(1, options.warm_up), repeats=options.repeats,
                              turn=0.0 if options.small else 10.0)  # fmt: skip
    *timed, gemm = everyone
    report(timed, gemm, ran, reasons, options)
    return 0


def report(
    timed: list[_bench.Contestant], gemm: _bench.Contestant, scouted: list[_bench.Contestant],
    reasons: dict[str, str], options: Namespace,
) -> None:  # fmt: skip
    """The table, and the JSON line. A mode that was only tried counts with what the trial gave."""
    ours = timed[0]
    rate = max(statistics.median(gemm.kept(name)) for name in ("float32", "bfloat16"))
    limit = statistics.median(ours.kept("flops")) / rate
    finalists = {c.name for c in timed}
    shown = [*timed, *(c for c in scouted if c.name not in finalists)]
    lines = [
        [
            c.name, str(len(c.kept())), _bench.spread(c.kept(), 2),
            *(f"{statistics.median(c.kept(phase)):.2f}" for phase in PHASES), _bench.spread(c.kept("cpu_seconds"), 2),
            f"{c.peak_mb:.0f} ({c.facts['start_mb']:.0f})",
            f"{c.steps[-1]['prompt_tokens']}, {c.steps[-1]['new_tokens']}",
            f"{limit / statistics.median(c.kept()):.1%}",
        ]
        for c in shown
    ]  # fmt: skip
    lines += [[name, "0", reason, *["-"] * 7] for name, reason in reasons.items()]
    head = ["who", "steps", "s a step", "generate", "reward", "loss + update", "CPU s", "peak MB (at start)",
            "prompt, new tokens", "of the GEMM limit"]  # fmt: skip
    print(_bench.table(head, lines))
    error = statistics.median(ours.kept("ratio_error"))
    print(
        f"\nours: {ours.facts['kernels']['chosen']}; mean |sampler - trainer logprob| {error:.1e}; "
        f"{statistics.median(ours.kept('flops')) / 1e12:.2f} TFLOP a step, {rate / 1e9:.0f} GFLOP/s"
    )
    versions = _bench.versions("torch", "shoestring") | {
        f"peer {name}": number for c in scouted[:1] for name, number in c.facts["versions"].items()
    }
    common: dict[str, Any] = {"versions": versions, "small": options.small, "failed": reasons}

    def entry(metric: str, unit: str, value: Callable[[_bench.Contestant], float], **more: Any) -> dict[str, Any]:
        theirs = {c.name: value(c) for c in shown[1:]}
        return _bench.result("grpo_step", metric, unit, value(ours), theirs, **common, **more)

    phases = {c.name: {phase: statistics.median(c.kept(phase)) for phase in PHASES} for c in shown}
    print(json.dumps([
        entry("time", "s", lambda c: statistics.median(c.kept()), limit=limit, phases=phases,
              gemm_flops=rate, kernels=ours.facts["kernels"]),
        entry("processor time", "s", lambda c: statistics.median(c.kept("cpu_seconds"))),
        entry("peak memory", "MB", lambda c: c.peak_mb),
    ]))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
