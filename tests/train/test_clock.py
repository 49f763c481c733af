"""Time by cause: exact, over several attempts, lost steps included."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.train import clock
from jaxconv.train.clock import Clock, Compiling
from jaxconv.train.workdir import Workdir


class Time:
    """Moments that a test sets."""

    def __init__(self):
        self.at = 100.0

    def __call__(self) -> float:
        return self.at

    def passes(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture(autouse=True)
def no_clock_stays():
    yield
    clock.end()


def run_of(tmp_path):
    return Workdir(tmp_path / "run", writer=True)


def nonzero(spent):
    return {cause: pytest.approx(seconds) for cause, seconds in spent.items() if seconds}


def test_time_is_that_of_the_innermost_cause(time):
    compiled = iter([0.0, 0.0, 2.0, 0.0, 0.0])
    kept = Clock(time, lambda: next(compiled))
    time.passes(1)
    with kept.spending("step") as step:
        time.passes(10)
        with kept.spending("data"):
            time.passes(3)  # of which two seconds were compiling
        time.passes(4)
    assert step.seconds == 14
    time.passes(5)
    kept.settle()
    assert kept.spent == dict.fromkeys(clock.CAUSES, 0.0) | {
        "other": 6, "step": 14, "data": 1, "compile": 2
    }  # fmt: skip
    assert sum(kept.spent.values()) == time.at - 100


def test_an_exception_ends_what_it_leaves(time):
    kept = Clock(time)
    with pytest.raises(KeyError), kept.spending("step"), kept.spending("checkpoint"):
        time.passes(1)
        raise KeyError
    time.passes(2)
    kept.settle()
    assert (kept.spent["checkpoint"], kept.spent["step"], kept.spent["other"]) == (1, 0, 2)


def test_compiling_is_the_union_of_its_spans(time):
    listen = Compiling(time)
    trace, lower, compile_ = Compiling._EVENTS
    time.passes(3)
    listen(trace, 1.0)  # of a function that the next one calls
    time.passes(1)
    listen(trace, 4.0)
    assert listen.take() == 4.0
    time.passes(2)
    listen(lower, 1.5)
    listen("/jax/core/something_else", 9.0)
    time.passes(10)
    listen(compile_, 10.0)
    assert listen.take() == 11.5
    assert listen.take() == 0.0


def test_what_jax_compiles_is_no_step(tmp_path):
    with run_of(tmp_path) as workdir:
        clock.begin(workdir)
        compiles = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 7)
        x = np.ones((3, 3), np.float32)
        with clock.spending("step"):
            compiles(x)
        compiling = clock.spent("compile")
        assert compiling > 0.005
        with clock.spending("step"):
            compiles(x)
        assert clock.by_cause(workdir)["compile"] == pytest.approx(compiling, abs=1e-5)


def attempt(workdir, time, *, restores=None, steps=0, first=0, saves=()):
    """One process: 2 s to get ready, then 10 s a step and 1 s a checkpoint."""
    clock.begin(workdir, time)
    time.passes(2)
    with clock.spending("restart"):
        time.passes(0 if restores is None else 3)
    clock.restored("train", restores or 0)
    for done in range(first + 1, first + steps + 1):
        with clock.spending("step"):
            time.passes(10)
        if done in saves:
            with clock.spending("checkpoint"):
                time.passes(1)
        clock.mark("train", done, now=done in saves)


def test_one_process_adds_up_to_its_time(tmp_path, time):
    with run_of(tmp_path) as workdir:
        attempt(workdir, time, steps=3, saves=(2,))
        time.passes(4)
        spent = clock.by_cause(workdir)
        assert nonzero(spent) == {"other": 6, "step": 30, "checkpoint": 1}
        assert sum(spent.values()) == pytest.approx(time.at - 100)


def test_steps_after_the_last_checkpoint_of_a_killed_process_are_lost(tmp_path, time):
    with run_of(tmp_path) as workdir:
        attempt(workdir, time, steps=5, saves=(2, 4))  # killed: 10 s of the fifth step are lost
        began = time.at
        attempt(workdir, time, restores=4, first=4, steps=2)  # killed: two steps are lost
        attempt(workdir, time, restores=4, first=4, steps=3, saves=(7,))
        spent = clock.by_cause(workdir)
        assert nonzero(spent) == {
            "other": 2, "step": 70, "checkpoint": 3, "lost": 30, "restart": 2 * (2 + 3)
        }  # fmt: skip
        assert sum(spent.values()) == pytest.approx(time.at - 100)
        assert began < time.at


def test_another_stage_loses_nothing(tmp_path, time):
    with run_of(tmp_path) as workdir:
        attempt(workdir, time, steps=2, saves=(2,))
        clock.restored("other stage", 0)
        assert clock.by_cause(workdir)["lost"] == 0


def test_what_was_saved_in_the_middle_of_a_step_is_kept(tmp_path, time):
    with run_of(tmp_path) as workdir:
        clock.begin(workdir, time)
        with clock.spending("step"):
            time.passes(6)
            clock.mark("play", 0, now=True)
            time.passes(3)  # these are lost, but nobody has noted them
        clock.begin(workdir, time)
        clock.restored("play", 0)
        assert nonzero(clock.by_cause(workdir)) == {"step": 6}


def test_lines_are_appended_and_a_torn_one_is_passed_over(tmp_path, time):
    with run_of(tmp_path) as workdir:
        attempt(workdir, time, steps=1, saves=(1,))
        path = workdir.path / "clock.jsonl"
        before = path.read_bytes()
        path.write_bytes(before + b'{"attempt": 1')
        attempt(workdir, time, restores=1, first=1, steps=1, saves=(2,))
        assert path.read_bytes().startswith(before)
        assert nonzero(clock.by_cause(workdir)) == {
            "other": 2, "step": 20, "checkpoint": 2, "restart": 5
        }  # fmt: skip
        sizes = [len(json.dumps(line)) for line in clock._read(workdir)]
        assert max(sizes) < 200


def test_lines_are_a_second_apart(tmp_path, time):
    with run_of(tmp_path) as workdir:
        clock.begin(workdir, time)
        for done in range(1, 1001):
            time.passes(0.01)
            clock.mark("train", done)
        assert 9 <= len(clock._read(workdir)) - 1 <= 10


def test_a_process_that_only_reads_writes_nothing(tmp_path, time):
    with run_of(tmp_path):
        reader = Workdir(tmp_path / "run", writer=False)
        attempt(reader, time, steps=2, saves=(1,))
        clock.note("memory", planned=1)
        assert sum(clock.by_cause(reader).values()) == 0
        assert not (tmp_path / "run" / "clock.jsonl").exists()


def test_notes_of_all_attempts_are_kept(tmp_path):
    with run_of(tmp_path) as workdir:
        for planned in (5, 7):
            clock.begin(workdir)
            clock.note("memory", planned=planned)
        assert [n["planned"] for n in clock.notes(workdir, "memory")] == [5, 7]
