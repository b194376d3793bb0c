"""Accuracy against cost: who pays for what, and the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from shoestring.recipes import study_distill
from shoestring.report.frontier import _needed, frontier_svg, frontier_table
from shoestring.report.spec import read_spec

RECIPE = study_distill.recipe(seeds=2)
SPEC = read_spec(RECIPE)


@pytest.mark.parametrize(
    ("arm", "paid"),
    [
        ("arm-text-s0", {"ask"}),
        ("arm-offline-topk-25-s1", {"ask", "logits-topk"}),
        ("arm-reverse-kl-s0", {"ask"}),
        ("arm-text-then-on-policy-75-s0", {"arm-text-75-s0", "ask"}),
        ("arm-rl-only-s0", set()),  # it has text's budget, not text's bill
        ("arm-textbook-only-s0", set()),
    ],
)
def test_an_arm_pays_for_what_it_alone_needed(arm: str, paid: set[str]) -> None:
    assert set(_needed(arm, RECIPE, SPEC.given)) == {arm, *paid}


def test_every_arm_is_a_point() -> None:
    arms = {stage.name for stage in RECIPE.stages if stage.name.startswith("arm-")}
    assert {arm.model for arm in SPEC.frontier} == arms
    assert {arm.budget for arm in SPEC.frontier} == {25, 75, 250}
    assert frontier_table(RECIPE, SPEC, {}) == []


def row(way: str, updates: int, right: float, usd: float, error: float | None = 0.01) -> dict[str, Any]:
    return {"way": way, "updates": updates, "pass@1": right, "pass@1 stderr": error, "usd": usd, "tokens": 1e9 * usd,
            "seeds": 3}  # fmt: skip


def test_the_picture_has_each_point_where_it_belongs(tmp_path: Path) -> None:
    table = [
        row("a", 25, 0.5, 1e-4),
        row("a", 250, 0.97, 1e-3),
        row("b", 25, 0.6, 2e-4),
        row("b", 250, 1.0, 2e-3, None),
    ]
    for key in ("usd", "tokens"):
        root = ET.fromstring(frontier_svg(table, key, alone=True))
        spots = [e for e in root.iter() if e.tag.endswith("circle")]
        at = {
            re.sub(r":.*", "", spot[0].text or ""): (float(spot.get("cx", 0)), float(spot.get("cy", 0)))
            for spot in spots
        }
        (ax, ay), (bx, by) = at["a, 25 updates"], at["b, 25 updates"]
        assert ax < bx and ay > by  # dearer is to the right, better is up
        assert at["b, 250 updates"][1] < at["a, 250 updates"][1] < by
        assert [e.text for e in root.iter() if e.tag.endswith("text")][-2:] == ["b", "a"]


@pytest.mark.parametrize("right", [0.0, 0.25, 0.4, 0.995, 1.0])
@pytest.mark.parametrize("usd", [0.0, 1e-4])
def test_points_that_are_all_the_same_are_drawn(right: float, usd: float) -> None:
    table = [row("a", 1, right, usd), row("b", 1, right, usd, None)]
    for key in ("usd", "tokens"):
        assert frontier_svg(table, key).count("<circle") == 2
