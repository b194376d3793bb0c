"""Chips by name, and the export predicate against the dated facts."""

import pytest

from shoestring.core.errors import UserError
from shoestring.cost.chips import all_chips, find_chip, parse_cluster
from shoestring.cost.export import evaluate, export_status, parse_rule


@pytest.mark.parametrize(
    ("text", "name"),
    [("H800", "H800-SXM"), ("h100", "H100-SXM"), ("A100", "A100-SXM-80"), ("a100 80gb", "A100-SXM-80"),
     ("TPU-v4", "TPU v4"),
     ("rtx4090", "RTX 4090"), ("NVIDIA H200", "H200-SXM"), ("A100-SXM-40", "A100-SXM-40"), ("B200", "B200")],
)  # fmt: skip
def test_names(text, name):
    assert find_chip(text).name == name


def test_unknown_chip_suggests():
    with pytest.raises(UserError, match='Did you mean "H800-SXM"'):
        find_chip("H80O")
    with pytest.raises(UserError, match="without a peak"):
        find_chip("RTX 4090D")


@pytest.mark.parametrize(
    ("text", "n"), [("2048xH800", 2048), ("2048 H800", 2048), ("16K H100", 16000), ("8 × H100", 8), ("H100", 1)]
)
def test_cluster(text, n):
    assert parse_cluster(text).n == n


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0xH100", "positive"), ("-8xH100", "positive"), ("2.5xH100", "whole number"), ("xxH100", "unknown chip"),
        ("64", "names no chip"), ("64xH100,64xA100", "several kinds"), ("8xH100 + 8xH800", "several kinds"),
    ],
)  # fmt: skip
def test_bad_cluster(text, words):
    with pytest.raises(UserError, match=words):
        parse_cluster(text)


def test_every_chip_is_whole():
    for chip in all_chips().values():
        assert chip.bf16 > 1e13 and chip.memory_bytes > 1e10 and chip.memory_bw > 5e11, chip.name
        assert 0.2 < chip.efficiency.gemm_bf16 <= 1 and chip.efficiency.source


@pytest.mark.parametrize(
    ("chip", "day", "status"),
    [
        ("A100", "2022-06-01", "free"), ("H100", "2022-06-01", "free"),
        ("A100", "2022-10-08", "licence"), ("H100", "2023-01-01", "licence"),
        ("A800", "2023-06-01", "free"), ("H800", "2023-06-01", "free"), ("RTX 4090", "2023-06-01", "free"),
        ("A800", "2023-11-18", "licence"), ("H800", "2023-11-18", "licence"), ("H800", "2023-11-16", "free"),
        ("L40S", "2023-12-01", "licence"), ("RTX 4090", "2023-12-01", "licence"),
        ("RTX 4090D", "2023-12-01", "licence"),
        ("L20", "2023-12-01", "free"), ("H20", "2024-06-01", "free"), ("V100", "2024-06-01", "free"),
        ("H20", "2025-04-16", "licence"), ("H200", "2024-06-01", "licence"), ("H200", "2026-01-16", "case-by-case"),
        ("MI325X", "2026-01-16", "case-by-case"), ("B200", "2026-01-16", "licence"), ("B30A", "2026-01-16", "licence"),
        ("Ascend 910B", "2025-06-01", "not-us"),
    ],
)  # fmt: skip
def test_status_by_date(chip, day, status):
    verdict = export_status(chip, day, "China")
    assert verdict.status == status, verdict
    assert verdict.sentence.startswith(verdict.chip)


def test_place_matters():
    assert export_status("H100", "2024-01-01", "Germany").free
    assert not export_status("H100", "2024-01-01", "Vietnam").free
    with pytest.raises(UserError, match='Did you mean "china"'):
        export_status("H100", "2024-01-01", "Chinna")


def test_free_on_a_day():
    chips = ("H800-SXM", "A800-SXM-80", "A100-SXM-80")
    day, place = parse_rule("2023-06-01:China")
    assert [export_status(chip, day, place).free for chip in chips] == [True, True, False] and place == "china"


@pytest.mark.parametrize("text", ["__import__('os')", "tpp.real", "(lambda: 1)()", "tpp ** 2"])
def test_predicates_are_not_code(text):
    with pytest.raises(UserError):
        evaluate(text, {"tpp": 1})
