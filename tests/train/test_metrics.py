"""metrics.jsonl and TensorBoard: every step exactly once, torn lines gone, strict JSON."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.errors import Failed
from jaxconv.train import metrics
from jaxconv.train.metrics import MetricsWriter
from jaxconv.train.workdir import Workdir


def write(workdir, stage, steps, *, resume_at=None, value=0.0):
    with MetricsWriter(workdir, stage, resume_at=resume_at) as writer:
        for step in steps:
            writer.write(step, {"loss": value})


def steps_of(workdir, stage):
    return [(record["step"], record["loss"]) for record in metrics.read(workdir, stage)]


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run") as held:
        yield held


def test_records_are_flushed_step_by_step(workdir):
    writer = MetricsWriter(workdir, "warm_start")
    writer.write(1, {"reward/mean": jnp.float32(4.5), "n": np.int64(3), "ok": True})
    record = json.loads(workdir.metrics.read_text())
    assert record.pop("time") > 1.7e9
    assert record == {"stage": "warm_start", "step": 1, "reward/mean": 4.5, "n": 3, "ok": 1.0}
    writer.close()


def test_a_resume_drops_only_its_own_stage_after_the_restored_step(workdir):
    write(workdir, "sft", [1, 2, 3])
    write(workdir, "ppo", [1, 2, 3, 4])
    write(workdir, "ppo", [3, 4, 5], resume_at=2, value=1.0)
    assert steps_of(workdir, "sft") == [(1, 0), (2, 0), (3, 0)]
    assert steps_of(workdir, "ppo") == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    write(workdir, "ppo", [1], value=2.0)  # from the beginning
    assert steps_of(workdir, "ppo") == [(1, 2)]
    assert len(steps_of(workdir, "sft")) == 3


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 8), cut=st.integers(1, 200), restored=st.integers(0, 8))
def test_whatever_a_kill_leaves_each_step_stands_once(tmp_path_factory, total, cut, restored):
    with Workdir(tmp_path_factory.mktemp("run")) as workdir:
        write(workdir, "other", [1])
        before = workdir.metrics.stat().st_size
        write(workdir, "ppo", range(1, total + 1))
        # A kill tears the end of the file off; the checkpoint is never ahead of whole records.
        content = workdir.metrics.read_bytes()
        workdir.metrics.write_bytes(content[: max(before, len(content) - cut)])
        whole = len(metrics.read(workdir, "ppo"))
        restored = min(restored, whole)
        write(workdir, "ppo", range(restored + 1, 10), resume_at=restored, value=1.0)
        assert [step for step, _ in steps_of(workdir, "ppo")] == list(range(1, 10))
        assert steps_of(workdir, "other") == [(1, 0)]
        assert all(json.loads(line) for line in workdir.metrics.read_text().splitlines())


def test_values_that_are_not_finite_are_null(workdir):
    with MetricsWriter(workdir, "ppo") as writer:
        writer.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": 1.0})

    def not_strict(constant):
        raise AssertionError(constant)

    record = json.loads(workdir.metrics.read_text(), parse_constant=not_strict)
    assert (record["a"], record["b"], record["c"]) == (None, None, 1.0)


@pytest.mark.parametrize("value", ["high", None, [1.0], np.zeros(2), jnp.ones((1,))])
def test_what_is_no_number_is_refused(workdir, value):
    with (
        MetricsWriter(workdir, "ppo") as writer,
        pytest.raises(TypeError, match=r"metric loss is .*; it must be one number"),
    ):
        writer.write(1, {"loss": value})
    assert metrics.read(workdir) == []


def test_steps_must_rise(workdir):
    with MetricsWriter(workdir, "ppo", resume_at=4) as writer:
        with pytest.raises(ValueError, match="ppo step 4; it must come after 4"):
            writer.write(4, {"loss": 0.0})
        writer.write(5, {"loss": 0.0})
        with pytest.raises(ValueError, match="step 5; it must come after 5"):
            writer.write(5, {"loss": 0.0})


def test_tensorboard_has_the_scalars_and_hides_what_a_resume_repeats(workdir):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    def events(path):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            payload = content[12 : 12 + length]
            crc = int.from_bytes(content[12 + length : 16 + length], "little")
            assert crc == masked_crc32c(payload)
            yield Event.FromString(payload)
            content = content[16 + length :]

    write(workdir, "ppo", [1, 2, 3])
    (first,) = (workdir.tensorboard / "ppo").iterdir()
    write(workdir, "ppo", [3], resume_at=2)
    (second,) = set((workdir.tensorboard / "ppo").iterdir()) - {first}
    scalars = [(e.step, e.summary.value[0].tag) for e in events(first) if e.summary.value]
    assert scalars == [(1, "ppo/loss"), (2, "ppo/loss"), (3, "ppo/loss")]
    starts = [e.step for e in events(second) if e.session_log.status == SessionLog.START]
    assert starts == [3]


def test_other_processes_write_nothing(workdir):
    reader = Workdir(workdir.path, writer=False)
    write(reader, "ppo", [1, 2])
    assert not workdir.metrics.exists() and not workdir.tensorboard.exists()


def test_a_full_disk_names_the_file(workdir, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails as well)
    with MetricsWriter(workdir, "ppo") as writer, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", full)
        with pytest.raises(Failed, match=rf"disk full while writing {workdir.metrics}"):
            writer.write(1, {"loss": 0.0})
    with contextlib.suppress(OSError):
        full.close()
