"""The verbs one after the other, as a user types them: each goes on from what the one before left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from shoestring import cli

TEXT = "corpus_tokens=6000", "tokens_per_step=512", "steps=2"
FAST = 'compute={"experts": "grouped"}'
SHORT = "decoding.max_new_tokens=6"
MIX = 'mix=[{"task": "questions", "difficulty": [2, 3]}]'


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shoestring.train.machine.gemm_rate", lambda *_, **__: 1e11)

    def run(verb: str, inputs: tuple[str, ...] = (), sets: tuple[str, ...] = (), code: int = 0) -> str:
        """The run directory that the verb leaves, or the sentence it ends with."""
        words = [verb, *(w for i in inputs for w in ("--from", i)), *(w for s in sets for w in ("--set", s))]
        assert cli.main([*words, "--json", "--quiet"]) == code
        out = capsys.readouterr()
        return json.loads(out.out)["runs"][verb] if code == 0 else out.err

    return run


def test_the_road_verb_by_verb(  # type: ignore[no-untyped-def]
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = call("tokenizer", (), ("documents=60",))
    base = call("pretrain", (f"tokenizer={words}",), (*TEXT, FAST))
    tuned = call("sft", (f"model={base}",), ("steps=2", "problems=16", "examples_per_step=4", FAST))
    asking = ("problems=6", SHORT, MIX, FAST)
    better = call("rl", (f"model={tuned}",), (
        "steps=1", "problems_per_step=2", "group_size=2", "preflight_problems=2", "minimum_mixed=0", SHORT, MIX, FAST,
    ))  # fmt: skip
    monkeypatch.setattr("shoestring.teachers.engine.split_thinking", lambda text: ("", "7"))  # as if it had learnt to
    asked = call("ask", (f"teacher={better}",), (*asking, 'curate=["dedup"]'))
    kept = call("reject", (f"model={better}",), (*asking, 'curate=["dedup"]'))
    student = call("distill", (f"model={base}", f"traces={asked}"), ("steps=2", "examples_per_step=2", FAST))
    call("sft", (f"model={base}", f"traces={kept}"), ("steps=1", "examples_per_step=2", FAST))
    result = call("eval", (f"model={student}",), (*asking, "samples=2"))
    assert json.loads((tmp_path / result / "result.json").read_text())["overall"]["problems"] == 6
    parents = {
        role: made["name"]
        for role, made in json.loads((Path(student) / "manifest.json").read_text())["parents"].items()
    }
    assert parents == {"model": Path(base).name, "traces": Path(asked).name}
    # what does not fit is said
    nothing = call("ask", (f"teacher={better}",), (*asking, "seed=1"))  # an untrained model: nothing is right
    assert "kept no traces" in call("distill", (f"model={base}", f"traces={nothing}"), ("steps=2",), code=2)
    assert re.search(
        r'input "traces" is .*a folder without traces', call("distill", (f"model={base}", "traces=."), (), code=2)
    )
    assert "a run that made no checkpoint" in call("eval", (f"model={asked}",), (), code=2)
    shutil.rmtree(Path(student) / "checkpoints")
    assert "a run whose checkpoint is gone: bring" in call("eval", (f"model={student}",), (), code=2)
    for verb in (["chat", student], ["export", student, str(tmp_path / "out")]):
        assert cli.main(verb) == 2 and "a run whose checkpoint is gone: bring" in capsys.readouterr().err
