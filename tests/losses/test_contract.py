"""The contract of losses, on every file of the folder and on files that break it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.core.parts import check
from shoestring.core.registry import list_parts, part_path


@pytest.mark.parametrize("name", sorted(list_parts("losses")))
def test_ours_keep_it(name: str) -> None:
    assert check("losses", part_path("losses", name)) == []


BROKEN = {
    "mean": ("return total / tokens.weight_N.sum(), {}", "must not normalise"),
    "masked": ("return -logp.sum(), {}", "weight 0 gives a gradient"),
    "wrong": ("return (total.detach() - 1.5 * total) / 2 + total * 1.5 - total.detach(), {}", "finite differences"),
    "graph": ('return total, {"x": total}', "metric x carries a gradient"),
    "raises": ("raise RuntimeError('no')", "raises RuntimeError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_breach_is_found(name: str, tmp_path: Path) -> None:
    code, words = BROKEN[name]
    path = tmp_path / f"{name}.py"
    path.write_text(
        "import torch\ndef loss(hidden, table, tokens):\n"
        "    logp = torch.log_softmax(hidden @ table.T, -1).gather(1, tokens.ids_N[:, None])[:, 0]\n"
        f"    total = -(logp * tokens.weight_N).sum()\n    {code}\n"
    )
    assert any(words in said for said in check("losses", path)), check("losses", path)


def test_a_divergence_that_moves_at_rest_is_found(tmp_path: Path) -> None:
    path = tmp_path / "restless.py"
    path.write_text("from shoestring.losses.next_token import loss\nform = loss\n")
    assert check("losses", path) == ["it gives a gradient where the student is the teacher."]
