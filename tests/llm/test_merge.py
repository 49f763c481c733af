"""Journals merge: whatever is in them, in any order, as often as one likes."""

import asyncio
import itertools
import shutil
import sqlite3
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.errors import Refused
from jaxconv.llm import Failure, Journal, merge_journals
from jaxconv.llm.journal import UNSENT, Outcome
from jaxconv.llm.task import Request

OUTCOMES = {
    "answered": lambda n: Outcome(f"answer {n}", f'"{n}"', None, 10, n, n / 100),
    "wrong": lambda n: Outcome(
        f"wrong {n}", None, Failure("wrong_schema", f"wrong {n}", f"wrong {n}"), 10, 1, 0.01
    ),
    "timeout": lambda n: Outcome(None, None, Failure("timeout", f"late {n}")),
    "unsent": lambda n: UNSENT,
    "interrupted": lambda n: None,
}
STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(sorted(OUTCOMES)), st.booleans()), max_size=8
)
FEW = settings(max_examples=12, deadline=None)


def request(journal: str, number: int) -> Request:
    return Request("m", {}, [{"role": "user", "content": f"{journal} {number}"}], {})


async def _add(journal: Journal, name: str, steps, clock) -> None:
    for number, outcome, give_up in steps:
        asked = request(name, number)
        n = next(clock)
        attempt = await journal.begin(
            "t", "p", asked, max_tokens=n, tokens=100, usd=0.5 if n % 2 else 0.25
        )
        made = OUTCOMES[outcome](n)
        if made is not None:
            failed = made.failure is not None and made is not UNSENT
            await journal.end(asked.key, attempt, made, give_up=give_up and failed)


def write(path: Path, name: str, steps, clock=None) -> Path:
    """A journal of these steps, on requests that have `name` in them."""
    with Journal(path) as journal:
        asyncio.run(_add(journal, name, steps, clock or itertools.count(1)))
    return path


def written(folder: Path, name: str, steps, of: str = "") -> list[Path]:
    """As `write`; nothing where there are no steps, which leave no file."""
    return [write(folder / name, of or name, steps)] if steps else []


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def keys(*names: str) -> list[str]:
    return [request(name, number).key for name in names for number in range(3)]


def merged(folder: Path, paths) -> Path:
    merge_journals(paths, into := folder / f"merged-{len(list(folder.iterdir()))}")
    return into


def histories(path: Path, *names: str) -> dict:
    if not path.exists():
        return {}
    with Journal(path, read_only=True) as journal:
        found = {key: journal.history(key) for key in keys(*names)}
    return {key: history for key, history in found.items() if history.completed}


def contents(path: Path) -> list:
    """All tables."""
    if not path.exists():
        return []
    with Journal(path, read_only=True) as journal, journal.transaction() as db:
        return [
            db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("requests", "attempts", "outcomes", "failures")
        ]


@FEW
@given(STEPS, STEPS)
def test_what_different_workers_did_is_there_as_each_left_it(a, b):
    with folder() as at:
        paths = [*written(at, "a", a), *written(at, "b", b)]
        into = merged(at, paths)
        for name, path in zip("ab", (at / "a", at / "b"), strict=True):
            assert histories(into, name) == histories(path, name)
        if paths:
            costs = []
            for path in (into, *paths):
                with Journal(path, read_only=True) as journal:
                    costs.append(journal.costs())
            for name in ("calls", "input_tokens", "output_tokens", "unknown_calls", "unknown_usd"):
                whole, *parts = [sum(getattr(c, name) for c in cost) for cost in costs]
                assert whole == sum(parts), name


@FEW
@given(STEPS, STEPS, STEPS)
def test_the_order_does_not_matter_and_again_adds_nothing(a, b, c):
    with folder() as at:
        paths = [path for n, steps in zip("abc", (a, b, c), strict=True)
                 for path in written(at, n, steps, of="same")]  # fmt: skip
        into = merged(at, paths)
        assert histories(merged(at, reversed(paths)), "same") == histories(into, "same")
        before = contents(into)
        if paths:
            merge_journals([*paths, *paths[:1]], into)
            assert contents(into) == before
            merge_journals([shutil.copy(into, at / "copy")], into)
            assert contents(into) == before
        answered = {k for p in paths for k, h in histories(p, "same").items() if h.answer}
        failed = {k for p in paths for k, h in histories(p, "same").items() if h.failure}
        found = histories(into, "same")
        assert {k for k, h in found.items() if h.answer} == answered
        given_up = {k for k, h in found.items() if h.failure and h.answer is None}
        assert given_up == failed - answered


@FEW
@given(STEPS, STEPS)
def test_a_copy_that_was_taken_early_adds_nothing_to_the_whole(begun, then):
    with folder() as at:
        clock = itertools.count(1)
        if not begun:
            return
        path = write(at / "journal", "x", begun, clock)
        early = shutil.copy(path, at / "early")
        write(path, "x", then, clock)
        before = contents(path)
        merge_journals([early], path)
        assert contents(path) == before
        merge_journals([path], early)
        assert histories(Path(early), "x") == histories(path, "x")


def test_an_outcome_that_only_one_of_them_knows_is_kept(tmp_path):
    path = write(tmp_path / "a", "x", [(0, "answered", False)])
    early = shutil.copy(path, tmp_path / "early")
    with Journal(early) as journal, journal.transaction() as db:
        db.execute("DELETE FROM outcomes")
    with Journal(early) as journal:
        merge_journals([path], journal)
        assert journal.history(keys("x")[0]).answer == "answer 1"
        assert [cost.calls for cost in journal.costs()] == [1]
        number = asyncio.run(
            journal.begin("t", "p", request("x", 1), max_tokens=1, tokens=1, usd=0.0)
        )
        assert number == 2  # it goes on after what was merged


def test_what_is_no_journal_is_refused_and_adds_nothing(tmp_path):
    path = write(tmp_path / "a", "x", [(0, "answered", False)])
    (tmp_path / "letter").write_text("dear journal")
    sqlite3.connect(tmp_path / "shop").execute("CREATE TABLE goods (name)").connection.close()
    for other, said in (
        ("letter", "not a database"),
        ("shop", "with a table 'goods'"),
        ("nothing", "no such file"),
    ):
        with pytest.raises(Refused, match=f"{other}: .*{said}"):
            merge_journals([path, tmp_path / other], tmp_path / "into")
        assert not (tmp_path / "into").exists()
