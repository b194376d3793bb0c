"""What asking a teacher costs: by an API's price list, or on chips of one's own.

Dollars for Q questions = Q/1e6 x (missed input x price + cached input x price + output x price) / acceptance; hidden
reasoning tokens are billed as output. An empty "terms" cell means not recorded, which is no permission.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.tables import number, shipped_rows

USUAL_LENGTHS = ((150, 250), (200, 1000), (200, 5355), (300, 12000))  # tokens in and out; 5,355 is the mean of R1's set


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars a million tokens."""

    provider: str
    model: str
    input: float
    output: float
    cached: float | None
    date: str
    forbids_competing: str  # "yes" or "" (not recorded)
    source: str

    @property
    def label(self) -> str:
        return f"{self.provider} {self.model} ({self.date})"


@cache
def all_prices() -> tuple[Price, ...]:
    """The shipped price list."""
    return tuple(
        Price(r["provider"], r["model"], number(r, "input_usd_per_m") or 0.0, number(r, "output_usd_per_m") or 0.0,
              number(r, "cached_input_usd_per_m"), r["date"], r["terms_forbid_competing"], r["source"])
        for r in shipped_rows("teacher_prices")
    )  # fmt: skip


def find_price(name: str) -> Price:
    """A price by model name, or by its beginning."""
    prices = all_prices()
    wanted = name.lower()
    for match in (lambda p: p.model.lower() == wanted, lambda p: p.model.lower().startswith(wanted)):
        found = [p for p in prices if match(p)]
        if found:
            return found[0]
    raise UserError(f'no price is known for "{name}".{did_you_mean(name, [p.model for p in prices])}')


def ask_usd(price: Price, questions: float, tokens_in: float, tokens_out: float, *, cached_share: float = 0.0,
            acceptance: float = 1.0, batch_discount: float = 0.0) -> float:  # fmt: skip
    """Dollars until `questions` answers are kept. Raises UserError for shares outside 0 to 1."""
    for label, share in (
        ("cached share", cached_share),
        ("acceptance", acceptance),
        ("batch discount", batch_discount),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"{label} is {share}; it must be from 0 to 1.")
    if acceptance == 0:
        raise UserError("acceptance is 0: no answer would ever be kept.")
    hit = price.cached if price.cached is not None else price.input
    each = tokens_in * ((1 - cached_share) * price.input + cached_share * hit) + tokens_out * price.output
    return questions / 1e6 * each * (1 - batch_discount) / acceptance


def self_host_usd(
    questions: float, tokens_in: float, tokens_out: float, *, prefill: float = 73_700, decode: float = 14_800,
    node_usd: float = 16.0,
) -> float:  # fmt: skip
    """Dollars on nodes of one's own; the rates are those DeepSeek published for 8 H800 (open-infra-index, day 6)."""
    return questions * (tokens_in / prefill + tokens_out / decode) / 3600 * node_usd
