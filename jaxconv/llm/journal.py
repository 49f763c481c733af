"""The journal: every attempt before it is made, every answer before it is used.

One SQLite file. Rows are only ever added, in one transaction for all that waits to be written, and
a kill at any moment loses nothing that was answered. An attempt without an outcome was interrupted.
"""

import asyncio
import fcntl
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxconv.errors import Failed, Refused
from jaxconv.llm.failures import Failure
from jaxconv.llm.prompt import ChatMessage
from jaxconv.llm.task import Request

_TABLES = """
BEGIN;
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY, task TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS attempts (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, feedback TEXT, max_tokens INTEGER NOT NULL,
    reserved_tokens INTEGER NOT NULL, reserved_usd REAL NOT NULL, began REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS attempts_of_key ON attempts (key);
CREATE TABLE IF NOT EXISTS outcomes (
    attempt INTEGER PRIMARY KEY, kind TEXT, message TEXT, raw TEXT, value TEXT,
    input_tokens INTEGER, output_tokens INTEGER, usd REAL, ended REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS failures (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL,
    raw TEXT, after INTEGER NOT NULL, ended REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS failures_of_key ON failures (key);
CREATE VIEW IF NOT EXISTS calls AS
    SELECT a.number, a.key, r.task, r.model, r.prompt, o.raw, o.value, o.kind AS error,
        o.message, o.input_tokens, o.output_tokens, o.usd, a.began, o.ended
    FROM attempts a JOIN requests r ON r.key = a.key LEFT JOIN outcomes o ON o.attempt = a.number;
COMMIT;
"""
_OWN = {"requests", "attempts", "outcomes", "failures", "calls"}
_COSTS = """
    SELECT task, model, count(*), sum(coalesce(o.input_tokens, 0)),
        sum(coalesce(o.output_tokens, 0)), sum(coalesce(o.usd, 0)),
        sum(CASE WHEN o.usd IS NULL THEN 1 ELSE 0 END),
        sum(CASE WHEN o.usd IS NULL THEN a.reserved_tokens ELSE 0 END),
        sum(CASE WHEN o.usd IS NULL THEN a.reserved_usd ELSE 0 END)
    FROM attempts a JOIN requests r ON r.key = a.key LEFT JOIN outcomes o ON o.attempt = a.number
    WHERE o.kind IS NOT 'unsent'
    GROUP BY task, model ORDER BY task, model
"""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        raw: the answer as it came.
        value: what was made of it, as JSON; None where it failed.
        failure: why it failed, else None.
        input_tokens, output_tokens, usd: None where nobody knows whether the call is paid for.
    """

    raw: str | None
    value: str | None = None
    failure: Failure | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    usd: float | None = None


UNSENT = Outcome(None, None, Failure("unsent", "the run was stopped before"), 0, 0, 0.0)
"""Of an attempt that was not made after all; it counts nowhere."""


@dataclass(frozen=True)
class Interrupted:
    """An attempt without an outcome: its number in this journal, and the most that it can have
    taken."""

    number: int = field(compare=False)
    tokens: int
    usd: float


@dataclass
class History:
    """What a journal knows of a request.

    Attributes:
        answer: the raw text of the last answer that was valid then, None where there is none yet.
        failure: why it was given up; None where it was not, or had a valid answer since.
        tried: the failures of the attempts that count: completed ones since it was last given up,
            and since that answer.
        completed: how many attempts were completed, ever.
        interrupted: the last attempt, if it has no outcome.
    """

    answer: str | None = None
    failure: Failure | None = None
    tried: list[Failure] = field(default_factory=list)
    completed: int = 0
    interrupted: Interrupted | None = None


@dataclass(frozen=True)
class Cost:
    """What the calls of a task to a model took.

    Attributes:
        calls: attempts, the interrupted ones included.
        input_tokens, output_tokens, usd: as far as they are known.
        unknown_calls, unknown_tokens, unknown_usd: of calls that brought no answer and may be paid
            for all the same: how many, and the most that they can have taken.
    """

    task: str
    model: str
    calls: int
    input_tokens: int
    output_tokens: int
    usd: float
    unknown_calls: int
    unknown_tokens: int
    unknown_usd: float

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Journal:
    """A file of requests, attempts, outcomes and failures.

    Reading is synchronous. The coroutines return when what they add is with the operating system,
    where a kill of the process does not reach it.

    Args:
        path: of the file; made where it is not there. None keeps the journal in memory.
        read_only: takes no lock and writes nothing.

    Raises:
        Refused: another process writes it, it is not there to be read, or it is no journal.
    """

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False):
        self.path = None if path is None else Path(path)
        self._lock: int | None = None
        self._is_new = False
        self._next = 0  # number of the next attempt
        if self.path is not None and not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock(self.path)
            self._is_new = not self.path.exists()
        try:
            self._open(read_only)
        except (sqlite3.Error, Refused) as error:
            self.close()
            raise Refused(f"journal {path}: {error}; it must be one of an earlier run") from None
        # One thread: sqlite waits for disks outside of Python's lock, and the loop goes on.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._waiting: list[tuple[list[tuple[str, tuple]], asyncio.Future]] = []
        self._flusher: asyncio.Task | None = None

    def _take_lock(self, path: Path) -> None:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Refused(f"journal {path} is in use by another process; wait for it") from None
        self._lock = lock

    def _open(self, read_only: bool) -> None:
        self._db = None
        if self.path is None:
            place = ":memory:"
        elif read_only:
            if not self.path.is_file():
                raise Refused("no such file")
            place = f"{self.path.absolute().as_uri()}?mode=ro"
        else:
            place = self.path.absolute().as_uri()
        self._db = sqlite3.connect(
            place, uri=place.startswith("file:"), check_same_thread=False, isolation_level=None
        )
        tables = self._all("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        names = {name for (name,) in tables if not name.startswith("sqlite_")}
        if (others := sorted(names - _OWN)) and not names >= _OWN:
            raise Refused(f"it is a database of something else, with a table {others[0]!r}")
        if not read_only:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_TABLES)
        self._count()

    def close(self) -> None:
        """Frees the file; one that was made here, and in which nothing was written, goes."""
        if hasattr(self, "_pool"):
            self._pool.shutdown()
        if self._db is not None:
            self._db.close()
            self._db = None
            if self._is_new and self._next == 1:
                self.path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ------------------------------------------------------------ what it knows

    def _all(self, query: str, *values: Any) -> list[tuple]:
        return self._db.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> tuple:
        return self._all(query, *values)[0]

    def history(self, key: str) -> History:
        """What is known of a request."""
        attempts = self._all(
            "SELECT a.number, a.reserved_tokens, a.reserved_usd, o.kind, o.message, o.raw, o.ended "
            "FROM attempts a LEFT JOIN outcomes o ON o.attempt = a.number WHERE a.key = ? "
            "ORDER BY a.number",
            key,
        )
        if not attempts:
            return History()
        given_up = self._all(
            "SELECT kind, message, raw, after FROM failures WHERE key = ? ORDER BY number DESC "
            "LIMIT 1",
            key,
        )
        after = given_up[0][3] if given_up else 0
        out, answered = History(), 0
        for number, tokens, usd, kind, message, raw, ended in attempts:
            if ended is None:
                out.interrupted = Interrupted(number, tokens, usd)
            if ended is None or kind == UNSENT.failure.kind:
                continue
            out.completed += 1
            out.interrupted = None
            if kind is None:
                out.answer, answered = raw, number
                out.tried.clear()
            elif number > after:
                out.tried.append(Failure(kind, message, raw))
        if given_up and after >= answered:
            out.failure = Failure(*given_up[0][:3])
        return out

    def given_up(self) -> dict[str, int]:
        """Keys of requests that were given up, with the number of the last record of it."""
        return dict(self._all("SELECT key, max(number) FROM failures GROUP BY key"))

    def models(self) -> list[str]:
        """Whose answers it holds."""
        return [name for (name,) in self._all("SELECT DISTINCT model FROM requests ORDER BY 1")]

    def costs(self) -> list[Cost]:
        """What all calls so far took, by task and model."""
        return [Cost(*row) for row in self._all(_COSTS)]

    # ------------------------------------------------------------ what is added

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The tables themselves, while nothing else here reads or writes. What is done inside the
        block is kept when it ends; an error in it undoes all."""
        self._db.execute("BEGIN")
        try:
            yield self._db
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        self._count()

    def write_off(
        self, task: str, prompt: str, model: str, what: str, *, tokens: int, usd: float
    ) -> None:
        """Adds that up to so much was spent on calls that this journal does not have: an attempt
        at a request of its own, without an outcome."""
        key = f"lost-{uuid.uuid4().hex}"
        request = key, task, prompt, model, json.dumps({"lost": what})
        try:
            with self.transaction() as db:
                db.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", request)
                db.execute(
                    "INSERT INTO attempts VALUES (NULL, ?, NULL, 0, ?, ?, ?)",
                    (key, tokens, usd, time.time()),
                )
        except sqlite3.Error as error:
            raise Failed(f"cannot write journal {self.path}: {error}") from error

    def _count(self) -> None:
        self._next = self._one("SELECT coalesce(max(number), 0) + 1 FROM attempts")[0]

    async def begin(
        self,
        task: str,
        prompt: str,
        request: Request,
        *,
        feedback: Sequence[ChatMessage] = (),
        max_tokens: int,
        tokens: int,
        usd: float,
    ) -> int:
        """Adds an attempt that is about to be made; returns its number.

        Args:
            task, prompt: the task's name and its prompt's version.
            request: what is asked.
            feedback: messages after those of the request.
            max_tokens: of the answer.
            tokens, usd: the most that it can take.
        """
        number, self._next = self._next, self._next + 1
        said = json.dumps(list(feedback), ensure_ascii=False) if feedback else None
        await self._write(
            (
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?)",
                (request.key, task, prompt, request.model, request.body),
            ),
            (
                "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, request.key, said, max_tokens, tokens, usd, time.time()),
            ),
        )
        return number

    async def end(self, key: str, attempt: int, outcome: Outcome, *, give_up: bool) -> None:
        """Adds how an attempt ended, and with `give_up` that the request has failed by it."""
        failure = outcome.failure
        row = (
            attempt,
            failure and failure.kind,
            failure and failure.message,
            outcome.raw,
            outcome.value,
            outcome.input_tokens,
            outcome.output_tokens,
            outcome.usd,
            time.time(),
        )
        statements = [("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)]
        if give_up:
            statements.append(self._given_up(key, failure, attempt))
        await self._write(*statements)

    async def give_up(self, key: str, failure: Failure) -> None:
        """Adds that a request has failed by the attempts made so far."""
        await self._write(self._given_up(key, failure, self._next - 1))

    def _given_up(self, key: str, failure: Failure, after: int) -> tuple[str, tuple]:
        row = (key, failure.kind, failure.message, failure.raw, after, time.time())
        return "INSERT INTO failures VALUES (NULL, ?, ?, ?, ?, ?, ?)", row

    async def _write(self, *statements: tuple[str, tuple]) -> None:
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        self._waiting.append((list(statements), written))
        if self._flusher is None or self._flusher.done():
            self._flusher = loop.create_task(self._flush())
        await written

    async def _flush(self) -> None:
        """Commits what waits, all at once, until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            error: BaseException | None = None
            try:
                await loop.run_in_executor(self._pool, self._commit, [s for s, _ in batch])
            except BaseException as raised:  # whatever it is, nobody may wait for ever
                error = Failed(f"cannot write journal {self.path}: {raised}")
                error.__cause__ = raised
            for _, written in batch:
                if written.done():
                    continue
                if error is None:
                    written.set_result(None)
                else:
                    written.set_exception(error)

    def _commit(self, batch: Sequence[Sequence[tuple[str, tuple]]]) -> None:
        self._db.execute("BEGIN")
        try:
            for statements in batch:
                for statement, values in statements:
                    self._db.execute(statement, values)
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    async def drain(self) -> None:
        """Returns when nothing waits to be written."""
        if self._flusher is not None:
            await asyncio.shield(self._flusher)
