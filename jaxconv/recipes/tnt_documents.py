"""What a taxonomy is made of: conversations, or texts in a table, with what is known about them."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxconv.data.conversation import PreferencePair
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.data.sources import open_source
from jaxconv.data.synthetic import satisfaction
from jaxconv.errors import Refused
from jaxconv.llm.conversations import Turn, input_of
from jaxconv.recipes.tnt_rules import user_text
from jaxconv.train import checks

CSV = "csv"
FORMAT_NAMES = ("auto", CSV, *FORMATS)
_LONGEST = 1 << 30  # characters of a field
_LEAST = 5  # documents to learn from, and to test on


@dataclass(frozen=True)
class Documents:
    """Attributes:
    ids: of each, none twice.
    turns: of each.
    meta: of each.
    test: indices of those that the taxonomy and the classifiers do not see.
    empty: how many were left out because their user says nothing.
    """

    ids: Sequence[str]
    turns: Sequence[Sequence[Turn]]
    meta: Sequence[Mapping[str, Any]]
    test: Sequence[int]
    empty: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def train(self) -> list[int]:
        apart = set(self.test)
        return [i for i in range(len(self)) if i not in apart]

    @property
    def texts(self) -> list[str]:
        """What the users say."""
        return [user_text(turns) for turns in self.turns]

    def known(self, field: str) -> list[str | None]:
        """What the meta of each has there, as text; None where it has nothing."""
        return [str(m[field]) if m.get(field) not in (None, "") else None for m in self.meta]


def documents(config, quarantine: Quarantine) -> Documents:
    """Those at the config's path, or the embedded ones.

    Raises:
        Refused: there are too few, or two have one id.
    """
    d = config.data
    if d.path:
        found = list(_read(config, "path", d.path, quarantine))
        apart = list(_read(config, "test_path", d.test_path, quarantine)) if d.test_path else []
    else:
        begin, count = config.seed << 32, round(d.test * d.examples)
        found = list(_embedded(begin, d.examples - count, d.stray, held_out=False))
        apart = list(_embedded(begin + d.examples - count, count, d.stray, held_out=True))
    read = len(found) + len(apart)
    found, apart = ([row for row in rows if user_text(row[1]).strip()] for rows in (found, apart))
    ids = [id for id, _, _ in (*found, *apart)]
    if len(set(ids)) < len(ids):
        twice = next(id for id, count in Counter(ids).items() if count > 1)
        raise Refused(
            f"two documents have the id {twice!r}; every id may come once (rows without one are "
            "called by the name of their file and their line)"
        )
    if d.test_path or not d.path:
        test = list(range(len(found), len(ids)))
    else:
        order = np.random.default_rng(config.seed).permutation(len(ids))
        test = sorted(order[: round(d.test * len(ids))].tolist())
    if len(ids) - len(test) < _LEAST or len(test) < _LEAST:
        raise Refused(
            f"config.data.path={d.path!r}: {len(ids) - len(test)} documents to learn from and "
            f"{len(test)} to test on, besides {read - len(ids)} whose user says nothing; there "
            f"must be at least {_LEAST} of both"
        )
    everything = [*found, *apart]
    talks = Documents(
        ids,
        [turns for _, turns, _ in everything],
        [meta for *_, meta in everything],
        test,
        read - len(ids),
    )
    for field, key in (("gold", d.gold), ("second_gold", d.second_gold)):
        if key and not any(talks.known(key)):
            raise Refused(f"config.data.{field}={key!r}: no document has it in its meta")
    return talks


def gold_keys(config) -> tuple[str, str]:
    """Keys of meta with known classes and finer ones; "" where nothing is known."""
    if not config.data.path:
        return config.data.gold or "domain", config.data.second_gold or "intent"
    return config.data.gold, config.data.second_gold


def _embedded(
    seed: int, count: int, stray: float, *, held_out: bool
) -> Iterator[tuple[str, Sequence[Turn], Mapping[str, Any]]]:
    for talk in satisfaction.conversations(seed, count, held_out=held_out, stray=stray):
        yield talk.id, input_of(talk).turns, talk.meta


def _read(
    config, field: str, path: str, quarantine: Quarantine
) -> Iterator[tuple[str, Sequence[Turn], Mapping[str, Any]]]:
    if config.data.format == CSV or (config.data.format == "auto" and path.endswith(".csv")):
        yield from _table(config, field, Path(path))
        return
    source = checks.naming(
        f"config.data.{field}: ", lambda: open_source(path, config.data.format, quarantine)
    )
    if isinstance(source[0], PreferencePair):
        raise Refused(
            f"config.data.{field}={path!r} holds preference pairs; it must hold conversations"
        )
    for talk in source:
        yield talk.id, input_of(talk).turns, talk.meta


def _table(
    config, field: str, path: Path
) -> Iterator[tuple[str, Sequence[Turn], Mapping[str, Any]]]:
    """Rows of a CSV file with a header: a text each, and the other columns as meta. Ids of rows to
    test on begin with "test/", as both files may have one name."""
    if not path.is_file():
        raise Refused(f"config.data.{field}={str(path)!r}: no such file")
    column = config.data.text
    begin = "test/" if field == "test_path" else ""
    csv.field_size_limit(_LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            if column not in (rows.fieldnames or ()):
                known = ", ".join(rows.fieldnames or ("none",))
                raise Refused(
                    f"config.data.text={column!r}: {path} has no such column; it may be {known}"
                )
            for number, row in enumerate(rows, 1):
                meta = {name: value for name, value in row.items() if name and name != column}
                turn = Turn(number=1, role="user", content=row[column] or "")
                yield f"{begin}{path.name}:{number}", [turn], meta
        except (UnicodeDecodeError, csv.Error) as error:
            raise Refused(
                f"config.data.{field}={str(path)!r}, after line {rows.line_num}: {error}; it must "
                "be CSV in UTF-8"
            ) from error
