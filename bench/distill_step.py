"""One step of distillation: SFT, off-policy, on-policy; ours against TRL's trainers, same weights and tokens.

Student: Qwen2 128 x 2, teacher 256 x 4, random weights, vocabulary 32,768 or 151,936. Off-policy and SFT read the same
ids (prompt 64, completion to 512, loss on the completion); forward KL, as GKDTrainer at lambda 0, beta 0. On-policy
writes 64 new tokens to prompts of 32 (no end token), reverse KL: GKDTrainer at lambda 1, beta 1; DistillationTrainer.
TRL runs on the CPU as its users would run it at its best: fp32 or bf16 autocast, SDPA, no gradient checkpointing; its
collator is replaced by one that hands over the finished ids, so that no rendering is timed on either side. Ours is what
the stage does: train/lessons.py, losses/, train/step.py. The limit: the step's FLOPs, heads counted on the tokens that
carry loss, at the rate of a square product of 2048 in the faster of fp32 and bf16. Sampling has no such limit here.

    python bench/distill_step.py --case off --vocab 32768 --peers all --repeats 3
    python bench/distill_step.py --case on --peers none --small
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench

STUDENT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2}  # fmt: skip
TEACHER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
           "num_key_value_heads": 4}  # fmt: skip
PEERS = {"sft": ("SFTTrainer",), "off": ("GKDTrainer",), "on": ("GKDTrainer", "DistillationTrainer")}
DTYPES = ("fp32", "autocast")
WORDS = "the quick brown fox jumps over a lazy dog and asks why nobody ever thinks of the dog when"


def sizes(case: str, vocab: int, small: bool) -> dict[str, int]:
    """Rows, prompt and completion tokens."""
    if small:
        return {"rows": 2, "prompt": 8, "new": 8}
    if case == "on":
        return {"rows": 8 if vocab < 100_000 else 4, "prompt": 32, "new": 64}
    return {"rows": 4 if vocab < 100_000 else 1, "prompt": 64, "new": 448}


def tokens(options: dict[str, Any]) -> Any:
    """[rows, prompt + new] ids, the same for all; prompts are what text can spell."""
    import torch

    generator = torch.Generator().manual_seed(1)
    rows, prompt, new = options["rows"], options["prompt"], options["new"]
    asked = torch.tensor(options["prompt_ids"])[None, :prompt].repeat(rows, 1)
    return torch.cat([asked, torch.randint(0, options["vocab"], (rows, new), generator=generator)], dim=1)


# ---- the contestants, each in a process of its own
def serve_ours(options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    from functools import partial

    import torch

    from shoestring.core.nouns import Sampling
    from shoestring.data.batch import Example, packed_batches
    from shoestring.infer.engine import Engine
    from shoestring.losses import forward_kl, next_token, reverse_kl
    from shoestring.losses._teacher import Hidden
    from shoestring.models import checkpoint
    from shoestring.nn.choose import attentions, between
    from shoestring.nn.kernels import Kernels
    from shoestring.optim.make import optimizers
    from shoestring.train.configs import Optim, SftStage
    from shoestring.train.machine import keep_freed_memory
    from shoestring.train.step import TrainState, flat_tokens, train_step

    torch.set_num_threads(options["threads"])
    case, dtype = options["case"], "bfloat16" if options["dtype"] == "auto" else options["dtype"]
    student, tokenizer = checkpoint.load(options["folder"] + "/student", dtype="float32")
    kernels = Kernels(dtype=dtype, attention=attentions(dtype)[0], elements=between(dtype))  # as in a stage
    keep_freed_memory()
    student.kernels = kernels
    teacher = None
    if case != "sft":
        teacher, _ = checkpoint.load(options["folder"] + "/teacher", dtype="float32", frozen=lambda config: kernels)
    optim = Optim(lr=1e-5, warmup_steps=0, schedule="constant", weight_decay=0.0)
    stage = SftStage(name="bench", inputs={"model": "m", "traces": "t"}, steps=1, optim=optim, balance_alpha=0.0)
    state = TrainState(student, optimizers(student, "adamw", lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0))
    objective = {"sft": next_token.loss, "off": forward_kl.loss, "on": reverse_kl.loss}[case]
    rows_BT = tokens(options).tolist()
    prompt, new = options["prompt"], options["new"]
    weight = [0.0] * prompt + [1.0] * new
    engine = Engine(student, tokenizer, room=state.room) if case == "on" else None
    sampling = Sampling(max_new_tokens=new, ignore_eos=True)

    def step() -> dict[str, Any]:
        began, written = time.perf_counter(), rows_BT
        if engine is not None:
            engine.update_weights(student)
            made = engine.generate([row[:prompt] for row in rows_BT], sampling)
            engine.let_go()
            written = [row[:prompt] + group[0].token_ids for row, group in zip(rows_BT, made, strict=True)]
        wrote = time.perf_counter()
        batches = packed_batches([Example(row, weight) for row in written], row_tokens=prompt + new,
                                 tokens_per_microbatch=8192, pad_id=0)  # fmt: skip
        for batch in batches if teacher is not None else ():
            _, keep_N = flat_tokens(batch)
            with torch.no_grad():
                out = teacher(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT,
                              logits=False)  # fmt: skip
            batch.teacher = Hidden(out.hidden_BTD.flatten(0, 1)[keep_N], teacher.head_weight)
        stats = train_step(state, batches, objective, stage, progress=0.0)
        return {"loss": stats.loss, "generate_s": wrote - began, "tokens": sum(map(len, written))}

    if options.get("profile"):
        from train_step import profile

        profile(step)
    shapes = [(student.config.shape(), 3)] + ([(teacher.config.shape(), 1)] if teacher is not None else [])
    channel.serve(step, flops=sum(partial(_flops, options)(shape, times) for shape, times in shapes), dtype=dtype)


def _flops(options: dict[str, Any], shape: Any, times: int) -> float:
    """Of a step: `times` 1 for a forward pass, 3 with its backward; the head on the tokens that carry loss."""
    rows, length = options["rows"], options["prompt"] + options["new"]
    whole = rows * length * shape.flops_per_token(length, causal=True, backward=times == 3)
    return float(whole - times * 2 * shape.vocab * shape.d_model * rows * options["prompt"])


def serve_gemm(options: dict[str, Any]) -> None:
    from train_step import serve_gemm as gemm

    gemm(options)


def trl_trainer(
    name: str, options: dict[str, Any], made: dict[str, Any], common: dict[str, Any], ids: Any,
    load: Callable[[str], Any], collate: Callable[[Any], dict[str, Any]],
) -> Any:  # fmt: skip
    """The trainer of this name on one batch, the same at every step."""
    from datasets import Dataset

    prompt, new, rows = options["prompt"], options["new"], options["rows"]
    tokenizer = made["processing_class"]

    def without_prompts(_: Any) -> dict[str, Any]:
        return {k: v for k, v in collate(None).items() if "prompt" not in k}

    row: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    if name == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{"input_ids": ids[0].tolist()}] * (rows * 8))
        trainer: Any = SFTTrainer(**made, args=SFTConfig(**common, max_length=None), train_dataset=data,
                                  data_collator=without_prompts)  # fmt: skip
    elif name == "GKDTrainer":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        on = float(options["case"] == "on")
        config = GKDConfig(**common, lmbda=on, beta=on, temperature=1.0, max_new_tokens=new, max_length=prompt + new)
        trainer = GKDTrainer(**made, teacher_model=load("teacher"), args=config, data_collator=collate,
                             train_dataset=Dataset.from_list([row] * (rows * 8)))  # fmt: skip
        trainer.generation_config.eos_token_id = None
    else:
        from trl import DistillationConfig, DistillationTrainer

        config = DistillationConfig(**common, max_completion_length=new, temperature=1.0, beta=1.0,
                                    generation_kwargs={"min_new_tokens": new})  # fmt: skip
        texts = tokenizer.decode(options["prompt_ids"][:prompt])
        trainer = DistillationTrainer(**made, teacher_model=load("teacher"), args=config,
                                      train_dataset=Dataset.from_list([{"prompt": texts}] * (rows * 8)))  # fmt: skip
    return trainer


def serve_trl(who: str, options: dict[str, Any]) -> None:
    channel = _bench.Channel()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(options["threads"])
    name, dtype = who.split()
    tokenizer = AutoTokenizer.from_pretrained(options["folder"] + "/student")
    seen: dict[str, Any] = {}

    def load(which: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(f"{options['folder']}/{which}", dtype=torch.float32,
                                                     attn_implementation="sdpa")  # fmt: skip
        model.generation_config.eos_token_id = None
        return model

    class OneStepEachTimeItIsAsked(TrainerCallback):  # type: ignore[misc]
        clock: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if channel.ask() is None:
                sys.exit(0)
            self.clock = _bench.Clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            channel.answer(*self.clock.read(), **seen)

    ids = tokens(options)
    prompt, rows = options["prompt"], options["rows"]

    def collate(_: Any) -> dict[str, Any]:
        labels = ids.clone()
        labels[:, :prompt] = -100
        ones = torch.ones_like(ids)
        return {"input_ids": ids.clone(), "attention_mask": ones, "labels": labels, "prompts": ids[:, :prompt].clone(),
                "prompt_attention_mask": ones[:, :prompt].clone()}  # fmt: skip

    common: dict[str, Any] = dict(
        output_dir=options["folder"] + "/trl", use_cpu=True, bf16=dtype == "autocast", fp16=False,
        gradient_checkpointing=False, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        learning_rate=1e-5, weight_decay=0.0, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        disable_tqdm=True, max_steps=10_000, logging_steps=1000,
    )  # fmt: skip
    made: dict[str, Any] = {"model": load("student"), "processing_class": tokenizer,
                            "callbacks": [OneStepEachTimeItIsAsked()]}  # fmt: skip
    trainer = trl_trainer(name, options, made, common, ids, load, collate)
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids_seen = inputs.get("input_ids", inputs.get("completion_ids"))
        seen["tokens"] = ids_seen.numel() if "input_ids" in inputs else ids_seen.numel() + inputs["prompt_ids"].numel()
        found = inner(model, inputs, *args, **kwargs)
        seen["loss"] = float((found[0] if isinstance(found, tuple) else found).detach())
        return found

    trainer.compute_loss = compute_loss
    channel.ready(versions=_bench.versions("torch", "transformers", "trl", "accelerate"))
    trainer.train()


# ---- the benchmark
def make(folder: Path, vocab: int, small: bool) -> list[int]:
    """Student and teacher with their tokenizer, as ours saves them. Returns ids of a prompt."""
    import torch

    from shoestring.models import checkpoint
    from shoestring.models.dense import Dense, DenseConfig
    from shoestring.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([WORDS], 260)
    for seed, (name, shape) in enumerate({"student": STUDENT, "teacher": TEACHER}.items()):
        tied = {"tie_word_embeddings": True, "model_type": "qwen2", "vocab_size": vocab, "initializer_range": 0.05}
        config = DenseConfig.from_dict(shape | tied | ({"num_hidden_layers": 1} if small else {}))
        checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(seed)), tokenizer, folder / name)
    return tokenizer.encode(WORDS * 8)


def main() -> int:
    parser = _bench.parser(__doc__ or "", repeats=5)
    parser.add_argument("--case", choices=tuple(PEERS), default="off")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time, and stop")
    options = parser.parse_args()
    if options.serve:
        known = {"ours": serve_ours, "gemm": serve_gemm}
        found = known.get(options.serve)
        found(options.options) if found else serve_trl(options.serve, options.options)
        return 0
    vocab = 512 if options.small else options.vocab
    script = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        asked = {"folder": folder, "case": options.case, "vocab": vocab, "threads": options.threads,
                 "dtype": options.dtype, "gemm_size": 256 if options.small else 2048,
                 "prompt_ids": make(Path(folder), vocab, options.small),
                 **sizes(options.case, vocab, options.small)}  # fmt: skip
        if options.profile:
            serve_ours(asked | {"profile": True})
            return 0

        def contestant(who: str, python: str = sys.executable) -> _bench.Contestant:
            return _bench.Contestant(who, script, who, asked, options.threads, python)

        names = [f"{trainer} {dtype}" for trainer in PEERS[options.case] for dtype in DTYPES]
        peers = [contestant(who, options.peer_python) for who in _bench.wanted(options.peers, names)]
        ran, reasons = _bench.scout(peers, warm_up=1, repeats=1)
        again = [contestant(peer.name, options.peer_python) for peer in ran[: 1 if options.case != "on" else 2]]
        with _bench.opened([contestant("ours"), *again, contestant("gemm")]) as everyone:
            _bench.interleave(everyone, warm_up=options.warm_up, repeats=options.repeats)
    *timed, gemm = everyone
    report(timed, gemm, ran, reasons, options, asked)
    return 0


def report(
    timed: list[_bench.Contestant], gemm: _bench.Contestant, scouted: list[_bench.Contestant],
    reasons: dict[str, str], options: Namespace, asked: dict[str, Any],
) -> None:  # fmt: skip
    """The table, and the JSON line. A mode that was only tried counts with what the trial gave."""
    ours = timed[0]
    rate = max(statistics.median(gemm.kept(name)) for name in ("float32", "bfloat16"))
    limit = None if options.case == "on" else ours.facts["flops"] / rate
    finalists = {c.name for c in timed}
    shown = [*timed, *(c for c in scouted if c.name not in finalists)]
    lines = [
        [
            c.name, str(len(c.kept())), _bench.spread(c.kept()), _bench.spread(c.kept("cpu_seconds")),
            f"{c.peak_mb:.0f} ({c.facts['start_mb']:.0f})", f"{c.steps[0]['loss']:.4f}", str(c.steps[-1]["tokens"]),
            "-" if limit is None else f"{limit / statistics.median(c.kept()):.1%}",
        ]
        for c in shown
    ]  # fmt: skip
    lines += [[name, "0", reason, *["-"] * 5] for name, reason in reasons.items()]
    head = ["who", "steps", "s a step", "CPU s", "peak MB (at start)", "first loss", "tokens", "of the GEMM limit"]
    print(f"{options.case}, vocabulary {asked['vocab']:,}, {asked['rows']} x ({asked['prompt']} + {asked['new']}), "
          f"{options.threads} threads\n\n{_bench.table(head, lines)}")  # fmt: skip
    flops = f"{ours.facts['flops'] / 1e9:.0f} GFLOP a step"
    print(f"\nours in {ours.facts['dtype']}: {flops}; products {rate / 1e9:.0f} GFLOP/s")
    versions = _bench.versions("torch", "shoestring") | {
        f"peer {name}": number for c in scouted[:1] for name, number in c.facts["versions"].items()
    }
    common: dict[str, Any] = {"versions": versions, "small": options.small, "failed": reasons}
    name = f"distill_step {options.case} {asked['vocab']}"
    print(json.dumps([
        _bench.result(name, "time", "s", statistics.median(ours.kept()),
                      {c.name: statistics.median(c.kept()) for c in shown[1:]}, limit=limit, **common),
        _bench.result(name, "processor time", "s", statistics.median(ours.kept("cpu_seconds")),
                      {c.name: statistics.median(c.kept("cpu_seconds")) for c in shown[1:]}, **common),
        _bench.result(name, "peak memory", "MB", ours.peak_mb, {c.name: c.peak_mb for c in shown[1:]}, **common),
    ]))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
