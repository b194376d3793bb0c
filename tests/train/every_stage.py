"""A road with every kind of stage in it, each long enough to be killed in its middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoestring.recipes import quickstart
from shoestring.train.configs import (
    AskStage,
    CaptureStage,
    Decoding,
    DistillStage,
    EvalStage,
    Optim,
    PretrainStage,
    PruneStage,
    Recipe,
    RejectStage,
    RlStage,
    SftStage,
    Stage,
    TaskMix,
    Textbook,
    TokenizerStage,
)

BOOK = Textbook(mix=quickstart.LEARN, long_share=0.3)
MIX = (TaskMix(task="questions", kinds=("sum",), difficulty=(2, 4)),)
SHORT = Decoding(max_new_tokens=24)
WISH = str(Path(__file__).with_name("wish.py"))  # a reward that an untrained model earns now and then
TRAINED: dict[str, Any] = {"steps": 8, "checkpoint_every": 3, "compute": quickstart.COMPUTE}
SLOWLY: dict[str, Any] = {"optim": Optim(lr=1e-3), **TRAINED}
ASKED: dict[str, Any] = {
    "mix": MIX, "problems": 60, "problems_per_batch": 6, "curate": ("dedup",), "decoding": SHORT,
    "compute": quickstart.COMPUTE,
}  # fmt: skip
ROWS: dict[str, Any] = {"row_tokens": 192, "tokens_per_microbatch": 384, "compute": quickstart.COMPUTE}


def recipe() -> Recipe:
    """Every kind of stage, and of `capture` and `distill` every kind that keeps something of its own."""
    made = {"model": "pretrain", "traces": "reject"}
    taught = {"teacher": "rl", "traces": "reject"}
    stages: list[Stage] = [
        TokenizerStage(name="tokenizer", corpus=BOOK, vocab_size=400, documents=1500),
        PretrainStage(
            name="pretrain", inputs={"tokenizer": "tokenizer"}, model=quickstart.TEACHER, corpus=BOOK,
            corpus_tokens=40_000, row_tokens=128, tokens_per_step=1024, isolate=True, mtp_lambda=0.3,
            optim=Optim(kind="muon", lr=1e-2), **TRAINED,
        ),
        RejectStage(name="reject", inputs={"model": "pretrain"}, samples=2, **ASKED),
        SftStage(name="sft", inputs=made, row_tokens=192, examples_per_step=16, mtp_lambda=0.1, **SLOWLY),
        RlStage(
            name="rl", inputs={"model": "sft"}, mix=MIX, rewards={WISH: 1.0}, problems_per_step=4, group_size=4,
            minibatches=2, max_tries=1, preflight_problems=4, minimum_mixed=0.0, kl_beta=0.01, reference_every=4,
            decoding=SHORT, **SLOWLY,
        ),
        AskStage(name="ask", inputs={"teacher": "rl"}, **ASKED),
        PruneStage(name="prune", inputs=made, layers=2, ffn=96, **ROWS),
        *(CaptureStage(name=f"capture-{kind}", inputs=taught, kind=kind, k=k, shard_tokens=64, **ROWS)
          for kind, k in (("topk", 8), ("sampled", 10), ("hidden", 1))),
        DistillStage(name="text", inputs={"model": "prune", "traces": "ask"}, lora={"rank": 4}, row_tokens=192,
                     examples_per_step=16, **SLOWLY),
        DistillStage(name="offline", inputs={"model": "prune", "traces": "reject", "logits": "capture-topk"},
                     way="offline", row_tokens=192, examples_per_step=16, **SLOWLY),
        DistillStage(name="on-policy", inputs={"model": "prune", "teacher": "rl"}, way="on_policy", mix=MIX,
                     decoding=SHORT, row_tokens=192, examples_per_step=16, **SLOWLY),
        EvalStage(name="eval", inputs={"model": "rl"}, mix=MIX, problems=40, samples=2, rows_per_batch=8,
                  decoding=SHORT, compute=quickstart.COMPUTE),
    ]  # fmt: skip
    return Recipe(name="every-stage", stages=tuple(stages))
