"""Students of families that the engine does not know: they write, are judged and examined, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import COMPUTE, OPTIM, killed_and_resumed, run_stage, stage_of, trace_of, weights_of
from safetensors.torch import load_file

from shoestring.core.errors import UserError
from shoestring.data.textbook import problems
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.models.any import AnyModel
from shoestring.recipes import quickstart
from shoestring.road import plan_rows, run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import rl
from shoestring.train.configs import AskStage, Decoding, EvalStage, Recipe, RlStage, TaskMix
from shoestring.train.configs_distill import Lora

transformers = pytest.importorskip("transformers")
SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(params=["olmo2", "gpt_neox"])
def theirs(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A tiny student of another family, its tables padded beyond the tokenizer."""
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=tokenizer.vocab_size + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"policy_gradient": True}, marks=pytest.mark.slow), {"lora": Lora(rank=4, dora=True)}],
    ids=["divergence", "policy", "adapters"],
)
def test_it_writes_and_learns_from_what_it_wrote(
    options: dict[str, Any], theirs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(
        theirs, way="on_policy", inputs={"teacher": folder}, decoding=SHORT, mix=quickstart.EXAM, **options
    )
    whole = run_stage(stage, tmp_path / "whole")
    rows = whole.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["sampled_tokens"] > 4 * 4 * 10
    if "policy_gradient" not in options:
        assert rows[-1]["loss"] < rows[0]["loss"]
    again = killed_and_resumed(stage, tmp_path / "killed", monkeypatch)
    one, other = weights_of(whole), weights_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.keys() == load_file(theirs / "model.safetensors").keys()  # of adapters the sum is what is saved
    _, tokenizer = checkpoint.load(theirs)
    assert tokenizer is not None
    written = (whole.path / "samples" / "first.jsonl").read_text()
    assert written.count("finish_reason") == 4


def test_it_is_examined_and_asked(theirs: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A student that has learnt one answer by heart gives it; greedy answers are those of transformers' generate."""
    problem = next(problems(quickstart.LEARN, 5))
    mix = (TaskMix(task=problem.task, kinds=(problem.meta["kind"],), difficulty=(problem.difficulty,) * 2),)
    TraceStore(tmp_path / "one").append([trace_of(0, problem, "short")])
    learnt = stage_of(theirs, inputs={"traces": tmp_path / "one"}, steps=60, examples_per_step=1, checkpoint_every=60)
    exam = EvalStage(name="exam", inputs={"model": "distilled"}, mix=mix, problems=6, samples=1, compute=COMPUTE,
                     decoding=Decoding(max_new_tokens=12, temperature=0.0))  # fmt: skip
    ask = AskStage(name="ask", inputs={"teacher": "distilled"}, mix=mix, problems=5, decoding=SHORT, compute=COMPUTE,
                   curate=("dedup",), samples=2)  # fmt: skip
    made = run_recipe(Recipe(name="x", stages=(learnt, exam, ask)), tmp_path / "runs", quiet=True).runs
    latest = made["distilled"].latest_checkpoint()
    assert latest is not None
    model, _ = checkpoint.load(latest[1])
    assert isinstance(model, AnyModel)
    from shoestring.core.atomic import read_lines
    from shoestring.core.nouns import Message
    from shoestring.text.chat import render

    rows = read_lines(made["exam"].path / "samples" / "answers.jsonl")
    assert len(rows) == 6
    for row in rows:
        ids = render([Message("user", row["prompt"])], tokenizer, generation_prompt=True).ids
        out = model.hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.end)
        wanted = out[0, len(ids) :].tolist()
        spoken = wanted[:-1] if wanted[-1] == tokenizer.end else wanted
        assert row["texts"] == [tokenizer.decode(spoken)] and row["tokens"] == [len(wanted)]
    assert made["exam"].manifest["headline_metric"]["name"] == "pass@1"
    traces = TraceStore(made["ask"].path).read()
    assert traces and all(trace.token_ids for trace in traces)


def test_it_is_rewarded(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO, its KL term included; a run that is killed goes on to the same weights, with the reference it had."""
    mix = (TaskMix(task="questions", kinds=("sum",), difficulty=(2, 4)),)
    stage = RlStage(
        name="rl", inputs={"model": str(theirs)}, mix=mix, rewards={str(Path(__file__).with_name("wish.py")): 1.0},
        problems_per_step=4, group_size=4, steps=4, preflight_problems=3, preflight_samples=4, checkpoint_every=2,
        minimum_mixed=0.0, max_tries=1, decoding=SHORT, compute=COMPUTE, balance_alpha=0.0, optim=OPTIM, kl_beta=0.05,
        reference_every=3,
    )  # fmt: skip
    run = run_stage(stage, tmp_path / "runs")
    rows = [row for row in run.metrics() if "loss" in row]
    assert run.manifest["status"] == "finished" and len(rows) == 4
    assert all(row["ratio_error"] < 1e-4 for row in rows)  # the sampler's logprobs are the trainer's
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[2]["kl"] > 0 and rows[3]["kl"] == pytest.approx(0.0, abs=1e-6)  # a new reference after three
    before, after = load_file(theirs / "model.safetensors"), weights_of(run)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    again = weights_of(killed_and_resumed(stage, tmp_path / "killed", monkeypatch, loop=rl))
    assert all(torch.equal(after[name], again[name]) for name in after)


STATES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "rwkv": {"attention_hidden_size": 32, "num_hidden_layers": 2},
    "jamba": {"num_hidden_layers": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 4, "use_mamba_kernels": False, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("way", ["text", "forward_kl", "on_policy"])
def test_a_student_with_a_state_learns_and_has_its_bill(
    kind: str, way: str, folder: Path, traces: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Mamba, RWKV and a hybrid: priced before, counted after, and the bill says what it takes for granted."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "initializer_range": 0.1}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=tokenizer.vocab_size, pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.end_id,
        **sizes | STATES[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path / "stately")
    tokenizer.save(tmp_path / "stately")
    inputs = {"traces": traces} | ({} if way == "text" else {"teacher": folder})
    more = {"decoding": SHORT, "mix": quickstart.EXAM} if way == "on_policy" else {}
    stage = stage_of(tmp_path / "stately", way=way, inputs=inputs, **more)
    (row,) = plan_rows(Recipe(name="x", stages=(stage,)), tmp_path / "runs")
    assert row["about_flops"] > 0 and f'model_type "{kind}": parameters are counted' in row["assumed"]
    run = run_stage(stage, tmp_path / "runs")
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"] or way == "on_policy"
    assert "approximately" in run.manifest["facts"]["counted"]
    if way == "text":
        least = 6 * sum(p.numel() for p in made.parameters() if p.ndim == 2) * run.manifest["cost"]["tokens"]
        assert least * 0.5 < run.manifest["cost"]["train_flops"] < 1.5 * least


def test_a_recurrent_student_that_does_not_fit_is_said_before_loading(
    traces: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model("mamba", vocab_size=50_000, hidden_size=65_536, num_hidden_layers=64)
    config.save_pretrained(tmp_path / "huge")
    tokenizer.save(tmp_path / "huge")
    with pytest.raises(UserError, match="take a student of at most about"):
        run_stage(stage_of(tmp_path / "huge", inputs={"traces": traces}), tmp_path / "runs")
