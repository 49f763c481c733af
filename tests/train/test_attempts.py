import json

import pytest

from jaxconv.train import attempts
from jaxconv.train.workdir import Workdir


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(workdir, a function that sets the time)."""

    def at(moment):
        monkeypatch.setattr(attempts.time, "time", lambda: moment)

    with Workdir(tmp_path / "run") as workdir:
        yield workdir, at


def record(workdir, *moments):
    with open(workdir.metrics, "a") as file:
        for moment in moments:
            file.write(json.dumps({"stage": "s", "step": 1, "time": moment}) + "\n")


def test_one_process_lasts_until_now(run):
    workdir, at = run
    at(100.0)
    attempts.begin(workdir)
    at(130.0)
    assert attempts.wall_seconds(workdir) == 30.0


def test_time_between_processes_does_not_count(run):
    workdir, at = run
    at(100.0)
    attempts.begin(workdir)
    record(workdir, 110.0, 125.0)
    at(1000.0)  # killed at some time after 125
    attempts.begin(workdir)
    at(2000.0)  # killed before its first record
    attempts.begin(workdir)
    record(workdir, 2010.0)
    at(2050.0)
    assert attempts.wall_seconds(workdir) == 25.0 + 0.0 + 50.0


def test_a_torn_line_is_passed_over(run):
    workdir, at = run
    at(100.0)
    attempts.begin(workdir)
    path = workdir.path / "attempts.jsonl"
    path.write_text(path.read_text() + '{"start": 1')
    at(200.0)
    attempts.begin(workdir)
    at(230.0)
    assert attempts.wall_seconds(workdir) == 30.0
    assert attempts.changes(workdir) == []


def test_other_devices_are_told(run, monkeypatch):
    workdir, at = run
    at(100.0)
    attempts.begin(workdir)
    monkeypatch.setattr(attempts, "device_kinds", lambda: {"cpu": 64})
    attempts.begin(workdir)
    [note] = attempts.changes(workdir)
    assert "other devices" in note and "{'cpu': 64}" in note


def test_a_process_that_only_reads_notes_nothing(run):
    workdir, at = run
    at(1.0)
    attempts.begin(Workdir(workdir.path, writer=False))
    assert attempts.wall_seconds(workdir) == 0.0
