"""Where the time of a run goes, by cause, over all processes that worked on it one after another.

At every moment the time of a process has one cause, the innermost `spending` it is in, so the
causes add up to the whole. Compiling is taken out of whatever it happens in. What was spent goes to
`clock.jsonl` of the workdir, a line every now and then and one at each checkpoint; when a stage
goes back to a checkpoint, the steps that the lines after it tell of were lost.
"""

import collections
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxconv.train import atomic, metrics
from jaxconv.train.workdir import Workdir

STEP, COMPILE, DATA, CHECKPOINT = "step", "compile", "data", "checkpoint"
EVALUATION, RESTART, LOST, OTHER = "evaluation", "restart", "lost", "other"
CAUSES = (STEP, COMPILE, DATA, CHECKPOINT, EVALUATION, RESTART, LOST, OTHER)
"""`step` is the productive time. `data` is waiting for it, `restart` going back to a checkpoint and
getting ready again, `lost` steps that were done anew, `other` all the rest, such as preparing data.
"""

_FILE = "clock.jsonl"
_EVERY = 1.0  # seconds between two lines, unless a checkpoint asks for one


class Compiling:
    """Seconds that one thread has spent in tracing, lowering and compiling, by jax's own events.

    Tracing a function contains tracing what it calls, and an event comes when its span is over: a
    span takes the place of those inside it.
    """

    _EVENTS = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._thread = threading.get_ident()
        self._spans: collections.deque[tuple[float, float]] = collections.deque(maxlen=10_000)
        self._total = self._taken = 0.0

    def __call__(self, event: str, seconds: float, **_: Any) -> None:
        if event not in self._EVENTS or threading.get_ident() != self._thread:
            return
        end = self._now()
        while self._spans and self._spans[-1][1] > end - seconds:
            inside = self._spans.pop()
            self._total -= inside[1] - inside[0]
        self._spans.append((end - seconds, end))
        self._total += seconds

    def take(self) -> float:
        """Seconds since the last call."""
        taken, self._taken = self._total - self._taken, self._total
        return max(taken, 0.0)


@dataclass
class Span:
    """A piece of time under way or over.

    Attributes:
        seconds: of its own cause: without compiling and without spans inside it.
    """

    cause: str
    seconds: float = 0.0


@dataclass
class Clock:
    """Time of one process by cause; see the functions below, which ask that of this process.

    Attributes:
        now: seconds, from any zero.
        compiled: seconds of compiling since it was asked last.
    """

    now: Callable[[], float] = time.monotonic
    compiled: Callable[[], float] = lambda: 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))

    def __post_init__(self):
        self._since = self.now()
        self._inside = [Span(OTHER)]

    @contextmanager
    def spending(self, cause: str) -> Iterator[Span]:
        import jax.profiler  # here, because a command line is refused without waiting for jax

        self.settle()
        span = Span(cause)
        self._inside.append(span)
        try:
            with jax.profiler.TraceAnnotation(cause):  # a profile shows it, too
                yield span
        finally:
            self.settle()
            self._inside.remove(span)

    def settle(self) -> None:
        """Books the time up to now."""
        moment = self.now()
        elapsed, self._since = moment - self._since, moment
        compiling = min(self.compiled(), elapsed)
        self.spent[COMPILE] += compiling
        self.spent[self._inside[-1].cause] += elapsed - compiling
        self._inside[-1].seconds += elapsed - compiling


_compiling: Compiling | None = None
_clock = Clock()
_book: "_Book | None" = None


@dataclass
class _Book:
    """Where the lines of this process go."""

    path: Path
    attempt: float
    booked: dict[str, float]
    written: float


def begin(workdir: Workdir, now: Callable[[], float] = time.monotonic) -> None:
    """Starts the clock of this process, which works on the run from now on."""
    global _compiling, _clock, _book
    import jax.monitoring

    if _compiling is None:
        _compiling = Compiling()
        jax.monitoring.register_event_duration_secs_listener(_compiling)
    _compiling.take()
    _clock, _book = Clock(now, _compiling.take), None
    if workdir.is_writer:
        _book = _Book(workdir.path / _FILE, time.time(), dict.fromkeys(CAUSES, 0.0), now())
        _append({"attempt": _book.attempt}, before="\n")


def end() -> None:
    """Nothing more is noted: this process has ended its work on the run."""
    global _book
    _book = None


def spending(cause: str):
    """A context whose time is of this cause, of `CAUSES`, but for what is inside it in turn."""
    return _clock.spending(cause)


def spent(*causes: str) -> float:
    """Seconds of this process so far that were of these causes."""
    _clock.settle()
    return sum(_clock.spent[cause] for cause in causes)


def mark(stage: str, done: int, *, now: bool = False) -> None:
    """Notes how far a stage has come: a line now, or when the last one is some time ago."""
    if _book is not None and (now or _clock.now() - _book.written >= _EVERY):
        _write({"stage": stage, "done": done})


def restored(stage: str, done: int) -> None:
    """Notes that a stage goes on after so many steps: what was done after them is lost."""
    if _book is not None:
        _write({"stage": stage, "restored": done})


def note(what: str, **numbers: float) -> None:
    """Keeps numbers of this attempt, such as a peak of memory, for the run's report."""
    if _book is not None:
        _append({"attempt": _book.attempt, "note": what, **numbers})


def notes(workdir: Workdir, what: str) -> list[dict[str, Any]]:
    """What was noted in all attempts."""
    return [line for line in _read(workdir) if line.get("note") == what]


def by_cause(workdir: Workdir) -> dict[str, float]:
    """Seconds of all attempts by cause, this one until now. Of a process that was killed the time
    after its last line is missing."""
    if _book is not None and _book.path.parent == workdir.path:
        _write({})
    spent = dict.fromkeys(CAUSES, 0.0)
    steps: list[tuple[str, int, float]] = []  # that nobody has lost yet
    attempts, attempt, ready = 0, None, True
    for line in _read(workdir):
        if line["attempt"] != attempt:
            attempts, attempt = attempts + 1, line["attempt"]
            ready = attempts == 1
        if "restored" in line:
            lost = [s for s in steps if s[0] == line["stage"] and s[1] > line["restored"]]
            steps = [s for s in steps if s not in lost]
            seconds = sum(s[2] for s in lost)
            spent[STEP] -= seconds
            spent[LOST] += seconds
        for cause, seconds in line.get("spent", {}).items():
            # A later process first does again what the first one did to get ready.
            spent[RESTART if cause == OTHER and not ready else cause] += seconds
        if "done" in line:
            ready = True
            steps.append((line["stage"], line["done"], line["spent"].get(STEP, 0.0)))
    return spent


def _write(about: dict[str, Any]) -> None:
    assert _book is not None
    _clock.settle()
    new = {
        cause: round(seconds - _book.booked[cause], 6) for cause, seconds in _clock.spent.items()
    }
    new = {cause: seconds for cause, seconds in new.items() if seconds}
    for cause, seconds in new.items():
        _book.booked[cause] += seconds
    _book.written = _clock.now()
    _append({"attempt": _book.attempt, **about, "spent": new})


def _append(line: dict[str, Any], before: str = "") -> None:
    """`before`: a line break, so that the first line stands by itself even after a torn one."""
    assert _book is not None
    with atomic.disk_full_is_failure(_book.path), open(_book.path, "a", encoding="utf-8") as file:
        file.write(before + json.dumps(line) + "\n")


def _read(workdir: Workdir) -> list[dict[str, Any]]:
    path = workdir.path / _FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [record for line in lines if (record := metrics.parsed(line)) is not None]
