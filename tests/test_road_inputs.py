"""What a road starts from: runs, folders, hub ids; checked before any work; what is in a run's digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core import hub
from shoestring.core.errors import UserError
from shoestring.core.run import Run, runs_tree
from shoestring.recipes import quickstart
from shoestring.road import find_runs, plan_rows, report_recipe, resolve_recipe, run_recipe, stage_recipe
from shoestring.road_inputs import check_road, data_of, digest_of_input
from shoestring.train.configs import Compute, EvalStage, Recipe, SftStage, TaskMix, Textbook, TokenizerStage
from shoestring.train.machine import threads

BOOK = Textbook(mix=(TaskMix(task="questions"),))
SMALL_SFT = ("steps=2", "problems=20", "examples_per_step=4", 'compute={"experts": "grouped"}')
SMALL_EVAL = (
    "problems=3",
    "samples=1",
    "decoding.max_new_tokens=4",
    'mix=[{"task": "questions", "difficulty": [3, 4]}]',
)


def tokenizer_road(**options: Any) -> Recipe:
    return Recipe(name="tiny", stages=(TokenizerStage(name="t", corpus=BOOK, documents=50, **options),))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with a tokenizer of its own and a chat template, written by transformers alone."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    matcher = Tokenizer(models.BPE())
    matcher.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    matcher.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    matcher.train_from_iterator(["sum of a 8 b 5 , last digit ?"] * 8, trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=matcher, eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf") / "qwen"
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def cached(hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same model as the hub's cache holds it after a download, and no network: its id."""
    constants = pytest.importorskip("huggingface_hub").constants
    store = tmp_path / "cache" / "models--maker--tiny-qwen"
    shutil.copytree(hugging_face, store / "snapshots" / ("a" * 40))
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "maker/tiny-qwen"


# ---- models of others ---------------------------------------------------------------------------------------------


def test_a_folder_of_transformers_is_trained_and_examined(hugging_face: Path, tmp_path: Path) -> None:
    made = run_recipe(stage_recipe("sft", SMALL_SFT, {"model": str(hugging_face)}), tmp_path, quiet=True)
    tuned = made.runs["sft"]
    step, weights = tuned.latest_checkpoint() or (0, Path())
    assert step == 2 and weights.name == "step_000002"
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(weights)
    before = transformers.AutoModelForCausalLM.from_pretrained(hugging_face)
    assert any((a != b).any() for a, b in zip(again.parameters(), before.parameters(), strict=True))
    result = run_recipe(stage_recipe("eval", SMALL_EVAL, {"model": str(tuned.path)}), tmp_path, quiet=True)
    assert 0 <= result.rows[0]["value"] <= 1


def test_a_hub_id_is_a_model_too(cached: str, hugging_face: Path, tmp_path: Path) -> None:
    by_id = run_recipe(stage_recipe("eval", SMALL_EVAL, {"model": cached}), tmp_path, quiet=True)
    folder = run_recipe(stage_recipe("eval", SMALL_EVAL, {"model": str(hugging_face)}), tmp_path, quiet=True)
    assert by_id.rows[0]["value"] == folder.rows[0]["value"]
    digests = [made.runs["eval"].manifest["parents"]["model"]["digest"] for made in (by_id, folder)]
    assert digests[0] == digests[1]  # the same weights, wherever they lie
    assert find_runs(by_id.recipe, tmp_path)["eval"].name == by_id.runs["eval"].name


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("maker/other", "maker/other is no folder here, and downloading it failed"),
        ("elsewhere", "neither an earlier stage, a run, a model folder nor a hub id"),
        ("runs/sft-x", "neither an earlier stage, a run, a model folder nor a hub id"),
        ("runs/t-tiny-3e36", "a run, a model folder nor a hub id. "),
    ],
)
def test_what_is_nowhere_is_said_before_any_work(
    cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, sentence: str
) -> None:
    """Offline, and where a run's name is misspelt, nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    Run.open(Path("runs"), stage="t", recipe="tiny", config=BOOK)
    for dry in (True, False):
        with pytest.raises(UserError) as error:
            recipe = stage_recipe("eval", SMALL_EVAL, {"model": value})
            plan_rows(recipe, Path("runs")) if dry else run_recipe(recipe, Path("runs"), quiet=True)
        assert sentence in str(error.value) and "\n" not in str(error.value)
    assert len(runs_tree("runs")) == 1


def test_a_run_is_no_hub_id_before_there_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither an earlier stage, a run"):
        plan_rows(stage_recipe("eval", [], {"model": "runs/rl-mine-0123"}), Path("runs"))


def test_without_the_package_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'shoestring\[hf\]'"):
        hub.checkpoint_folder("maker/tiny-qwen")


def test_an_id_is_never_something_that_could_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.is_id("maker/model-1.5B")
    for name in ("runs/sft-mine", "./maker/model", "/maker/model", "~/model", "a/b/c", "model", "maker/", "../x"):
        assert not hub.is_id(name), name


# ---- dry runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "rl", "eval", "reject"])
def test_a_dry_run_prices_a_model_that_is_there(cached: str, tmp_path: Path, kind: str) -> None:
    (row,) = plan_rows(stage_recipe(kind, [], {"model": cached}), tmp_path)
    assert row["about_flops"] > 0 and row["about_usd"] > 0
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_dry_run_checks_its_inputs(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        plan_rows(stage_recipe("sft", [], {"model": str(tmp_path / "empty")}), tmp_path)
    with pytest.raises(UserError, match=r'input "traces" is .* a folder without traces\.db; give a run'):
        plan_rows(stage_recipe("sft", [], {"model": str(hugging_face), "traces": str(hugging_face)}), tmp_path)
    begun = Run.open(tmp_path, stage="t", recipe="tiny", config=BOOK)
    with pytest.raises(UserError, match="is not finished; run its command again first"):
        plan_rows(stage_recipe("eval", [], {"model": str(begun.path)}), tmp_path)
    made = run_recipe(
        Recipe(name="x", stages=(EvalStage.from_dict({
            "name": "e", "inputs": {"model": str(hugging_face)}, "problems": 2, "samples": 1,
            "decoding": {"max_new_tokens": 2}, "mix": [{"task": "questions"}],
        }),)), tmp_path, quiet=True,
    ).runs["e"]  # fmt: skip
    with pytest.raises(UserError, match="a run that made no checkpoint"):
        plan_rows(stage_recipe("eval", [], {"model": str(made.path)}), tmp_path)


def test_a_control_is_priced_by_the_run_it_stands_against(hugging_face: Path, tmp_path: Path) -> None:
    spent = run_recipe(stage_recipe("sft", SMALL_SFT, {"model": str(hugging_face)}), tmp_path, quiet=True).runs["sft"]
    control = SftStage(
        name="c", inputs={"model": str(hugging_face), "budget": spent.name}, match_flops=("budget",), textbook=BOOK,
        optim=quickstart.DISTILL_OPTIM,
    )  # fmt: skip
    (row,) = plan_rows(Recipe(name="x", stages=(control,)), tmp_path)
    assert row["about_flops"] == spent.manifest["cost"]["train_flops"]


# ---- digests ------------------------------------------------------------------------------------------------------


def test_a_changed_part_makes_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in task's file changes, as an update of the package would change it; then a user's own."""
    recipe = tokenizer_road()
    first = run_recipe(recipe, tmp_path, quiet=True).runs["t"]
    assert run_recipe(recipe, tmp_path, quiet=True).runs["t"].name == first.name
    assert set(first.manifest["data"]) == {"tasks/questions"}
    changed = {"tasks": "0" * 12}
    monkeypatch.setattr("shoestring.road_inputs.part_hash", lambda kind, name: changed[kind])
    assert run_recipe(recipe, tmp_path, quiet=True).runs["t"].name != first.name


def test_what_is_data() -> None:
    stages = {stage.name: data_of(stage) for stage in quickstart.recipe("smoke").stages}
    tasks = {f"tasks/{name}" for name in ("questions", "logic", "programs")}
    assert set(stages["tokenizer"]) == set(stages["teacher-pretrain"]) == set(stages["teacher-sft"]) == tasks
    assert set(stages["teacher-rl"]) == tasks | {"rewards/length"}
    assert set(stages["ask"]) == tasks | {"curate/empty", "curate/dedup"}
    assert set(stages["eval-teacher-rl"]) == tasks
    assert stages["student-distilled"] == {}


def test_a_task_of_ones_own_by_its_path(hugging_face: Path, tmp_path: Path) -> None:
    """It is asked and graded under its own name, and a changed file is a new run."""
    mine = tmp_path / "mine.py"
    source = (Path(quickstart.__file__).parents[1] / "tasks" / "questions.py").read_text()
    mine.write_text(source.replace('"questions"', '"mine"'))
    sets = [*SMALL_EVAL[:3], f'mix=[{{"task": "{mine}", "difficulty": [3, 4]}}]']
    first = run_recipe(stage_recipe("eval", sets, {"model": str(hugging_face)}), tmp_path / "runs", quiet=True)
    result = json.loads((first.runs["eval"].path / "result.json").read_text())
    assert list(result["by_task"]) == ["mine"]
    mine.write_text(mine.read_text() + "\n# another rule\n")
    second = run_recipe(stage_recipe("eval", sets, {"model": str(hugging_face)}), tmp_path / "runs", quiet=True)
    assert second.runs["eval"].name != first.runs["eval"].name


def test_runs_made_again_are_found_by_number(tmp_path: Path) -> None:
    """The newest of -2 ... -10 and so on is -10: neither names' order nor their length decides."""
    recipe = tokenizer_road()
    first = run_recipe(recipe, tmp_path, quiet=True).runs["t"]
    for number in (2, 9, 10, 11, 100):
        copy = tmp_path / f"{first.name}-{number}"
        shutil.copytree(first.path, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(manifest | {"name": copy.name}))
    shutil.copytree(first.path, tmp_path / f"{first.name}-kept-for-later")
    assert find_runs(recipe, tmp_path)["t"].name == f"{first.name}-100"
    shutil.rmtree(tmp_path / f"{first.name}-100")
    assert find_runs(recipe, tmp_path)["t"].name == f"{first.name}-11"


def test_unknown_parts_and_files_are_said_before_any_work(tmp_path: Path) -> None:
    bad = [
        ({"corpus": {"mix": [{"task": "question"}]}}, 'Did you mean "questions"'),
        ({"corpus": {"files": [str(tmp_path / "absent.txt")]}}, r"absent\.txt does not exist"),
    ]
    for change, sentence in bad:
        recipe = Recipe.from_dict({"name": "x", "stages": [{"stage": "tokenizer", "name": "t", **change}]})
        with pytest.raises(UserError, match=sentence):
            check_road(recipe, tmp_path)


# ---- threads ------------------------------------------------------------------------------------------------------


def test_the_threads_of_a_stage_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    import shoestring.train.tokenize as tokenize

    real = tokenize.run

    def watched(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(tokenize, "run", watched)
    stages = [
        TokenizerStage(name=name, corpus=BOOK, documents=20, compute=Compute(threads=count))
        for name, count in (("a", before + 1), ("b", None))
    ]
    made = run_recipe(Recipe(name="x", stages=tuple(stages)), tmp_path, quiet=True)
    assert seen == [before + 1, before] and torch.get_num_threads() == before
    assert [f"x{n} torch" in made.runs[s].manifest["chip"] for s, n in (("a", before + 1), ("b", before))] == [True] * 2
    with pytest.raises(ZeroDivisionError), threads(before + 2):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with pytest.raises(UserError, match="threads"):
        Compute(threads=0)


def test_another_chat_template_is_another_input(hugging_face: Path, tmp_path: Path) -> None:
    """It decides what is trained on, as much as the weights do."""
    folder = shutil.copytree(hugging_face, tmp_path / "model")
    before = digest_of_input(folder)
    template = folder / "chat_template.jinja"
    template.write_text((template.read_text() if template.exists() else "") + "{# more #}")
    assert digest_of_input(folder) != before


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run of recipe"):
        report_recipe(resolve_recipe("quickstart", []), tmp_path / "nowhere")
