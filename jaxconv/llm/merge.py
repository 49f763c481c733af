"""Several journals as one."""

import sqlite3
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from jaxconv.errors import Failed, Refused
from jaxconv.llm.journal import Journal

_INCOMING = (
    """CREATE TEMP TABLE incoming_attempts (
    key TEXT, feedback TEXT, max_tokens INTEGER, reserved_tokens INTEGER, reserved_usd REAL,
    began REAL, kind TEXT, message TEXT, raw TEXT, value TEXT, input_tokens INTEGER,
    output_tokens INTEGER, usd REAL, ended REAL, source INTEGER, number INTEGER, place INTEGER
)""",
    "CREATE INDEX incoming_of_key ON incoming_attempts (key)",
    """CREATE TEMP TABLE incoming_failures (
    key TEXT, kind TEXT, message TEXT, raw TEXT, after INTEGER, ended REAL, source INTEGER
)""",
)
_ATTEMPTS = """
    SELECT key, feedback, max_tokens, reserved_tokens, reserved_usd, began, kind, message, raw,
        value, input_tokens, output_tokens, usd, ended, number
    FROM attempts LEFT JOIN outcomes ON attempt = number
"""
_BEGUN = 6  # columns of it that say what was asked and when; the outcome follows
_OUTCOME = 14  # columns with the outcome


def merge_journals(paths: Iterable[str | Path], into: Journal | str | Path) -> None:
    """Adds to a journal what others hold, all of it or nothing.

    An attempt is known by what was asked and the moment it began. One that several journals hold is
    there once, with its outcome if any of them has it; so merging again adds nothing, and the order
    of `paths` does not matter. Attempts that are added count as later than those that are there,
    and among each other as they began. Then the rules of a single journal hold: a valid answer is
    the request's answer, whatever failed before or after; a request without one that was given up
    in any of them is given up, and one with an answer that checks refuse by now is, where it was
    given up after that answer; interrupted attempts count as a cost and not as attempts.

    Args:
        paths: of journals, which are only read.
        into: the journal, or its path; made where it is not there.

    Raises:
        Refused: one of them is not there or no journal, or another process writes `into`.
        Failed: `into` cannot be written (a full disk).
    """
    with nullcontext(into) if isinstance(into, Journal) else Journal(into) as journal:
        try:
            with journal.transaction() as target:
                _merge(paths, target)
        except sqlite3.Error as error:
            raise Failed(f"cannot write journal {journal.path}: {error}") from error


def _merge(paths: Iterable[str | Path], target: sqlite3.Connection) -> None:
    for statement in _INCOMING:
        target.execute(statement)
    for source, path in enumerate(paths):
        _read(path, source, target)
    for row in target.execute(
        "SELECT *, rowid FROM incoming_attempts ORDER BY began, key, ended, source, number"
    ):
        place = _placed(target, row[:_BEGUN], row[_BEGUN:_OUTCOME])
        target.execute("UPDATE incoming_attempts SET place = ? WHERE rowid = ?", (place, row[-1]))
    target.execute(
        """
        INSERT INTO failures SELECT DISTINCT NULL, f.key, f.kind, f.message, f.raw, coalesce(
            (SELECT max(place) FROM incoming_attempts a
             WHERE a.key = f.key AND a.source = f.source AND a.number <= f.after), 0), f.ended
        FROM incoming_failures f WHERE NOT EXISTS (
            SELECT 1 FROM failures o WHERE o.key = f.key AND o.kind = f.kind
            AND o.message = f.message AND o.raw IS f.raw AND o.ended = f.ended)
        ORDER BY f.ended, f.key
        """
    )
    for table in ("attempts", "failures"):
        target.execute(f"DROP TABLE incoming_{table}")


def _read(path: str | Path, source: int, target: sqlite3.Connection) -> None:
    with Journal(path, read_only=True) as journal, journal.transaction() as db:
        try:
            db.execute("SELECT 1 FROM attempts LIMIT 1")
        except sqlite3.Error as error:
            raise Refused(f"journal {path}: {error}; it must be one of an earlier run") from None
        target.executemany(
            "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?)",
            db.execute("SELECT * FROM requests"),
        )
        target.executemany(
            f"INSERT INTO incoming_attempts VALUES ({'?, ' * 14} {source}, ?, NULL)",
            db.execute(_ATTEMPTS),
        )
        target.executemany(
            f"INSERT INTO incoming_failures VALUES (?, ?, ?, ?, ?, ?, {source})",
            db.execute("SELECT key, kind, message, raw, after, ended FROM failures"),
        )


def _placed(target: sqlite3.Connection, begun: tuple, outcome: tuple) -> int:
    """The number of an attempt in the journal, to which it is added unless it is there."""
    found = target.execute(
        f"{_ATTEMPTS} WHERE key = ? AND began = ? ORDER BY number", (begun[0], begun[5])
    ).fetchall()
    same = {row[_BEGUN:_OUTCOME]: row[-1] for row in found if row[:_BEGUN] == begun}
    interrupted = (None,) * (_OUTCOME - _BEGUN)
    if outcome in same:
        return same[outcome]
    if same and outcome == interrupted:
        return min(same.values())
    number = same.get(interrupted)
    if number is None:
        number = target.execute(
            "INSERT INTO attempts VALUES (NULL, ?, ?, ?, ?, ?, ?)", begun
        ).lastrowid
    if outcome != interrupted:
        target.execute(
            f"INSERT INTO outcomes VALUES (?{', ?' * (_OUTCOME - _BEGUN)})", (number, *outcome)
        )
    return number
