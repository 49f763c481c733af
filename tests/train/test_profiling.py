"""Traces of exactly the steps asked for."""

import gzip
import json

import jax.numpy as jnp
import pytest

from jaxconv.errors import Refused
from jaxconv.train.profiling import Profiler, parse_steps
from jaxconv.train.workdir import Workdir


def test_steps_are_a_python_slice():
    assert parse_steps("") is None
    assert list(parse_steps("10:12")) == [10, 11]


@pytest.mark.parametrize("text", ["10", "12:10", "3:3", "a:b", ":4", "4:", "-1:2", "1:2:3"])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(Refused, match=r'config\.profile\.steps=.*must be "FIRST:STOP"'):
        parse_steps(text)


def traced_steps(workdir):
    steps = set()
    for path in workdir.tensorboard.glob("ppo/plugins/profile/*/*.trace.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            if event.get("name", "").startswith("ppo"):
                steps.add(int(event["args"]["step_num"]))
    return steps


def test_exactly_these_steps_are_traced(tmp_path):
    with Workdir(tmp_path / "run") as workdir:
        profiler = Profiler(workdir, "ppo", range(2, 4))
        for number in range(6):
            with profiler.step(number):
                (jnp.ones((8, 8)) @ jnp.ones((8, 8))).block_until_ready()
        assert traced_steps(workdir) == {2, 3}


def test_an_exception_still_leaves_the_trace_and_none_running(tmp_path):
    with Workdir(tmp_path / "run") as workdir:
        profiler = Profiler(workdir, "ppo", range(0, 5))
        with profiler.step(0):
            pass
        with pytest.raises(KeyError), profiler.step(1):
            raise KeyError("x")
        assert traced_steps(workdir) == {0, 1}
        with profiler.step(2):  # would fail if a trace were still running
            pass
        with profiler.step(4):
            pass


def test_without_steps_nothing_is_written(tmp_path):
    with Workdir(tmp_path / "run") as workdir:
        with Profiler(workdir, "ppo", None).step(0):
            pass
        assert not workdir.tensorboard.exists()
