"""`prune`: what it says of loss and parameters is what transformers says; its student is distilled in one recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import COMPUTE, OPTIM

from shoestring.cli import main
from shoestring.core.errors import UserError
from shoestring.core.run import Run
from shoestring.data.textbook import solved
from shoestring.models import checkpoint
from shoestring.models._prune import importance, prune
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import distill_pruned, quickstart
from shoestring.road import plan_rows, resolve_recipe, run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import PruneStage, Recipe
from shoestring.train.prune import _examples, split


@pytest.fixture
def large(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(1)), tokenizer, tmp_path / "large")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sixty documents, the worked answers of the textbook."""
    lines = []
    for number, (problem, voice) in enumerate(solved(quickstart.LEARN, 3, 1.0)):
        if number == 60:
            break
        solution = problem.voices[voice]
        lines.append(json.dumps({"text": f"{problem.prompt} {solution.thinking} {solution.answer}"}))
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _prune(*words: object) -> int:
    return main(["prune", *map(str, words), "--quiet", "--set", f"compute={json.dumps(COMPUTE.to_dict())}"])


def test_it_says_what_was_lost(large: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    words = ("--model", large, "--text", text, "--layers", 2, "--ffn", 24, "--runs", tmp_path / "runs")
    assert _prune(*words, "--set", "examples=40", "--set", "held_out=10", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    facts = told["pruned"]
    run = Run.load(told["runs"]["prune"])
    latest = run.latest_checkpoint()
    assert latest is not None
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (large, latest[1])]
    counts = [sum(p.numel() for p in model.parameters()) for model in theirs]
    assert [facts["parameters_before"], facts["parameters"]] == counts
    # the loss on the pieces that were held out, by transformers
    stage = PruneStage.from_dict(run.config)
    _, tokenizer = checkpoint.load(large)

    class Ctx:
        pass

    ctx: Any = Ctx()
    ctx.run = run
    some, held = split(_examples(stage, ctx, tokenizer), stage, ctx)  # type: ignore[arg-type]
    assert len(held) == 10 and len(some) == 40 and not {tuple(e.ids) for e in some} & {tuple(e.ids) for e in held}
    for model, fact in zip(theirs, (facts["loss_before"], facts["loss"]), strict=True):
        sums, n = [], []
        for example in held:
            ids = torch.tensor([list(example.ids)])
            n.append(len(example.ids) - 1)
            sums.append(model(ids, labels=ids).loss.item() * n[-1])
        value = sum(sums) / sum(n)
        assert fact["value"] == pytest.approx(value, rel=1e-4)
        rest = np.asarray(sums) - value * np.asarray(n)
        assert fact["stderr"] == pytest.approx(np.sqrt((rest**2).sum() * 10 / 9) / sum(n), rel=1e-3)
    assert facts["rise"]["value"] == pytest.approx(facts["loss"]["value"] - facts["loss_before"]["value"], abs=1e-6)
    assert run.manifest["headline_metric"]["value"] == facts["loss"]["value"] and len(facts["layers_kept"]) == 2
    assert str(text) in run.manifest["data"] and run.manifest["parents"]["model"]["digest"]
    assert _prune(*words, "--set", "examples=40", "--set", "held_out=10") == 0  # taken as it is, and shown
    shown = capsys.readouterr().out
    assert "held-out loss, nats a token (10 pieces)" in shown and f"{facts['loss']['value']:.4f} ±" in shown
    assert re.search(r"layers kept: \d \d\n", shown)


@pytest.mark.parametrize("sizes", [{"layers": 2}, {"ffn": 20, "layers": 1}, {"hidden": 16, "heads": 1}])
def test_a_dry_run_says_what_would_be_left(
    sizes: dict[str, int], large: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    assert _prune("--model", large, "--text", text, *chosen, "--runs", tmp_path / "runs", "--dry-run", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["plan"]
    model, _ = checkpoint.load(large)
    small = prune(model, importance(model, [(torch.arange(9)[None], None, None)]), **sizes)
    assert row["about_parameters"] == sum(p.numel() for p in small.parameters())
    assert row["parameters_before"] == sum(p.numel() for p in model.parameters()) and row["about_flops"] > 0
    assert not (tmp_path / "runs").exists()


def test_experts_go_in_a_dry_run_too(folder: Path, traces: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("--model", folder, "--traces", traces, "--experts", 4, "--runs", tmp_path / "runs")
    assert _prune(*words, "--dry-run", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["plan"]
    assert _prune(*words, "--json") == 0
    facts = json.loads(capsys.readouterr().out)["pruned"]
    assert row["about_parameters"] == facts["parameters"] < facts["parameters_before"]


def test_mistakes_are_told_in_a_sentence(
    large: Path, text: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("two words")
    for words, given in (
        ("say what to keep", ["--model", large, "--text", text]),
        ("say what to prune", ["--text", text, "--layers", 2]),
        ("one kind of text", ["--model", large, "--layers", 2]),
        ("one kind of text", ["--model", large, "--layers", 2, "--text", text, "--traces", traces]),
        ("layers is 9; this model has 3", ["--model", large, "--text", text, "--layers", 9]),
        ("layers is 9; this model has 3", ["--model", large, "--text", text, "--layers", 9, "--dry-run"]),
        ("experts is 2; this model has 0", ["--model", large, "--text", text, "--experts", 2]),
        ("does not exist", ["--model", large, "--text", tmp_path / "nowhere.txt", "--layers", 2]),
        ("pruning needs four", ["--model", large, "--text", short, "--layers", 2]),
        ("given twice", ["--model", large, "--from", f"model={large}", "--text", text, "--layers", 2]),
    ):
        assert _prune(*given, "--runs", tmp_path / "runs") == 2, words
        assert words in capsys.readouterr().err


def test_a_model_of_transformers_is_refused(tmp_path: Path, text: Path, tokenizer: Tokenizer, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "olmo2", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    tokenizer.save(tmp_path / "olmo")
    words = ("--model", tmp_path / "olmo", "--text", text, "--layers", 1, "--runs", tmp_path / "runs")
    for dry in ([], ["--dry-run"]):
        assert _prune(*words, *dry) == 2
        assert '"olmo2", which runs through transformers' in capsys.readouterr().err


def test_the_recipe_prunes_and_distils(large: Path, traces: Path, tmp_path: Path) -> None:
    recipe = resolve_recipe("distill-pruned", [f"teacher={large}", f"traces={traces}", "layers=2", "ffn=24",
                                               "steps=12", "row_tokens=192"])  # fmt: skip
    sets = [f"stages.{name}.compute={json.dumps(COMPUTE.to_dict())}" for name in ("pruned", "student")]
    sets += ["stages.student.examples_per_step=6", f"stages.student.optim={json.dumps(OPTIM.to_dict())}"]
    made = run_recipe(recipe.with_sets(sets), tmp_path / "runs", quiet=True).runs
    rows = made["student"].metrics()
    assert rows[-1]["divergence"] < rows[0]["divergence"]
    assert made["student"].manifest["parents"]["model"]["name"] == made["pruned"].name


def test_a_dry_run_refuses_what_the_run_refuses(
    folder: Path, tokenizer: Tokenizer, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixture's and a dense model's: heads that are no groups, experts, neurons that are not there, all too many."""
    wide = tmp_path / "wide"
    config = DenseConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=24, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=12, num_key_value_heads=2,
    )  # fmt: skip
    checkpoint.save(Dense(config), tokenizer, wide)
    mixture = json.loads((folder / "config.json").read_text())
    groups, met, chosen = mixture["n_group"], mixture["topk_group"], mixture["num_experts_per_tok"]
    few = max(1, (chosen - 1) // met) * groups
    cases = [
        (wide, "heads", 5, "neither divide into the 2 groups"), (wide, "heads", 13, "this model has 12"),
        (wide, "hidden", 25, "this model has 24"), (wide, "ffn", 17, "this model has 16"),
        (wide, "experts", 1, "this model has 0"), (wide, "layers", 2, "this model has 1"),
        (folder, "experts", few, "too few"),
        (folder, "experts", mixture["n_routed_experts"] + groups, "this model has"),
    ]  # fmt: skip
    for model, name, number, words in cases:
        told = []
        for dry in ([], ["--dry-run"]):
            given = ("--model", model, "--text", text, f"--{name}", number, "--runs", tmp_path / "runs", *dry)
            assert _prune(*given) == 2, (name, number, dry)
            (line,) = (line for line in capsys.readouterr().err.splitlines() if words in line)
            told.append(line.partition(": ")[2])
        assert told[0] == told[1]


def test_the_recipe_needs_its_inputs() -> None:
    with pytest.raises(Exception, match="needs a teacher and traces"):
        distill_pruned.recipe()


def test_a_size_that_does_not_fit_is_said_before_anything_is_measured(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in the dry run, with the stage's name."""
    monkeypatch.setattr("shoestring.train.prune.importance", lambda *_: pytest.fail("measured first"))
    config = json.loads((folder / "config.json").read_text())
    few = config["num_experts_per_tok"] - 1
    stage = PruneStage(name="small", inputs={"model": str(folder)}, corpus={"files": (str(text),)}, experts=few)  # type: ignore[arg-type]
    recipe = Recipe(name="x", stages=(stage,))
    with pytest.raises(UserError, match=f"{few} experts are too few .* keep at least|do not divide .* keep"):
        run_recipe(recipe, tmp_path / "runs", quiet=True)
    with pytest.raises(UserError, match='stage "small": '):
        plan_rows(recipe, tmp_path / "runs")
