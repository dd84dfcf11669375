"""What calls cost: a dated, editable price table."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasttrain_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens of one model, and the share of it that a batch pays."""

    model: str
    since: date
    until: date
    input_usd: float
    output_usd: float
    batch_discount: float

    def of(self, prompt_tokens: int, output_tokens: int, batch: bool = False) -> float:
        usd = (prompt_tokens * self.input_usd + output_tokens * self.output_usd) / 1e6
        return usd * (1 - self.batch_discount) if batch else usd


def price_of(model: str, table: Path | None = None, today: date | None = None) -> Price | None:
    """The price of a model on a day; None if the table does not know it. UserError for a broken table."""
    name = model.removeprefix("models/")
    today = today or datetime.now(UTC).date()
    prices = [
        price
        for price in _read_table(table)
        if name.startswith(price.model) and price.since <= today <= price.until
    ]
    return max(prices, key=lambda price: (len(price.model), price.since), default=None)


def _read_table(path: Path | None) -> list[Price]:
    import yaml

    source: Any = path or files("fasttrain_data") / "assets" / "prices.yaml"
    try:
        table = yaml.safe_load(source.read_text(encoding="utf-8"))
        discount = float(table.get("batch_discount", 0.5))
        return [
            Price(
                model=str(row["model"]),
                since=_day(row["from"]),
                until=_day(row.get("to", date.max)),
                input_usd=float(row["input"]),
                output_usd=float(row["output"]),
                batch_discount=discount,
            )
            for row in table["prices"]
        ]
    except OSError as error:
        raise UserError(f"{source}: wanted a price table, got {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        wanted = "prices: [{model, from, input, output}, ...]"
        raise UserError(f"{source}: wanted {wanted}, got {type(error).__name__}: {str(error)[:80]}") from None


def _day(value: Any) -> date:
    # YAML reads a day with a time as a datetime, which is a date and compares with none.
    if isinstance(value, datetime):
        return value.date()
    return value if isinstance(value, date) else date.fromisoformat(str(value))
