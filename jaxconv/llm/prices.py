"""What tokens cost: a table that is data, not code."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from jaxconv.errors import Refused

_SHIPPED = Path(__file__).with_name("prices.json")


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    input: float
    output: float

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


FREE = Price(0.0, 0.0)


def price_of(model: str, *, path: str | Path = "", batch: bool = False) -> Price | None:
    """The price of a model, None where the table does not have it.

    Args:
        model: its name, exactly.
        path: of a table in the form of `prices.json`; "" is the one that comes with the package.
        batch: through a batch API: the table's `batch` is the factor.

    Raises:
        Refused: no such file, or no such table.
    """
    path = Path(path or _SHIPPED)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        factor = float(table.get("batch", 1.0)) if batch else 1.0
        entry = table["models"].get(model)
        price = entry and Price(float(entry["input"]) * factor, float(entry["output"]) * factor)
    except FileNotFoundError:
        raise Refused(f"price table {path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"price table {path}: {error}; it must be "
            '{"models": {NAME: {"input": USD, "output": USD}}}, for a million tokens'
        ) from None
    if price and not (0 <= price.input < math.inf and 0 <= price.output < math.inf):
        raise Refused(f"price table {path}: {model} has {price}; prices must be 0 or more")
    return price or None
