"""Published formats of conversations and preference pairs, each read row by row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxconv.data.conversation import Record, check, from_row
from jaxconv.data.readers.chat import read_completion, read_openai, read_sharegpt, read_wildchat
from jaxconv.data.readers.preference import HH_TURN, read_hh_rlhf, read_preference
from jaxconv.data.readers.rated import read_rated
from jaxconv.data.readers.sotopia import read_sotopia

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A form that rows come in.

    Attributes:
        make: (row, id for records whose row has none) -> the records of one row, unchecked; an
            `Invalid` where the row is not of this form.
        looks_like: whether a row seems to be of this form.
    """

    make: Callable[[Row, str], Sequence[Record]]
    looks_like: Callable[[Row], bool]

    def read(self, row: Row, name: str) -> Sequence[Record]:
        """The records of a row.

        Raises:
            Invalid: it is not of this form, or breaks a rule of `conversation.check`.
        """
        records = self.make(row, name)
        for record in records:
            check(record)
        return records


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(key in row for key in keys)


FORMATS: Mapping[str, Format] = {
    "jaxconv": Format(
        lambda row, name: [from_row(row)],
        lambda row: {"id", "meta"} < row.keys() and ("messages" in row or "chosen" in row),
    ),
    "sotopia": Format(read_sotopia, _has("environment", "agents", "messages")),
    "wildchat": Format(
        read_wildchat,
        lambda row: (
            "conversation" in row and ("conversation_hash" in row or "conversation_id" in row)
        ),
    ),
    "rated": Format(read_rated, _has("block")),
    "sharegpt": Format(read_sharegpt, _has("conversations")),
    "hh_rlhf": Format(
        read_hh_rlhf,
        lambda row: (
            row.keys() >= {"chosen", "rejected"}
            and "prompt" not in row
            and all(
                isinstance(row[k], str) and HH_TURN.match(row[k]) for k in ("chosen", "rejected")
            )
        ),
    ),
    "preference": Format(read_preference, _has("chosen", "rejected")),
    "completion": Format(read_completion, _has("prompt", "completion")),
    "openai": Format(read_openai, _has("messages")),
}
"""By name; a row is taken for the first one that it looks like."""
