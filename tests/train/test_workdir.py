"""Who holds a workdir, what is in it, and files that are never half written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxconv.errors import Failed, Refused
from jaxconv.train import atomic
from jaxconv.train.workdir import Workdir, config_sha, remove


def test_the_lock_is_exclusive_and_names_its_holder(tmp_path):
    with (
        Workdir(tmp_path / "run"),
        pytest.raises(Refused, match=rf"in use by process {os.getpid()};"),
    ):
        Workdir(tmp_path / "run")
    Workdir(tmp_path / "run").close()


def test_a_killed_holder_frees_the_lock(tmp_path):
    code = "import sys, time; from jaxconv.train.workdir import Workdir\n"
    code += "held = Workdir(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Refused, match=f"process {holder.pid}"):
        Workdir(tmp_path / "run")
    holder.kill()
    holder.communicate()
    Workdir(tmp_path / "run").close()


def test_readers_need_no_lock(tmp_path):
    with Workdir(tmp_path / "run") as held:
        reader = Workdir(tmp_path / "run", writer=False)
        reader.write_identity({"recipe": "r"}, preset="tiny")
        assert not held.config.exists()


def test_folders_of_somebody_else_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(Refused, match=r"has files but no config\.json"):
        Workdir(tmp_path)
    with pytest.raises(Refused, match="is a file"):
        Workdir(tmp_path / "thesis.tex")
    with pytest.raises(Refused, match=r"has files but no config\.json"):
        remove(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_remove_takes_the_whole_run_and_what_an_earlier_removal_left(tmp_path):
    with Workdir(tmp_path / "run") as workdir:
        workdir.write_identity({"recipe": "r"}, preset="tiny")
        with pytest.raises(Refused, match="in use"):
            remove(tmp_path / "run")
    (tmp_path / ".run.removed-1").mkdir()
    remove(tmp_path / "run")
    assert not list(tmp_path.iterdir())
    remove(tmp_path / "run")  # nothing there is nothing to do


def test_identity_round_trip_and_sha(tmp_path):
    config = {"recipe": "r", "lr": 0.1, "group": {"b": 1, "a": [1, 2]}}
    with Workdir(tmp_path / "run") as workdir:
        assert workdir.read_identity() is None
        workdir.write_identity(config, preset="tiny")
        identity = workdir.read_identity()
    assert identity["config"] == config
    assert identity["config_sha"] == config_sha(json.loads(json.dumps(config)))
    assert config_sha({"b": 1, "a": 2}) == config_sha({"a": 2, "b": 1}) != config_sha({"a": 2})
    assert identity["devices"] == {"cpu": 1}


def test_a_damaged_identity_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with Workdir(tmp_path) as workdir, pytest.raises(Refused, match=r"config\.json is not JSON"):
        workdir.read_identity()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    atomic.write_json(path, {"old": 1})

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failed, match=rf"disk full while writing {path}"):
        atomic.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "big.txt"
    atomic.write_text(path, "0" * 200_000)
    code = "import sys, itertools; from pathlib import Path; from jaxconv.train import atomic\n"
    code += "for i in itertools.count(1):\n"
    code += "    atomic.write_text(Path(sys.argv[1]), str(i % 10) * 200_000)\n"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    seen = set()
    end = time.monotonic() + 60
    while len(seen) < 4 and time.monotonic() < end:
        content = path.read_text()
        assert len(content) == 200_000 and len(set(content)) == 1
        seen.add(content[0])
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(seen) == 4
    assert len(set(path.read_text())) == 1


def test_disk_full_is_seen_through_other_exceptions():
    def wrapped(cause):
        try:
            raise RuntimeError("save failed") from cause
        except RuntimeError as error:
            return error

    assert atomic.is_disk_full(OSError(errno.EFBIG, "x"))
    assert atomic.is_disk_full(wrapped(OSError(errno.ENOSPC, "x")))
    assert atomic.is_disk_full(ValueError("Error writing: No space left on device [code=28]"))
    assert not atomic.is_disk_full(OSError(errno.EACCES, "No space left on device"))
    assert not atomic.is_disk_full(wrapped(ValueError("shapes differ")))
