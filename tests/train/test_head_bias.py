"""Heads with a bias (Phi-2, GPT-J): every way of distillation against the plain loss and gradient of transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import COMPUTE, killed_and_resumed, run_stage, stage_of, weights_of
from torch import Tensor

from shoestring.core.run import Run
from shoestring.losses import next_token, policy, span_likelihood
from shoestring.losses._targets import Targets
from shoestring.losses._teacher import Hidden, Sampled, Spans, TopK
from shoestring.losses._tokens import Tokens
from shoestring.models import checkpoint
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import distill
from shoestring.train.configs import CaptureStage, Decoding, Recipe
from shoestring.train.step import flat_tokens

transformers = pytest.importorskip("transformers")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation", "adaptive", "universal_logit")
SHORT = Decoding(max_new_tokens=12)


# ---- the losses, in float64


def _sides() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Student states, table and bias with gradients; ids, weights and the teacher's states with a table and a bias."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    learnt = [normal(9, 5).requires_grad_(), normal(12, 5).requires_grad_(), normal(12).requires_grad_()]
    return learnt, torch.randint(0, 11, (9,), generator=generator), normal(9, 7), normal(11, 8)


def _with_bias(hidden: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.pad(hidden, (0, 1), value=1.0), torch.cat([table, bias[:, None]], dim=1)


def _same_gradients(ours: Tensor, plain: Tensor, learnt: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours, learnt), torch.autograd.grad(plain, learnt, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_divergences_between_heads_with_a_bias(name: str, temperature: float) -> None:
    """Both sides biased, one row of the student's table padding, chunks of two rows."""
    learnt, ids, told_NC, told_VC = _sides()
    hidden, table, bias = learnt
    part = importlib.import_module(f"shoestring.losses.{name}")
    weight = torch.tensor([1.0, 2, 1, 0, 1, 1, 3, 1, 1], dtype=torch.float64)
    targets = Hidden(F.pad(told_NC, (0, 1), value=1.0), told_VC)
    total, _ = part.loss(
        *_with_bias(hidden, table, bias), Tokens(ids, weight, teacher=targets), temperature=temperature, vocab=11,
        chunk=2,
    )  # fmt: skip
    logq = torch.log_softmax(F.linear(hidden, table[:11], bias[:11]) / temperature, dim=-1)
    logp = torch.log_softmax(F.linear(told_NC, told_VC[:, :-1], told_VC[:, -1]) / temperature, dim=-1)
    _same_gradients(total, (part.plain(logp, logq) * weight).sum(), learnt)


def test_other_losses_with_a_bias() -> None:
    """Text, policy gradient, spans, top-k and samples."""
    learnt, ids, told_NC, told_VC = _sides()
    hidden, table, bias = learnt
    both, ones = _with_bias(hidden, table, bias), torch.ones(9, dtype=torch.float64)
    logq = torch.log_softmax(F.linear(hidden, table, bias), dim=-1)
    said = logq.gather(1, ids[:, None]).squeeze(1)
    _same_gradients(next_token.loss(*both, Tokens(ids, ones))[0], -said.sum(), learnt)
    gaps = torch.linspace(-1, 1, 9, dtype=torch.float64)
    tokens = Tokens(ids, ones, advantage_N=gaps, old_N=said.detach())
    _same_gradients(policy.loss(*both, tokens)[0], -((said - said.detach()).exp() * gaps).sum(), learnt)
    span = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    spans = Tokens(ids, ones, teacher=Spans(span, gaps))
    summed = torch.zeros(4, dtype=torch.float64).index_add(0, span, said)
    told = torch.stack([gaps[1], gaps[4], gaps[5], gaps[8]])
    _same_gradients(span_likelihood.loss(*both, spans)[0], (summed - told).square().sum(), learnt)
    logp = torch.log_softmax(F.linear(told_NC, told_VC[:, :-1], told_VC[:, -1]), dim=-1)
    top = logp.topk(3, dim=1)
    tail = (1 - top.values.exp().sum(1)).log()
    forward_kl = importlib.import_module("shoestring.losses.forward_kl")
    total, _ = forward_kl.loss(*both, Tokens(ids, ones, teacher=TopK(top.indices, top.values, tail)), vocab=11)
    logq11 = torch.log_softmax(F.linear(hidden, table[:11], bias[:11]), dim=-1)
    ours = logq11.gather(1, top.indices)
    rest = (1 - ours.exp().sum(1)).log()
    head = (top.values.exp() * (top.values - ours)).sum()
    _same_gradients(total, head + (tail.exp() * (tail - rest)).sum(), learnt)
    drawn = Sampled(top.indices, torch.full((9, 3), 1 / 3, dtype=torch.float64))
    total, _ = forward_kl.loss(*both, Tokens(ids, ones, teacher=drawn), vocab=11)
    _same_gradients(total, -ours.sum() / 3, learnt)


# ---- the stages


def _made(folder: Path, kind: str, tokenizer: Tokenizer, seed: int, padding: int = 0) -> Path:
    """A tiny model whose head has a bias that matters."""
    more = {"phi": {"partial_rotary_factor": 0.5}, "gptj": {"rotary_dim": 8}}[kind]
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=tokenizer.vocab_size + padding, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, initializer_range=0.1, pad_token_id=None,
        bos_token_id=None, eos_token_id=tokenizer.end_id, tie_word_embeddings=False, **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def biased(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return _made(tmp_path / "biased", "phi", tokenizer, 0, padding=5)


@pytest.fixture
def biased_teacher(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return _made(tmp_path / "biased-teacher", "gptj", tokenizer, 1)


def _first_batches(stage: Any, root: Path, monkeypatch: pytest.MonkeyPatch, *before: Any) -> tuple[Any, list[Any], Any]:
    """(the student as loaded, the first step's batches, its objective) of a stage that stops there."""
    seen: list[Any] = []

    def stopping(state: Any, batches: Any, objective: Any, *_: Any, **__: Any) -> None:
        seen.extend((state.model, batches, objective))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(Recipe(name="x", stages=(*before, stage)), root, quiet=True)
    return seen[0], seen[1], seen[2]


def _alone(theirs: Any, batch: Any) -> Tensor:
    """Logits [B, T, V] of transformers, each sequence of the rows read by itself."""
    rows = []
    for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        said = torch.zeros(len(tokens_T), theirs.config.vocab_size)
        for segment in segments_T.unique().tolist():
            here = segments_T == segment
            if segment >= 0:
                said = said.index_put((here.nonzero().squeeze(1),), theirs(tokens_T[here][None]).logits[0])
        rows.append(said)
    return torch.stack(rows)


def _plain(way: str, logits_NV: Tensor, told_NV: Tensor | None, tokens: Tokens, vocab: int) -> Tensor:
    """The sum that a way minimises, of transformers' logits alone."""
    logq_NV = torch.log_softmax(logits_NV if way in ("text",) else logits_NV[:, :vocab], dim=-1)
    said_N = logq_NV.gather(1, tokens.ids_N[:, None]).squeeze(1)
    if way == "text":
        return -(said_N * tokens.weight_N).sum()
    if way == "policy":
        assert tokens.advantage_N is not None and tokens.old_N is not None
        return -((said_N - tokens.old_N).exp() * tokens.advantage_N * tokens.weight_N).sum()
    assert told_NV is not None
    logp_NV = torch.log_softmax(told_NV[:, :vocab], dim=-1)
    form = "reverse_kl" if way == "on_policy" else "forward_kl" if way.startswith("offline") else way
    return (importlib.import_module(f"shoestring.losses.{form}").plain(logp_NV, logq_NV) * tokens.weight_N).sum()


WAYS: dict[str, tuple[dict[str, Any], float]] = {  # options, how near
    "text": ({"way": "text"}, 1e-4),
    "forward_kl": ({"way": "forward_kl"}, 1e-4),
    "jsd": ({"way": "jsd"}, 1e-4),
    "on_policy": ({"way": "on_policy", "decoding": SHORT, "mix": quickstart.EXAM}, 1e-4),
    "policy": ({"way": "on_policy", "policy_gradient": True, "decoding": SHORT, "mix": quickstart.EXAM}, 1e-4),
    "offline float16": ({"way": "offline"}, 1e-3),
    "offline int8": ({"way": "offline"}, 2e-2),
    "universal_logit": ({"way": "universal_logit"}, 1e-4),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_has_the_loss_and_gradient_of_transformers(
    way: str, biased: Path, biased_teacher: Path, traces: Path, tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options, near = WAYS[way]
    inputs: dict[str, Any] = {"traces": traces} | ({} if way == "text" else {"teacher": biased_teacher})
    before: list[Any] = []
    if number := way.partition("offline ")[2]:
        capture: dict[str, Any] = {"inputs": {"teacher": str(biased_teacher), "traces": str(traces)}, "number": number}
        before = [CaptureStage(name="logits", kind="hidden", row_tokens=192, compute=COMPUTE, **capture)]
        inputs = {"traces": traces, "logits": "logits"}
    stage = stage_of(biased, inputs=inputs, **options)
    model, batches, objective = _first_batches(stage, tmp_path / "runs", monkeypatch, *before)
    ours, teacher = (transformers.AutoModelForCausalLM.from_pretrained(p).eval() for p in (biased, biased_teacher))
    for batch in batches:
        out = model(batch.tokens_BT, segments_BT=batch.segments_BT, logits=False)
        tokens, keep_N = flat_tokens(batch)
        loss, _ = objective(out.hidden_BTD.flatten(0, 1)[keep_N], model.head_weight, tokens)
        loss.backward()
        with torch.no_grad():
            told_NV = None if way in ("text", "policy") else _alone(teacher, batch).flatten(0, 1)[keep_N]
        plain = _plain(way, _alone(ours, batch).flatten(0, 1)[keep_N], told_NV, tokens, tokenizer.vocab_size)
        plain.backward()
        assert loss.item() == pytest.approx(plain.item(), rel=near)
    for (name, one), other in zip(model.hf.named_parameters(), ours.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        scale = float(other.grad.abs().max())
        assert float((one.grad - other.grad).abs().max()) <= 10 * near * scale + 1e-7, name


ALSO: list[dict[str, Any]] = [
    {"way": "text", "lora": {"rank": 4, "dora": True}},
    {"way": "reverse_kl", "lora": {"rank": 4}},
    {"way": "span_likelihood"},
    {"way": "on_policy", "decoding": SHORT, "mix": quickstart.EXAM, "policy_gradient": True},
]


@pytest.mark.parametrize("options", ALSO, ids=[" ".join(o) + " " + o["way"] for o in ALSO])
def test_every_way_learns_and_resumes(
    options: dict[str, Any], biased: Path, biased_teacher: Path, traces: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inputs: dict[str, Any] = {"traces": traces} | ({} if options["way"] == "text" else {"teacher": biased_teacher})
    stage = stage_of(biased, inputs=inputs, **options)
    whole = run_stage(stage, tmp_path / "whole")
    rows = whole.metrics()
    if "policy_gradient" not in options:
        assert rows[-1]["loss"] < rows[0]["loss"]
    one, other = weights_of(whole), weights_of(killed_and_resumed(stage, tmp_path / "killed", monkeypatch))
    assert all(torch.equal(one[name], other[name]) for name in one)
    before = checkpoint.load(biased)[0].hf.lm_head.bias
    assert torch.equal(one["lm_head.bias"], before) == ("lora" in options)  # adapters leave the head alone


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_stores_of_logits_hold_the_bias(
    kind: str, biased: Path, biased_teacher: Path, traces: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Nearly everything of the distribution is kept, so the divergence is that with the teacher beside the student."""
    capture = CaptureStage(
        name="logits", inputs={"teacher": str(biased_teacher), "traces": str(traces)}, kind=kind, row_tokens=192,
        compute=COMPUTE, k=tokenizer.vocab_size - 1 if kind == "topk" else 3000,
    )  # fmt: skip
    offline = stage_of(biased, way="offline", inputs={"traces": traces, "logits": "logits"}, steps=1)
    made: dict[str, Run] = run_recipe(Recipe(name="x", stages=(capture, offline)), tmp_path / "runs", quiet=True).runs
    beside = run_stage(
        stage_of(biased, way="forward_kl", inputs={"traces": traces, "teacher": biased_teacher}, steps=1),
        tmp_path / "b",
    )
    (stored,), (told,) = made["distilled"].metrics(), beside.metrics()
    assert stored["grad_norm"] == pytest.approx(told["grad_norm"], rel=1e-3 if kind == "topk" else 0.05)


def test_targets_are_the_whole_contract(biased_teacher: Path) -> None:
    """What is scored, and what a teacher's targets say in full, are transformers' logits."""
    from shoestring.infer.score import score

    model, _ = checkpoint.load(biased_teacher)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(biased_teacher).eval()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logp = torch.log_softmax(theirs(ids).logits, dim=-1)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    said = logp[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(torch.tensor(score(model, ids.tolist())), said, rtol=1e-4, atol=1e-5)
    told: Targets = Hidden(model(ids, logits=False).hidden_BTD[0], model.head_weight)
    found = told.plain(logp[0], lambda logp_NV, _: logp_NV, 1.0)
    torch.testing.assert_close(found, logp[0], rtol=1e-4, atol=1e-5)
