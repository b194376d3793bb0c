"""What a request costs, in whole pico-dollars: no rounding error ever adds up to a cent.

1 dollar a million tokens is 10^6 pico-dollars a token, so prices down to a millionth of a dollar a million tokens are
exact; anything finer, and a batch discount that leaves a fraction, is rounded up. Prices come from the package's
dated list (`cost/data/teacher_prices.csv`) by the model's name, or from the command line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.prices import Price, all_prices

PICO_A_TOKEN = 10**6  # of one dollar a million tokens


@dataclass(frozen=True, slots=True)
class Rate:
    """Pico-dollars a token; `discount` in per cent is taken off (batch APIs). `label` and `date` say whose price."""

    input: int
    output: int
    cached: int
    label: str
    date: str
    discount: int = 0
    forbids: str = ""  # "yes": the terms forbid training competing models; "": not recorded

    def cost(self, tokens_in: int, tokens_out: int, cached: int = 0) -> int:
        """Of `tokens_in`, `cached` ones included, and `tokens_out`, reasoning included."""
        whole = (tokens_in - cached) * self.input + cached * self.cached + tokens_out * self.output
        return -(-whole * (100 - self.discount) // 100)

    def row(self) -> dict[str, Any]:
        """As a trace keeps it."""
        return asdict(self)


def rate_of(model: str, given: str | None, *, local: bool = False, discount: int = 0) -> Rate:
    """The price of `model`: `given` as "IN,OUT[,CACHED]" dollars a million tokens or as a name of the list; else the
    list's newest for that model; else nothing for a server on this machine. Raises UserError for an unknown price."""
    if given and given[0] in "0123456789.-+":
        return _given(given, discount)
    found = _listed(given or model)
    if found is not None:
        return _of(found, discount)
    if local and not given:
        return Rate(0, 0, 0, "a server on this machine", "")
    raise UserError(
        f'no price is known for "{given or model}".{did_you_mean(given or model, [p.model for p in all_prices()])} '
        "Give --price IN,OUT in dollars a million tokens (0,0 for a server of your own)."
    )


def terms_of(model: str) -> str:
    """Say "yes" when the list says that the terms of `model` forbid training competing models, else ""."""
    found = _listed(model)
    return found.forbids_competing if found else ""


def pico(text: str | float | Decimal, what: str = "budget") -> int:
    """Dollars as written, in pico-dollars, rounded down. Raises UserError."""
    try:
        value = Decimal(str(text).strip().removeprefix("$").replace(",", "").replace("_", ""))
    except InvalidOperation:
        raise UserError(f'{what} "{text}" is not a number of dollars; write it like 12.50.') from None
    if not value.is_finite() or value < 0 or value > 9_000_000:
        raise UserError(f"{what} is {text}; it must be from 0 to 9,000,000 dollars.")
    return int(value * 10**12)


def usd(amount: int) -> float:
    """Pico-dollars as dollars, for people and JSON."""
    return float(Decimal(amount) / 10**12)


def _listed(name: str) -> Price | None:
    """The newest price of a model by its name, "deepseek-reasoner" being "deepseek-reasoner (R1)" too."""
    wanted = name.lower().rpartition("/")[2]
    for same in (lambda p: p.model.lower() == wanted, lambda p: p.model.lower().startswith(f"{wanted} (")):
        if found := [price for price in all_prices() if same(price)]:
            return max(found, key=lambda price: price.date)
    return None


def _of(price: Price, discount: int) -> Rate:
    per_token = [_per_token(Decimal(repr(float(value)))) for value in (price.input, price.output)]
    cached = per_token[0] if price.cached is None else _per_token(Decimal(repr(float(price.cached))))
    return Rate(per_token[0], per_token[1], cached, price.label, price.date, discount, price.forbids_competing)


def _given(text: str, discount: int) -> Rate:
    try:
        values = [Decimal(part.strip()) for part in text.split(",")]
    except InvalidOperation:
        values = []
    if not 2 <= len(values) <= 3 or any(not v.is_finite() or v < 0 for v in values):
        raise UserError(f'--price "{text}" is not of the form IN,OUT or IN,OUT,CACHED, as in --price 0.55,2.19,0.14.')
    per_token = [_per_token(value) for value in values]
    return Rate(per_token[0], per_token[1], per_token[-1] if len(per_token) == 3 else per_token[0], f"given: {text}",
                "", discount)  # fmt: skip


def _per_token(usd_per_million: Decimal) -> int:
    return int((usd_per_million * PICO_A_TOKEN).to_integral_value(ROUND_CEILING))
