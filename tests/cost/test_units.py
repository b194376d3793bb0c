"""Quantities as people write them."""

import pytest

from shoestring.core.errors import UserError
from shoestring.cost.units import parse_count, parse_date, parse_hours, parse_usd, show


@pytest.mark.parametrize(
    ("text", "value"),
    [("14.8T", 14.8e12), ("2,048", 2048), ("500B", 5e11), ("1e12", 1e12), (".5K", 500), ("2 million", 2e6)],
)
def test_counts(text, value):
    assert parse_count(text) == pytest.approx(value)


def test_money_and_time():
    assert parse_usd("$5.576M") == pytest.approx(5_576_000)
    assert parse_hours("60d") == 1440 and parse_hours("12h") == 12 and parse_hours(2) == 48


@pytest.mark.parametrize("text", ["", "abc", "-1", "0", "nan", "inf", "12X", "1.2.3", "14,8T", "1,00"])
def test_bad_counts(text):
    with pytest.raises(UserError):
        parse_count(text, "tokens")


def test_bad_dates():
    with pytest.raises(UserError, match="2023-06-01"):
        parse_date("1 June")
    with pytest.raises(UserError):
        parse_hours("5 parsecs")


@pytest.mark.parametrize(
    ("value", "text"), [(14.8e12, "14.8T"), (2.788e6, "2.79M"), (0.3894, "0.389"), (999.9e3, "1M")]
)
def test_show(value, text):
    assert show(value) == text
