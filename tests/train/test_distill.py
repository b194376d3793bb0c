"""Distillation: every way learns, resumes with the same bits, counts the teacher, and says what does not fit."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import COMPUTE, OPTIM, killed_and_resumed, run_stage, stage_of, trace_of, weights_of

from shoestring.core.errors import UserError
from shoestring.data.logits import LogitsStore
from shoestring.data.textbook import problems
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.recipes import quickstart
from shoestring.road import plan_rows, run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import distill_checks
from shoestring.train.configs import CaptureStage, Decoding, DistillStage, Recipe

SHORT = Decoding(max_new_tokens=12)
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("text", {}),
    ("text", {"lora": {"rank": 4}}),
    ("reverse_kl", {"lora": {"rank": 4, "dora": True}}),
    ("forward_kl", {"temperature": 2.0}),
    ("jsd", {"loss_options": {"beta": 0.3}, "text_weight": 0.5}),
    ("on_policy", {"decoding": SHORT, "mix": quickstart.EXAM}),
    ("on_policy", {"decoding": SHORT, "on_policy_share": 0.5}),
    ("on_policy", {"decoding": SHORT, "policy_gradient": True}),
]


SLOW = (1, 3, 6)  # the same paths as their neighbours


@pytest.mark.parametrize(
    ("way", "options"),
    [pytest.param(*given, marks=pytest.mark.slow if i in SLOW else ()) for i, given in enumerate(WAYS)],
    ids=[f"{w} {' '.join(map(str, o))}" for w, o in WAYS],
)
def test_every_way_learns_and_resumes_with_the_same_bits(
    way: str, options: dict[str, Any], student: Path, folder: Path, traces: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    inputs = {"traces": traces} | ({} if way == "text" else {"teacher": folder})
    stage = stage_of(student, way=way, inputs=inputs, **options)
    whole = run_stage(stage, tmp_path / "whole")
    rows = whole.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    if way in ("text", "forward_kl", "reverse_kl", "jsd"):
        assert rows[-1]["loss"] < rows[0]["loss"]
    again = killed_and_resumed(stage, tmp_path / "killed", monkeypatch, deaths=(4, 5))
    one, other = weights_of(whole), weights_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["loss"] for row in again.metrics()] == [row["loss"] for row in rows]
    assert again.manifest["cost"]["flops"] == whole.manifest["cost"]["flops"]


def test_adapters_on_experts_go_on_with_their_balance(
    folder: Path, traces: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The router's bias moves while its weights are frozen: it is part of what a checkpoint must hold."""
    stage = stage_of(folder, way="text", inputs={"traces": traces}, lora={"rank": 4})
    whole = run_stage(stage, tmp_path / "whole")
    again = killed_and_resumed(stage, tmp_path / "killed", monkeypatch)
    one, other = weights_of(whole), weights_of(again)
    assert any("e_score_correction_bias" in name and value.any() for name, value in one.items())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_teachers_reading_is_on_the_bill(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    text = run_stage(stage_of(student, way="text", inputs={"traces": traces}, steps=2), tmp_path / "a").manifest
    beside = run_stage(
        stage_of(student, way="reverse_kl", inputs={"traces": traces, "teacher": folder}, steps=2), tmp_path / "b"
    )
    extra = beside.manifest["cost"]["train_flops"] - text["cost"]["train_flops"]
    teacher, _ = checkpoint.load(folder)
    tokens = beside.manifest["cost"]["tokens"]
    assert extra == pytest.approx(2 * teacher.config.shape().matmul_params() * tokens, rel=0.4)
    assert beside.manifest["facts"]["licences"] == ["MIT"] and beside.manifest["facts"]["teachers"] == ["book"]


@pytest.mark.parametrize(
    ("kind", "options", "close"),
    [
        ("hidden", {"number": "float16"}, 1e-3),
        ("hidden", {"number": "int8"}, 0.05),
        ("topk", {"k": 200}, 0.15),
        ("sampled", {"k": 2000}, 0.1),
    ],
)
def test_offline_learns_what_online_learns(
    kind: str, options: dict[str, Any], close: float, student: Path, folder: Path, traces: Path, tmp_path: Path
) -> None:
    """The gradient's size from a store against that with the teacher beside the student, and so the divergence."""
    capture = CaptureStage(
        name="logits", inputs={"teacher": str(folder), "traces": str(traces)}, kind=kind, row_tokens=192,
        compute=COMPUTE, tokens_per_microbatch=400, shard_tokens=100, **options,
    )  # fmt: skip
    offline = stage_of(student, way="offline", inputs={"traces": traces, "logits": "logits"}, steps=1)
    made = run_recipe(Recipe(name="x", stages=(capture, offline)), tmp_path / "runs", quiet=True).runs
    inputs = {"traces": traces, "teacher": folder}
    (beside,) = run_stage(stage_of(student, way="forward_kl", inputs=inputs, steps=1), tmp_path / "b").metrics()
    (stored,) = made["distilled"].metrics()
    assert stored["grad_norm"] == pytest.approx(beside["grad_norm"], rel=close)
    if kind == "topk":
        assert stored["divergence"] <= beside["divergence"]  # outcomes merged never tell more apart
    if kind != "sampled":
        assert stored["divergence"] == pytest.approx(beside["divergence"], rel=2 * close)
    store = LogitsStore(made["logits"].path / "store")
    metric = made["logits"].manifest["headline_metric"]
    assert metric["value"] == pytest.approx(store.nbytes / store.tokens)
    assert metric["value"] > store.spec.record
    assert len(list(store.folder.glob("*.bin"))) > 1


def test_several_stores_teach_as_their_teachers_beside(
    student: Path, folder: Path, traces: Path, tmp_path: Path
) -> None:
    """Two stores, of the teacher and of the student's own beginning, against both models beside the student."""
    roles = {"logits": folder, "logits2": student}
    common: dict[str, Any] = {"kind": "hidden", "row_tokens": 192, "compute": COMPUTE}
    captures = [
        CaptureStage(name=name, inputs={"teacher": str(model), "traces": str(traces)}, **common)
        for name, model in roles.items()
    ]
    weighed = {"teacher_weights": (3.0, 1.0), "teacher_pool": "divergences", "steps": 2}
    inputs: dict[str, Any] = {"traces": traces, **{role: role for role in roles}}
    offline = stage_of(student, way="offline", inputs=inputs, **weighed)
    made = run_recipe(Recipe(name="x", stages=(*captures, offline)), tmp_path / "runs", quiet=True).runs
    both = {"traces": traces, "teacher": folder, "teacher2": student}
    beside = run_stage(stage_of(student, way="forward_kl", inputs=both, **weighed), tmp_path / "b").metrics()
    for stored, told in zip(made["distilled"].metrics(), beside, strict=True):
        assert stored["divergence"] == pytest.approx(told["divergence"], rel=3e-3)
        assert stored["grad_norm"] == pytest.approx(told["grad_norm"], rel=3e-3)
    with pytest.raises(UserError, match="teacher_pool=divergences"):
        stage_of(student, way="offline", inputs=inputs)
    with pytest.raises(UserError, match="1 numbers for 2 stores"):
        stage_of(student, way="offline", inputs=inputs, teacher_pool="divergences", teacher_weights=(1.0,))


def test_a_capture_killed_on_its_way_goes_on_to_the_same_bytes(
    folder: Path, traces: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    stage = CaptureStage(
        name="logits", inputs={"teacher": str(folder), "traces": str(traces)}, kind="sampled", k=8, row_tokens=192,
        compute=COMPUTE, tokens_per_microbatch=600, shard_tokens=200,
    )  # fmt: skip
    whole = run_stage(stage, tmp_path / "whole")
    from shoestring.train import capture

    real, count = capture._captured, 0

    def dying(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(capture, "_captured", dying)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, tmp_path / "killed")
    again = run_stage(stage, tmp_path / "killed")
    assert again.manifest["attempts"] == 2
    assert [o["sha256"] for o in again.manifest["outputs"]] == [o["sha256"] for o in whole.manifest["outputs"]]


def test_a_student_of_transformers_learns_resumes_and_is_loaded_by_it(
    folder: Path, traces: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "olmo2", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    tokenizer.save(tmp_path / "olmo")
    inputs = {"traces": traces, "teacher": folder}
    run = run_stage(stage_of(tmp_path / "olmo", way="forward_kl", inputs=inputs), tmp_path / "runs")
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    latest = run.latest_checkpoint()
    assert latest is not None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(latest[1])
    ours, _ = checkpoint.load(latest[1])
    ids = torch.randint(0, tokenizer.vocab_size, (1, 8))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_curation_lets_through_is_learnt_from(student: Path, traces: Path, tmp_path: Path, capsys: Any) -> None:
    """A store, curated and exported, then `distill` without a recipe; a cut answer is not among what is learnt."""
    from shoestring.cli import main

    first = next(problems(quickstart.LEARN, 9))
    TraceStore(traces).append([trace_of(99, first, finish_reason="length")])
    kept = tmp_path / "kept.jsonl"
    assert main(["curate", str(traces), "--filters", "finished", "--export", str(kept)]) == 0
    assert len(TraceStore(kept)) == len(TraceStore(traces)) - 1
    words = ["distill", "--student", str(student), "--traces", str(kept), "--runs", str(tmp_path / "runs"), "--json"]
    settings = ["steps=2", "row_tokens=192", "examples_per_step=4", "compute.experts=bmm", "compute.dtype=float32"]
    capsys.readouterr()
    assert main([*words, "--quiet", *(w for s in settings for w in ("--set", s))]) == 0
    assert '"finished"' in capsys.readouterr().out


def test_a_file_of_ones_own_is_a_way_and_its_hash_is_data(
    student: Path, folder: Path, traces: Path, tmp_path: Path
) -> None:
    from shoestring.losses import reverse_kl

    mine = tmp_path / "mine.py"
    mine.write_text(Path(reverse_kl.__file__).read_text())
    inputs = {"traces": traces, "teacher": folder}
    theirs = run_stage(stage_of(student, way="reverse_kl", inputs=inputs, steps=2), tmp_path / "a")
    ours = run_stage(stage_of(student, way=str(mine), inputs=inputs, steps=2), tmp_path / "b")
    assert [row["loss"] for row in ours.metrics()] == [row["loss"] for row in theirs.metrics()]
    assert f"losses/{mine}" in ours.manifest["data"]


# ---- what does not fit --------------------------------------------------------------------------------------------


def _says(words: str, stage: Any, root: Path) -> None:
    with pytest.raises(UserError, match=words) as told:
        run_stage(stage, root)
    assert "\n" not in told.value.args[0]


@pytest.mark.parametrize(("way", "options"), [("universal_logit", {"text_weight": 0.1}), ("span_likelihood", {})])
def test_a_teacher_of_another_tokenizer_teaches(
    way: str, options: dict[str, Any], student: Path, folder: Path, traces: Path, tmp_path: Path
) -> None:
    """A teacher that reads nearly bytes, a student that reads words: the loss falls, and the run repeats. Their
    templates need not agree: the teacher's knows no thinking and writes a line behind an answer."""
    small = Tokenizer.train(["0123456789 abc"], 256)
    if way == "span_likelihood":
        small.chat_template = (
            "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
            "{{ m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
    model, _ = checkpoint.load(folder)
    near_bytes = checkpoint.save(model, small, tmp_path / "bytes")
    inputs = {"traces": traces, "teacher": near_bytes}
    stage = stage_of(student, way=way, inputs=inputs, steps=8, row_tokens=400, **options)
    run = run_stage(stage, tmp_path / "a")
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["groups"] > 10
    assert [row["loss"] for row in run_stage(stage, tmp_path / "b").metrics()] == [row["loss"] for row in rows]


@pytest.mark.parametrize("way", ["universal_logit", "span_likelihood"])
def test_several_teachers_of_other_tokenizers_teach(
    way: str, student: Path, folder: Path, traces: Path, tmp_path: Path
) -> None:
    """One twice teaches as it does alone; one with a second that cuts differently teaches by the groups that all share,
    and both read for money."""
    model, _ = checkpoint.load(folder)
    texts = ["0123456789 abc", "the quick brown fox: 12 + 34 = 46; so x is 7. step by step" * 3]
    first, second = (
        checkpoint.save(model, Tokenizer.train([text], size), tmp_path / f"{size}")
        for text, size in zip(texts, (256, 290), strict=True)
    )

    def rows(name: str, *teachers: Path, **more: Any) -> list[dict[str, Any]]:
        inputs = {"traces": traces, "teacher": teachers[0]} | {f"teacher{i}": t for i, t in enumerate(teachers[1:], 2)}
        stage = stage_of(student, way=way, inputs=inputs, steps=8, row_tokens=400, teacher_pool="divergences", **more)
        return list(run_stage(stage, tmp_path / name).metrics())

    alone, twice = rows("alone", first), rows("twice", first, first, teacher_weights=(3.0, 1.0))
    assert [row["loss"] for row in twice] == pytest.approx([row["loss"] for row in alone], rel=1e-4)
    both = rows("both", first, second)
    assert both[-1]["loss"] < both[0]["loss"] and 10 < both[0]["groups"] <= alone[0]["groups"]
    assert both[0]["flops"] > alone[0]["flops"]


def test_another_vocabulary_names_the_way_across(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    other = Tokenizer.train([p.prompt for p in islice(problems(quickstart.LEARN, 1), 50)], 300)
    model, _ = checkpoint.load(folder)
    foreign = checkpoint.save(model, other, tmp_path / "foreign")
    _says(
        "universal_logit",
        stage_of(student, way="forward_kl", inputs={"traces": traces, "teacher": foreign}),
        tmp_path / "r",
    )
    shutil.rmtree(tmp_path / "r")
    _says(
        "universal_logit",
        stage_of(student, way="on_policy", inputs={"traces": traces, "teacher": foreign}),
        tmp_path / "r",
    )


def test_another_template_or_end_token_is_said(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    model, tokenizer = checkpoint.load(folder)
    assert tokenizer is not None and tokenizer.chat_template is not None
    stage = stage_of(
        student, way="on_policy", inputs={"traces": traces, "teacher": tmp_path / "foreign"}, decoding=SHORT
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|user|>'", "'<|user|> '")
    checkpoint.save(model, tokenizer, tmp_path / "foreign")
    _says("chat templates", stage, tmp_path / "a")
    tokenizer = Tokenizer.load(folder)
    tokenizer.config["eos_token"] = "<|pad|>"
    checkpoint.save(model, tokenizer, tmp_path / "foreign")
    _says("end a turn with different tokens", stage, tmp_path / "b")


def test_a_store_of_other_traces_teacher_or_temperature(
    student: Path, folder: Path, traces: Path, tmp_path: Path
) -> None:
    capture = CaptureStage(
        name="logits", inputs={"teacher": str(folder), "traces": str(traces)}, row_tokens=192, compute=COMPUTE
    )  # fmt: skip
    made = run_stage(capture, tmp_path / "runs")
    inputs = {"traces": traces, "logits": made.path}
    _says(
        "captured at temperature 1", stage_of(student, way="offline", inputs=inputs, temperature=2.0), tmp_path / "runs"
    )
    _says("of teacher", stage_of(student, way="offline", inputs=inputs | {"teacher": student}), tmp_path / "runs")
    TraceStore(tmp_path / "others").append([trace_of(0, next(problems(quickstart.EXAM, 77)))])
    others = {"traces": tmp_path / "others", "logits": made.path}
    _says("captured from other traces", stage_of(student, way="offline", inputs=others), tmp_path / "runs")
    shard = next((made.path / "store").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    _says("checksum", stage_of(student, way="offline", inputs=inputs), tmp_path / "runs")


def test_nan_of_the_teacher_is_said_and_not_learnt(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    model, tokenizer = checkpoint.load(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite on disk, infinite once multiplied
    loud = checkpoint.save(model, tokenizer, tmp_path / "loud")
    _says(
        "NaN or infinite",
        stage_of(student, way="reverse_kl", inputs={"traces": traces, "teacher": loud}),
        tmp_path / "a",
    )
    capture = CaptureStage(name="logits", inputs={"teacher": str(loud), "traces": str(traces)}, row_tokens=192)
    _says("not finite", capture.model_copy(update={"compute": COMPUTE}), tmp_path / "b")


def test_no_traces_empty_traces_and_a_run_that_goes_on_once_mended(student: Path, tmp_path: Path) -> None:
    store = TraceStore(tmp_path / "book")
    first = next(problems(quickstart.LEARN, 5))
    store.append([trace_of(0, first, answer="", thinking=None)])
    stage = stage_of(student, inputs={"traces": tmp_path / "book"}, steps=1)
    _says("hold no answer", stage, tmp_path / "runs")
    (tmp_path / "book" / "traces.db").unlink()
    store = TraceStore(tmp_path / "book")
    store.append([])
    _says("holds no traces", stage, tmp_path / "runs")
    store.append([trace_of(1, first)])
    assert run_stage(stage, tmp_path / "runs").finished


def test_a_student_larger_than_memory_is_said_before_it_is_loaded(
    student: Path, folder: Path, traces: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("shoestring.train.state.checkpoint.load", lambda *_, **__: pytest.fail("loaded"))
    stage = stage_of(student, inputs={"traces": traces})
    for free, words in ((1e7, "tokens_per_microbatch="), (8.9e5, "optim.kind=muon"), (50e3, "at most about")):
        monkeypatch.setattr(distill_checks, "available_bytes", lambda free=free: free)
        _says(words, stage, tmp_path / f"{free}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"way": "forward"}, "did you mean"),
        ({"way": "forward_kl", "divergence": "jsd"}, "is its own"),
        ({"way": "on_policy"}, 'needs the input "teacher"'),
        ({"policy_gradient": True}, "belong to way=on_policy"),
    ],
)
def test_settings_that_do_not_fit_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"(?i){words}"):
        DistillStage(name="d", inputs={"model": "m", "traces": "t"}, steps=1, optim=OPTIM, **given)


def test_an_option_out_of_range_is_said_before_work(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    inputs = {"traces": traces, "teacher": folder}
    _says("must lie between", stage_of(student, way="jsd", inputs=inputs, loss_options={"beta": 1.0}), tmp_path / "a")
    _says("has no option", stage_of(student, way="jsd", inputs=inputs, loss_options={"bet": 0.5}), tmp_path / "b")


def test_a_dry_run_prices_the_teacher(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    def flops(way: str, **more: Any) -> float:
        inputs = {"traces": traces, "teacher": folder}
        (row,) = plan_rows(Recipe(name="x", stages=(stage_of(student, way=way, inputs=inputs, **more),)), tmp_path)
        return float(row["about_flops"])

    assert flops("text") < flops("forward_kl") < flops("on_policy", decoding=SHORT)
