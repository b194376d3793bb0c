"""Several teachers beside a student, and hidden states: what is learnt, the same bits after a kill, what is amiss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import killed_and_resumed, run_stage, stage_of, weights_of
from safetensors.torch import load_file

from shoestring.cli import main
from shoestring.core.errors import UserError
from shoestring.core.run import Run
from shoestring.data.batch import packed_batches
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import quickstart
from shoestring.report.provenance import sources
from shoestring.road import plan_rows
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import Decoding, Optim, Recipe
from shoestring.train.context import derived_seed
from shoestring.train.examples import examples_of_step, trace_example
from shoestring.train.step import flat_tokens

SHORT = Decoding(max_new_tokens=12)
MUON = Optim(kind="muon", lr=1e-2, warmup_steps=0, schedule="constant")


@pytest.fixture
def second(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Another teacher of the same vocabulary: dense, narrower, of three layers."""
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    return checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(9)), tokenizer, tmp_path / "second")


def _the_same(one: Run, other: Run) -> None:
    assert [row["loss"] for row in one.metrics()] == [row["loss"] for row in other.metrics()]
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("forward_kl", {"teacher_weights": (3.0, 1.0)}),
        pytest.param("reverse_kl", {"teacher_pool": "logits", "temperature": 2.0}, marks=pytest.mark.slow),
        ("on_policy", {"decoding": SHORT, "mix": quickstart.EXAM}),
        ("on_policy", {"decoding": SHORT, "policy_gradient": True, "teacher_weights": (1.0, 2.0)}),
    ],
)
def test_two_teachers_teach_and_a_killed_run_ends_the_same(
    way: str, options: dict[str, Any], student: Path, folder: Path, second: Path, traces: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inputs = {"traces": traces, "teacher": folder, "teacher2": second}
    stage = stage_of(student, way=way, inputs=inputs, **options)
    whole = run_stage(stage, tmp_path / "whole")
    if way != "on_policy":
        assert whole.metrics()[-1]["loss"] < whole.metrics()[0]["loss"]
    _the_same(whole, killed_and_resumed(stage, tmp_path / "killed", monkeypatch))
    assert {s.name for s in sources(whole.path) if s.kind == "teacher"} >= {folder.name, second.name}
    if way == "on_policy":
        assert whole.manifest["facts"]["teachers"] == [folder.name, second.name]


def test_the_pool_lies_between_its_teachers(
    student: Path, folder: Path, second: Path, traces: Path, tmp_path: Path
) -> None:
    """With all the weight on one teacher it is that teacher alone; with the same teacher twice, too."""

    def first(root: str, weights: tuple[float, ...], **teachers: Path) -> dict[str, float]:
        stage = stage_of(student, way="reverse_kl", inputs={"traces": traces, **teachers}, steps=1,
                         teacher_weights=weights)  # fmt: skip
        return run_stage(stage, tmp_path / root).metrics()[0]

    alone, other = first("a", (), teacher=folder), first("b", (), teacher=second)
    assert first("c", (1.0, 1e-12), teacher=folder, teacher2=second)["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert first("d", (2.0, 5.0), teacher=folder, teacher2=folder)["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    mixed = first("e", (), teacher=folder, teacher2=second)
    assert mixed["loss"] < (alone["loss"] + other["loss"]) / 2  # KL(q | p) is convex in p


def test_every_teacher_is_priced(student: Path, folder: Path, second: Path, traces: Path, tmp_path: Path) -> None:
    def flops(**teachers: Path) -> float:
        stage = stage_of(student, way="forward_kl", inputs={"traces": traces, **teachers})
        return float(plan_rows(Recipe(name="x", stages=(stage,)), tmp_path)[0]["about_flops"])

    both = flops(teacher=folder, teacher2=second)
    assert both > flops(teacher=folder) and both > flops(teacher=second)


def test_the_command_takes_several_teachers(
    student: Path, folder: Path, second: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "--student", str(student), "--teacher", str(folder), "--teacher", str(second), "--traces",
             str(traces), "--set", "teacher_weights=[0.7, 0.3]", "--set", 'hidden_states=null', "--runs",
             str(tmp_path / "runs"), "--dry-run", "--json"]  # fmt: skip
    assert main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)["plan"]
    assert f"teacher={folder}" in row["from"] and f"teacher2={second}" in row["from"]
    assert main([*words, "--from", f"teacher2={folder}"]) == 2
    assert "given twice" in capsys.readouterr().err


def _says(words: str, make: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=words) as told:
        make()
    assert "\n" not in str(told.value)


def test_teachers_that_do_not_fit_are_said(student: Path, folder: Path, traces: Path, tmp_path: Path) -> None:
    strange = Tokenizer.train(["0123456789 abc"], 256)
    model, _ = checkpoint.load(folder)
    foreign = checkpoint.save(model, strange, tmp_path / "foreign")
    both = {"traces": traces, "teacher": folder, "teacher2": foreign}
    _says("student and teacher2 have different vocabularies", lambda: run_stage(
        stage_of(student, way="forward_kl", inputs=both), tmp_path / "r"))  # fmt: skip
    for words, given in (
        ("2 numbers for 1 teachers", {"inputs": {"teacher": folder}, "teacher_weights": (1.0, 1.0)}),
        ("must be a positive number", {"inputs": {"teacher": folder}, "teacher_weights": (0.0,)}),
        ("cannot be pooled, only their distances", {"inputs": both, "way": "universal_logit"}),
        ("teacher_pool=probabilities", {"inputs": both, "way": "on_policy", "policy_gradient": True,
                                        "teacher_pool": "logits"}),
        ("matches the layers of one teacher", {"inputs": both, "hidden_states": {}}),
        ("goes with a divergence", {"inputs": {"teacher": folder}, "way": "text", "hidden_states": {}}),
    ):  # fmt: skip
        chosen = {"way": "forward_kl", **given, "inputs": {"traces": traces, **given["inputs"]}}  # type: ignore[dict-item]
        _says(words, lambda chosen=chosen: stage_of(student, **chosen))  # type: ignore[misc]
    # two layers in this teacher, one in this student
    for layers, words in (
        (((0, 2),), "layer 2 of the teacher, whose layers are 0 to 1"),
        (((-1, 0),), "of the student"),
    ):
        stage = stage_of(student, way="forward_kl", inputs={"traces": traces, "teacher": folder},
                         hidden_states={"layers": layers})  # fmt: skip
        _says(words, lambda stage=stage: run_stage(stage, tmp_path / "r"))  # type: ignore[misc]


def test_a_student_deeper_than_its_teacher_needs_a_map(
    student: Path, second: Path, traces: Path, tmp_path: Path
) -> None:
    stage = stage_of(second, way="forward_kl", inputs={"traces": traces, "teacher": student}, hidden_states={})
    _says("more layers", lambda: run_stage(stage, tmp_path / "r"))


# ---- hidden states


def test_the_states_are_those_that_transformers_sees(
    student: Path, second: Path, traces: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The first step's term by hand: transformers' own hidden states of both, and the projections as they began."""
    transformers = pytest.importorskip("transformers")
    from shoestring.train.states import Projections

    stage = stage_of(student, way="forward_kl", inputs={"traces": traces, "teacher": second}, steps=1,
                     hidden_states={"weight": 0.5, "layers": ((0, 0), (0, 1))})  # fmt: skip
    (row,) = run_stage(stage, tmp_path / "runs").metrics()
    every = [trace_example(trace, tokenizer, exact=False) for trace in TraceStore(traces).read()]
    chosen = [every[i] for i in examples_of_step(len(every), 0, 4, derived_seed(0, 2))]
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (student, second)]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for who, model in zip(("ours", "theirs"), models, strict=True):
        for number, block in enumerate(model.model.layers):
            block.register_forward_hook(
                lambda _, __, out, at=(who, number): seen.update(
                    {at: (out[0] if isinstance(out, tuple) else out).squeeze(0)}
                )
            )
    sums, count = [0.0, 0.0], 0
    projections = Projections([(0, 0), (0, 1)], (24, 16), 0).matrices
    for example in chosen:
        (batch,) = packed_batches([example], row_tokens=192, tokens_per_microbatch=8192, pad_id=0)
        place = flat_tokens(batch)[1]
        ids = torch.tensor([list(example.ids)])
        for theirs in models:
            theirs(ids)
        count += len(place)
        for number, layer in enumerate((0, 1)):
            said = seen["ours", 0][place] @ projections[number].T
            sums[number] += (said - seen["theirs", layer][place]).square().mean(-1).sum().item()
    assert row["states"] == pytest.approx(sum(sums) / 2 / count, rel=1e-4)
    assert row["loss"] == pytest.approx(row["divergence"] + 0.5 * row["states"], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 4}}, {"optim": MUON}])
def test_projections_are_learnt_and_resumed_and_not_handed_on(
    options: dict[str, Any], student: Path, second: Path, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(student, way="forward_kl", inputs={"traces": traces, "teacher": second},
                     hidden_states={"measure": "cosine"}, **options)  # fmt: skip
    whole = run_stage(stage, tmp_path / "whole")
    again = killed_and_resumed(stage, tmp_path / "killed", monkeypatch)
    _the_same(whole, again)
    rows = whole.metrics()
    assert rows[-1]["states"] < rows[0]["states"]
    ends = [run.latest_checkpoint() for run in (whole, again)]
    learnt = [load_file(end[1] / "projections.safetensors") for end in ends if end is not None]
    assert torch.equal(learnt[0]["pair_0"], learnt[1]["pair_0"]) and learnt[0]["pair_0"].shape == (16, 24)
    assert weights_of(whole).keys() == load_file(student / "model.safetensors").keys()


def test_a_student_of_transformers_matches_states_too(
    folder: Path, traces: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "olmo2", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    tokenizer.save(tmp_path / "olmo")
    stage = stage_of(tmp_path / "olmo", way="reverse_kl", inputs={"traces": traces, "teacher": folder},
                     hidden_states={})  # fmt: skip
    rows = run_stage(stage, tmp_path / "runs").metrics()
    assert rows[-1]["states"] < rows[0]["states"] and rows[-1]["loss"] < rows[0]["loss"]
