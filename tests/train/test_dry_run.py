"""`--dry-run` of every verb: what would run and what it would cost, from real inputs, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoestring import cli
from shoestring.road import STAGES

NEEDS = {
    **dict.fromkeys(("pretrain", "sft", "rl", "reject", "eval"), ("model",)), "tokenizer": (), "ask": ("teacher",),
    "capture": ("teacher", "traces"), "distill": ("model", "traces"), "prune": ("model", "traces"),
}  # fmt: skip


@pytest.mark.parametrize("verb", STAGES)
def test_every_stage(
    verb: str, folder: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"model": folder, "teacher": folder, "traces": traces}
    inputs = [word for role in NEEDS[verb] for word in ("--from", f"{role}={places[role]}")]
    words = [verb, *inputs, *(("--layers", "1") if verb == "prune" else ()), "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["plan"]
    assert row["kind"] == verb and (verb == "tokenizer" or row["about_flops"] > 0)
    assert row["about_usd"] == pytest.approx(row["about_seconds"] / 3600 * 0.1, rel=0.1, abs=1e-5)
    assert cli.main(words) == 0
    assert verb in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_road_has_two_totals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "quickstart", "--dry-run", "--json", "--runs", str(tmp_path / "runs")]) == 0
    document = json.loads(capsys.readouterr().out)
    for name, rows in (("headline", [r for r in document["plan"] if r["headline"]]), ("everything", document["plan"])):
        assert document["totals"][name]["about_usd"] == pytest.approx(sum(row["about_usd"] for row in rows))
    assert cli.main(["run", "quickstart", "--dry-run", "--runs", str(tmp_path / "runs")]) == 0
    last = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.split()][-2:]
    assert last == [["headline", "total"], ["everything", "total"]] and not (tmp_path / "runs").exists()
