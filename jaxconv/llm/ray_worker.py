"""What runs on the nodes of a Ray cluster: a share of a task's rows, with a journal of its own."""

import os
import pickle
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.llm.backends.base import Backend
from jaxconv.llm.journal import Journal
from jaxconv.llm.results import Result
from jaxconv.llm.runner import run_tasks
from jaxconv.llm.settings import Settings
from jaxconv.llm.task import Task

_PART = 8 << 20  # bytes of a journal that travel at a time
_TOLD_S = 0.5  # seconds between two reports
_OUTLIVES_S = 30.0
LOST = "lost"
ENDS = {kind.__name__: kind for kind in (Refused, Failed, Stopped)}


@dataclass(frozen=True)
class Share:
    """What one worker asks, and how.

    Attributes:
        number: from 0.
        rows: (id, input).
        settings: with the worker's own part of limits and budgets.
    """

    number: int
    task: Task
    backend: Backend
    settings: Settings
    sample: int
    rows: list[tuple[str, Any]]


class Control:
    """An actor that workers tell of their results, and that tells them to stop."""

    def __init__(self):
        self._stopping = False
        self._begun: Counter[int] = Counter()
        self._results: list[Result] = []

    def begin(self, share: int) -> int:
        """How often the share was begun before."""
        self._begun[share] += 1
        return self._begun[share] - 1

    def begun(self) -> set[int]:
        """The shares that were begun."""
        return set(self._begun)

    def report(self, results: list[Result]) -> bool:
        """Takes results, without their values; whether to stop."""
        self._results += results
        return self._stopping

    def take(self) -> list[Result]:
        """The results since the last time."""
        results, self._results = self._results, []
        return results

    def stop(self) -> None:
        self._stopping = True


class Worker:
    """Asks for shares; what Ray Data maps over them.

    Args:
        name: of the run.
        control: the handle of its `Control`.
    """

    def __init__(self, name: str, control: Any):
        self._name, self._control = name, control

    def __call__(self, batch: Any) -> Iterator[Any]:
        """For a table with the columns `number` and `share` (pickled), tables of `number`, `ended`
        (the name of an error, `LOST` or ""), `message`, `at` and `part`: the share's journal, from
        the byte `at` on."""
        import pyarrow as pa

        for number, pickled in zip(*batch.to_pydict().values(), strict=True):
            path = node_folder(self._name) / f"share-{number}.sqlite"
            ended, message = "", ""
            try:
                if not self._ask(number, pickled, path):
                    ended = LOST
            except tuple(ENDS.values()) as error:
                ended, message = type(error).__name__, str(error)
                self._control.stop.remote()
            for at, part in parts_of(path):
                yield pa.table(
                    {
                        "number": [number],
                        "ended": [ended],
                        "message": [message],
                        "at": [at],
                        "part": pa.array([part], pa.large_binary()),
                    }
                )

    def _ask(self, number: int, pickled: bytes, path: Path) -> bool:
        """Whether the share was asked for."""
        import ray

        share: Share = pickle.loads(pickled)
        begun = ray.get(self._control.begin.remote(number))
        capped = share.settings.budget_usd or share.settings.budget_tokens
        if begun and capped and not path.exists():
            return False  # nobody knows what it took, so all of it counts as spent
        with _Reports(self._control) as reports, Journal(path) as journal:
            run_tasks(
                share.task,
                share.rows,
                share.backend,
                journal=journal,
                settings=share.settings,
                sample=share.sample,
                stop=reports.stopping.is_set,
                on_result=reports.add,
            )
        return True


class _Reports:
    """Tells a `Control` of results, at intervals and at the end.

    Attributes:
        stopping: set when it says to stop.
    """

    def __init__(self, control: Any):
        self._control = control
        self._waiting: list[Result] = []
        self.stopping, self._over = threading.Event(), threading.Event()

    def add(self, result: Result) -> None:
        self._waiting.append(replace(result, value=None))

    def __enter__(self) -> "_Reports":
        self._thread = threading.Thread(target=self._often, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _often(self) -> None:
        import ray

        while True:
            last = self._over.wait(_TOLD_S)
            waiting, self._waiting = self._waiting, []
            if ray.get(self._control.report.remote(waiting)):
                self.stopping.set()
            if last:
                return


# ---------------------------------------------------------------- journals on their way


def node_folder(name: str) -> Path:
    """Where this node keeps the journals of a run: on its own disk, because SQLite's log cannot be
    shared over a network.

    Raises:
        Refused: somebody else's folder is there.
    """
    mine = Path(tempfile.gettempdir()) / f"jaxconv-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid():
        raise Refused(f"{mine} belongs to another user; set TMPDIR to another folder on the node")
    folder = mine / name
    folder.mkdir(exist_ok=True)
    return folder


def parts_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all of a journal, at least one."""
    if not path.exists():
        yield 0, b""
        return
    with Journal(path):
        pass  # what is in its log goes into the file
    with open(path, "rb") as file:
        while part := file.read(_PART):
            yield file.tell() - len(part), part


def visit(name: str, backend: bytes | None) -> Iterator[tuple[str, str, int, bytes]]:
    """What a node has of a run of that name: (file's name, "", offset, part) of its journals. First
    it takes in the pickled backend; (error's name, message, 0, b"") is that it cannot."""
    try:
        if backend is not None:
            pickle.loads(backend)
        for path in sorted(node_folder(name).glob("share-*.sqlite")):
            _wait_for(path)
            for at, part in parts_of(path):
                yield path.name, "", at, part
    except tuple(ENDS.values()) as error:
        yield type(error).__name__, str(error), 0, b""


def _wait_for(path: Path) -> None:
    """Returns when nobody writes the journal: workers live on for seconds when their run is killed.

    Raises:
        Refused: they do for too long.
    """
    until = time.monotonic() + _OUTLIVES_S
    while True:
        try:
            Journal(path).close()
            return
        except Refused:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def forget(name: str) -> None:
    """Removes a run's journals from a node."""
    shutil.rmtree(node_folder(name), ignore_errors=True)  # two nodes may be on one disk
