"""The loop that every stage of training runs in, whatever its objective and its data.

A step is one update of a supervised objective, or one iteration of self-play. The loop dispatches
it, and looks at the numbers of a step only after the next one is under way, so that the device does
not wait for the host. Around the steps it evaluates, saves, keeps the best, stops politely, and
stops for good when a number is not finite: nothing is saved before the numbers up to it were seen.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.models.sharding import for_host
from jaxconv.perf.flops import rates_of
from jaxconv.train import clock, interrupt
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.metrics import MetricsWriter
from jaxconv.train.profiling import Profiler
from jaxconv.train.progress import Progress
from jaxconv.train.state import TrainState
from jaxconv.train.workdir import Workdir

_OF_STEPS = (clock.STEP, clock.DATA)
_KEPT = {"done", "best", "notes", "work"}  # what a checkpoint keeps of a loop on the host


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How a stage is gone through.

    Attributes:
        stage: its name in metrics, checkpoints and progress.
        steps: in all.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep: latest checkpoints that stay.
        evaluate_every: steps between evaluations; the start, as step 0, and the last step are
            always evaluated. 0: never.
        best: a metric of the evaluation. The weights with which it was lowest stay in a checkpoint
            of their own, `<stage>_best`. The start is not among them, however good it was: what
            comes out has learned something, and its number beside that of step 0 says whether that
            was for the better. "": none do.
        headline: metrics to show while it runs.
        profile: steps to trace.
        ahead: how many steps are dispatched before the numbers of one are looked at: 1, or 0 where
            a step waits for its own numbers anyway.
        dtype: of the matrix products, whose peak a device's utilization is a share of.
    """

    stage: str
    steps: int
    checkpoint_every: int
    keep: int
    evaluate_every: int = 0
    best: str = ""
    headline: tuple[str, ...] = ("loss",)
    profile: range | None = None
    ahead: int = 1
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Pending:
    """The numbers of a step, which may still be on the device.

    Attributes:
        metrics: scalars by name.
        finite: bool [tensors], whether each tensor of `names` was finite.
        names: of these tensors, in the order in which they were computed.
        tokens: that the step processed.
        flops: model FLOPs that the step took by its formula; see `perf.flops`.
    """

    metrics: Mapping[str, Any]
    finite: Any
    names: Sequence[str]
    tokens: int
    flops: float = 0.0


class Work(Protocol):
    """What a stage does in a step, and what it keeps between steps besides the state."""

    def step(
        self, state: TrainState, done: int, save: Callable[[], None]
    ) -> tuple[TrainState, Pending]:
        """Step `done + 1`; `state` is donated. `save` saves the state before it, in its middle."""

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        """Numbers on held-out data."""

    def verdict(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A note on why to end the stage after a step with these numbers of its own, or None."""

    def snapshot(self) -> tuple[Any, dict[str, Any]]:
        """(arrays, JSON-able state) to go on from; `restore` takes them back."""

    def like(self, host: dict[str, Any]) -> Any:
        """Arrays of the shapes that a snapshot with this `host` has."""

    def restore(self, arrays: Any, host: dict[str, Any]) -> None: ...


@dataclasses.dataclass
class Best:
    """The lowest value of a metric so far, and the step that had it."""

    step: int = 0
    value: float = math.inf


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        model: the weights that the `best` metric picked, those of the last step where none was
            asked for; averaged where the state has an average.
        step: the step that made them.
        notes: why it ended before its last step, if it did.
    """

    model: Any
    step: int
    notes: list[str]


class Loop:
    """One stage of a run in its workdir; `run` goes on where a stopped or killed process was.

    Args:
        work: what a step is.
        state: before the first step. Its arrays say where restored ones go.
        settings: sizes.
        workdir: of the run.
    """

    def __init__(self, work: Work, state: TrainState, settings: LoopSettings, workdir: Workdir):
        self._work, self._state, self._settings = work, state, settings
        self._workdir = workdir
        self._done = 0
        self._best = Best()
        self._notes: list[str] = []
        self._pending: list[tuple[int, Pending, bool | jax.Array]] = []
        self._stops = False

    def run(self) -> Outcome:
        """Goes through the stage to its end.

        Raises:
            Stopped: the run was asked to stop; its state is saved.
            Failed: a number is not finite, a held-out one included; the checkpoints before stay.
        """
        s = self._settings
        folder = self._workdir.checkpoints
        with (
            Checkpoints(folder / s.stage, keep=s.keep) as self._checkpoints,
            # Two, so that a kill between the best weights and the checkpoint that names them leaves
            # those that the checkpoint before it names.
            Checkpoints(folder / f"{s.stage}_best", keep=2) as self._best_checkpoints,
        ):
            with clock.spending(clock.RESTART):
                begun = self._restore()
            clock.restored(s.stage, self._done)
            resume_at = self._done if begun else None
            with (
                MetricsWriter(self._workdir, s.stage, resume_at=resume_at) as self._writer,
                Progress(self._workdir, s.stage, s.steps, start=self._done) as self._progress,
            ):
                if s.evaluate_every and not begun:
                    self._writer.write(0, self._held_out())
                profiler = Profiler(self._workdir, s.stage, s.profile)
                self._looked = clock.spent(*_OF_STEPS)
                while self._done < s.steps and not self._notes:
                    with profiler.step(self._done + 1):
                        self._step()
                with clock.spending(clock.CHECKPOINT):
                    self._checkpoints.wait()
            return Outcome(*self._chosen(), self._notes)

    def _step(self) -> None:
        s = self._settings
        # On an accelerator a forgotten copy costs a round trip each step; here it is an error.
        with clock.spending(clock.STEP), jax.transfer_guard("disallow"):
            self._state, pending = self._work.step(self._state, self._done, self._save_midway)
            asked = interrupt.requested()
        self._done += 1
        self._pending.append((self._done, pending, asked))
        # Several processes learn it from the numbers of a step, all from those of the same one.
        self._stops |= asked is True
        due = self._stops or self._is_last() or self._evaluates()
        due = due or self._done % s.checkpoint_every == 0
        self._look(ahead=0 if due else s.ahead)
        saves = due or self._stops or bool(self._notes)
        if saves:
            self._save()
        clock.mark(s.stage, self._done, now=saves)
        if self._stops:
            with clock.spending(clock.CHECKPOINT):
                self._checkpoints.wait()
            raise Stopped(f"{_spoken(s.stage)} stopped after step {self._done} of {s.steps}")

    def _is_last(self) -> bool:
        return self._done == self._settings.steps or bool(self._notes)

    def _evaluates(self) -> bool:
        every = self._settings.evaluate_every
        return every > 0 and (self._done % every == 0 or self._is_last())

    def _look(self, *, ahead: int) -> None:
        """Writes the numbers of all steps but the last `ahead`; of all when they end the stage or
        with them the run was asked to stop.

        Those of the newest step get the held-out ones, where they are due.
        """
        s = self._settings
        while (due := len(self._pending) - (0 if self._notes or self._stops else ahead)) > 0:
            looked, self._pending = self._pending[:due], self._pending[due:]
            with clock.spending(clock.STEP):  # the device is at work until they are there
                fetched = jax.device_get(
                    for_host([(dict(p.metrics), p.finite, asked) for _, p, asked in looked])
                )
            seconds = self._seconds() / due
            for (step, pending, _), (numbers, finite, asked) in zip(looked, fetched, strict=True):
                self._stops |= bool(asked)
                metrics = {name: float(value) for name, value in numbers.items()}
                self._refuse_not_finite(step, pending.names, np.asarray(finite))
                if why := self._work.verdict(step, metrics):
                    self._notes.append(why)
                metrics |= {"time/step_s": seconds}
                if pending.flops:
                    rates = rates_of(pending.flops, seconds, s.dtype)
                    metrics |= {f"speed/{name}": rate for name, rate in rates.items()}
                if step == self._done and self._evaluates():
                    metrics |= self._evaluated()
                self._writer.write(step, metrics)
                shown = {name: metrics[name] for name in s.headline if name in metrics}
                self._progress.update(step, shown, tokens=pending.tokens)

    def _seconds(self) -> float:
        """Since it was asked last, without compiling, evaluations and checkpoints."""
        before, self._looked = self._looked, clock.spent(*_OF_STEPS)
        return max(self._looked - before, 1e-9)

    def _refuse_not_finite(self, step: int, names: Sequence[str], finite: np.ndarray) -> None:
        bad = np.flatnonzero(~finite)
        if bad.size:
            raise self._not_finite(
                step, f"{names[bad[0]]} is not finite, the first of {bad.size} such tensors"
            )

    def _evaluated(self) -> dict[str, float]:
        s = self._settings
        found = self._held_out()
        if s.best and found[s.best] < self._best.value:
            self._best = Best(self._done, found[s.best])
            with clock.spending(clock.CHECKPOINT):
                self._best_checkpoints.save(self._done, {"model": self._state.averaged}, {})
                self._best_checkpoints.wait()  # on disk before a checkpoint that names it
        return found

    def _held_out(self) -> dict[str, float]:
        with clock.spending(clock.EVALUATION):
            found = {name: float(x) for name, x in self._work.evaluate(self._state).items()}
        for name, value in found.items():
            if not math.isfinite(value):
                raise self._not_finite(self._done, f"{name} is {value}")
        return found

    def _not_finite(self, step: int, what: str) -> Failed:
        stage = self._settings.stage
        if not step:
            return Failed(f"{_spoken(stage)} before the first step: {what}; its start is no good")
        return Failed(
            f"{_spoken(stage)} step {step}: {what}; the checkpoints before it are good (they are "
            f"in {self._workdir.checkpoints / stage}), and the learning rate may be too high"
        )

    def _save_midway(self) -> None:
        """Saves the state before the step under way, whose guard is not about that."""
        with jax.transfer_guard("allow"):
            self._look(ahead=0)
            self._save()
            clock.mark(self._settings.stage, self._done, now=True)

    def _save(self) -> None:
        with clock.spending(clock.CHECKPOINT):
            arrays, host = self._work.snapshot()
            self._workdir.push()  # what a checkpoint goes on from is there before it is
            self._checkpoints.save(
                max(self._done, (self._checkpoints.latest() or 0) + 1),
                {"state": self._state, "work": arrays},
                {
                    "done": self._done,
                    "best": dataclasses.asdict(self._best) if self._best.step else None,
                    "notes": self._notes,
                    "work": host,
                },
            )

    def _restore(self) -> bool:
        """Goes back to the last checkpoint; whether there is one."""
        saved = self._checkpoints.latest()
        if saved is None:
            self._best_checkpoints.drop_after(0)
            return False
        host = self._checkpoints.host(saved)
        if set(host) != _KEPT:
            raise Refused(
                f"checkpoint {self._workdir.checkpoints / self._settings.stage}/{saved} keeps "
                f"{', '.join(sorted(host))}; expected {', '.join(sorted(_KEPT))}: another version "
                "wrote it, and --overwrite starts anew"
            )
        like = {"state": self._state, "work": self._work.like(host["work"])}
        arrays, _ = self._checkpoints.restore(saved, like)
        self._state = arrays["state"]
        self._work.restore(arrays["work"], host["work"])
        self._done, self._notes = host["done"], host["notes"]
        if host["best"]:
            self._best = Best(**host["best"])
        self._best_checkpoints.drop_after(self._done)
        return True

    def _chosen(self) -> tuple[Any, int]:
        model = self._state.averaged
        if not self._best.step or self._best.step == self._done:
            return model, self._done
        if self._best.step not in self._best_checkpoints.steps():
            raise Refused(
                f"{self._workdir.checkpoints} has no checkpoint of step {self._best.step}, which "
                f"had the best {self._settings.best}; --overwrite starts anew"
            )
        arrays, _ = self._best_checkpoints.restore(self._best.step, {"model": model})
        return arrays["model"], self._best.step


def _spoken(stage: str) -> str:
    return stage.replace("_", "-")
