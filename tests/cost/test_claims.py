"""Claims read from words, contradictions found, the news worked through, the validation page."""

from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.cost import validation
from shoestring.cost.chips import Cluster, find_chip
from shoestring.cost.claims import check, read_claim
from shoestring.cost.models import named_shape
from shoestring.cost.news import answers, page
from shoestring.cost.stages import context_extension
from shoestring.cost.tables import shipped_json
from shoestring.cost.validation import r1_stages, trace_step, v3_rows

DOCS = Path(__file__).parents[2] / "docs"
V3 = "2048 H800, 2.788M hours, $5.576M, 14.8T tokens, deepseek-v3"


def test_reading():
    claim = read_claim(V3)
    assert (claim.chips, claim.chip, claim.model) == (2048, "H800-SXM", "deepseek-v3")
    assert claim.hours == pytest.approx(2.788e6) and claim.usd == pytest.approx(5.576e6)
    assert claim.tokens == pytest.approx(14.8e12)
    other = read_claim("DeepSeek V3 took 55 days on 2,000 H800s at $2 per GPU hour, MFU 39%")
    assert (other.days, other.chips, other.usd_per_hour, other.mfu, other.model) == (55, 2000, 2, 0.39, "deepseek-v3")
    assert read_claim("30.84M H100-hours").hours == pytest.approx(30.84e6)
    assert read_claim("$5.6 million").usd == pytest.approx(5.6e6)
    words = read_claim("5,576,000 dollars and 2.788 million GPU hours")
    assert (words.usd, words.hours, words.days) == (5_576_000, 2_788_000, None)
    assert read_claim("0.5M USD, 512 H800").usd == pytest.approx(5e5)


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("three weeks", 21),
        ("2 weeks", 14),
        ("one month", 30.4375),
        ("272B tokens a day", None),
        ("a 90-day run", 90),
        ("two months", 60.875),
    ],
)
def test_durations_in_words(text, days):
    found = read_claim(f"512 H800 for {text}, $534,700").days
    assert found == (None if days is None else pytest.approx(days))


def test_the_claim_of_v3_holds():
    verdict = check(V3)
    assert verdict.verdict == "consistent" and verdict.implies["usd_per_chip_hour"] == pytest.approx(2.0)
    assert verdict.implies["mfu_causal"] == pytest.approx(0.373, abs=0.001)
    assert "rents of H800-SXM are $2 (2024-12" in verdict.text()
    assert verdict.implies["days"] == pytest.approx(56.7, abs=0.1) and verdict.leaves_out


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("2048 H800, 100K hours, 14.8T tokens, deepseek-v3", "inconsistent"),
        ("30.84M H100-hours, $500M, llama-3.1-405b, 15.6T tokens", "inconsistent"),
        ("$2 per GPU hour, 2.788M GPU hours, $8M", "inconsistent"),
        ("2048 H800 for 10 days, 2.788M hours", "inconsistent"),
        ("2048 H800, 2.788M hours, MFU 80%, 14.8T tokens, deepseek-v3", "inconsistent"),
        ("16,384 H100 for 78.4 days, 30.84M hours", "consistent"),
        ("50,000 H100", "not decidable"),
        ("$100M", "not decidable"),
    ],
)
def test_verdicts(text, verdict):
    assert check(text).verdict == verdict, check(text).text()


def test_nothing_to_check():
    with pytest.raises(UserError, match="no number"):
        check("they say it was cheap")


def test_news():
    items = answers()
    assert {i["id"] for i in items} == {e["id"] for e in shipped_json("news")} and len(items) >= 12
    by_id = {i["id"]: i["verdict"] for i in items}
    assert by_id["one-percent"] == by_id["distilled-from"] == "inconsistent"
    assert by_id["v3-cost"] == by_id["ten-times-less"] == by_id["bans"] == "consistent"
    assert by_id["gpt4"] == by_id["fifty-thousand"] == "not decidable"
    for item in items:
        assert item["source"] and item["looked_up"] and item["evidence"] and item["follows"]
    whole = page(items)
    assert all(i["claim"] in whole and i["looked_up"] in whole for i in items)


def test_v3_in_four_rows():
    errors = [hours / 2_664_000 - 1 for _, hours, _ in v3_rows()]
    assert errors == pytest.approx([-0.131, -0.070, -0.020, 0.003], abs=0.002)
    assert sum(trace_step().values()) == pytest.approx(17.30, abs=0.02)


def test_r1_inside():
    for cost, truth in r1_stages():
        assert cost.hours.low <= truth <= cost.hours.high, cost


@pytest.mark.slow
def test_context_extension_inside():
    """119K hours, published for two phases whose layouts are not: the interval of what the planner would choose."""
    cost = context_extension(named_shape("deepseek-v3"), Cluster(find_chip("H800"), 2048))
    assert cost.hours.low <= 119_000 <= cost.hours.high


def test_the_page_of_claims_is_what_the_command_writes():
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == page(answers())


@pytest.mark.slow
def test_the_page_of_validation_is_what_the_command_writes():
    assert (DOCS / "plan-validation.md").read_text(encoding="utf-8") == validation.page()
