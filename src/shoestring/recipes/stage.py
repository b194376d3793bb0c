"""One stage by itself, with the quickstart's settings as defaults: what the verbs `pretrain`, `sft`, `rl` ... run.

shoestring rl --from model=runs/teacher-sft-quickstart-0123 --set steps=40
shoestring eval --from model=some/folder --set problems=100
"""

from __future__ import annotations

from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.recipes import quickstart
from shoestring.train.configs import (
    AskStage,
    CaptureStage,
    DistillStage,
    EvalStage,
    Optim,
    PretrainStage,
    Recipe,
    RejectStage,
    RlStage,
    SftStage,
    Stage,
    Textbook,
    TokenizerStage,
)

SIZE = quickstart.SIZES["full"]
BOOK = Textbook(mix=quickstart.LEARN, long_share=quickstart.LONG_SHARE)


def recipe(kind: str, inputs: dict[str, str] | None = None) -> Recipe:
    """A road of the one stage `kind`; a traces input of `sft` takes the place of its textbook."""
    if kind not in MAKERS:
        raise UserError(f'there is no stage "{kind}".{did_you_mean(kind, MAKERS)}')
    given = inputs or {}
    needed = {
        "pretrain": {"tokenizer", "model"}, "ask": {"teacher"}, "capture": {"teacher"}, "tokenizer": set(),
    }.get(kind, {"model"})  # fmt: skip
    if needed and not needed & set(given):
        example = "teacher" if kind in ("ask", "capture") else "tokenizer" if kind == "pretrain" else "model"
        short = "--student" if kind == "distill" else f"--from {example}="
        which = f" (one of: {', '.join(sorted(needed))})" if len(needed) > 1 else ""
        raise UserError(f"{kind} needs an input: {short}{' ' if kind == 'distill' else ''}RUN{which}.")
    if "traces" not in given and (kind == "capture" or (kind == "distill" and "teacher" not in given)):
        option = "--traces RUN" if kind == "distill" else "--from traces=RUN"
        raise UserError(f"{kind} needs the teacher's answers: {option}, a run of `shoestring ask`.")
    return Recipe(name="mine", stages=(MAKERS[kind](given),))


def _pretrain(inputs: dict[str, str]) -> Stage:
    return PretrainStage(
        name="pretrain", inputs=inputs, model=None if "model" in inputs else quickstart.TEACHER, corpus=BOOK,
        corpus_tokens=SIZE.corpus_tokens, steps=SIZE.pretrain_steps, row_tokens=128, isolate=True,
        tokens_per_step=SIZE.tokens_per_step, mtp_lambda=0.3, optim=Optim(kind="muon", lr=1e-2),
    )  # fmt: skip


def _sft(inputs: dict[str, str]) -> Stage:
    source: dict[str, Any] = {} if "traces" in inputs else {"textbook": BOOK}
    return SftStage(name="sft", inputs=inputs, steps=SIZE.sft_steps, optim=Optim(lr=1e-3), **source)


def _rl(inputs: dict[str, str]) -> Stage:
    return RlStage(name="rl", inputs=inputs, steps=SIZE.rl_steps, **quickstart.rl_options(SIZE))


def _reject(inputs: dict[str, str]) -> Stage:
    return RejectStage(name="reject", inputs=inputs, mix=quickstart.EXAM, decoding=quickstart.DECODING)


def _ask(inputs: dict[str, str]) -> Stage:
    return AskStage(name="ask", inputs=inputs, mix=quickstart.EXAM, decoding=quickstart.DECODING)


def _distill(inputs: dict[str, str]) -> Stage:
    """The way that the inputs suggest: stored logits; a teacher beside the student, with traces or without; text."""
    way = "offline" if "logits" in inputs else "text"
    more: dict[str, Any] = {}
    if "teacher" in inputs and way == "text":
        way = "forward_kl" if "traces" in inputs else "on_policy"
    if way == "on_policy":
        more = {"mix": quickstart.EXAM, "decoding": quickstart.DECODING}
    return DistillStage(
        name="distill", inputs=inputs, steps=250, optim=Optim(lr=1e-3), way=way, **more
    )  # fmt: skip


def _capture(inputs: dict[str, str]) -> Stage:
    return CaptureStage(name="capture", inputs=inputs)


def _eval(inputs: dict[str, str]) -> Stage:
    return EvalStage(name="eval", inputs=inputs, mix=quickstart.EXAM, decoding=quickstart.DECODING)


def _tokenizer(inputs: dict[str, str]) -> Stage:
    return TokenizerStage(name="tokenizer", inputs=inputs, corpus=BOOK, vocab_size=400)


MAKERS = {
    "tokenizer": _tokenizer, "pretrain": _pretrain, "sft": _sft, "rl": _rl, "reject": _reject, "ask": _ask,
    "capture": _capture, "distill": _distill, "eval": _eval,
}  # fmt: skip
