"""The shell scripts: which environment they make, when they make it again, what they pass on.

The interpreter is a fake one that writes down what it is asked, so that nothing is installed.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent

_FAKE = """#!/usr/bin/env bash
# A Python of version {version}: answers for its version, makes environments, logs the rest.
case "$*" in
*python_version*) echo "{version}" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "{path}" "$3/bin/python" ;;
"-c import pip") exit 0 ;;
"-m pip"*) echo "$*" >>"$LOG"; exit "${{PIP_STATUS:-0}}" ;;
*) echo "$*" >>"$LOG"; exit "${{RUN_STATUS:-0}}" ;;
esac
"""


class Clone:
    """A copy of the scripts with fake interpreters on the path."""

    def __init__(self, folder):
        self.root = folder / "clone"
        shutil.copytree(_ROOT / "launch", self.root / "launch")
        shutil.copy(_ROOT / "pyproject.toml", self.root)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        for name, version in (
            ("python3", "3.11.7"),
            ("python3.13", "3.13.1"),
            ("python3.10", "3.10.2"),
        ):
            path = self.bin / name
            path.write_text(_FAKE.format(version=version, path=path))
            path.chmod(0o755)

    def run(self, script, *arguments, cwd=None, **environment):
        """Returns (exit status, standard error, what the interpreters were asked)."""
        self.log.write_text("")
        path = f"{self.bin}:{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "JAXCONV_PARITY")}
        done = subprocess.run(
            [str(self.root / "launch" / script), *arguments],
            cwd=cwd or self.root,
            env={**kept, "PATH": path, "LOG": str(self.log), **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_local_installs_once_and_passes_everything_on(clone):
    status, _, asked = clone.run("local.sh", "--config=configs/omar.py", "a b", RUN_STATUS="4")
    assert status == 4
    assert asked[0].endswith("--editable .")
    assert asked[1] == "-m jaxconv.launch --config=configs/omar.py a b"
    began = time.monotonic()
    status, err, asked = clone.run("local.sh", "--config=configs/omar.py")
    assert time.monotonic() - began < 1
    assert (status, err, asked) == (0, "", ["-m jaxconv.launch --config=configs/omar.py"])


def test_local_passes_several_processes_to_their_supervisor(clone):
    status, _, asked = clone.run("local.sh", "--config=c.py", "--processes=2", RUN_STATUS="4")
    supervisor = clone.root / "launch/processes.py"
    assert (status, asked[-1]) == (4, f"{supervisor} 2 --config=c.py")


@pytest.mark.parametrize("value", ["--processes", "--processes=", "--processes=0", "--processes=x"])
def test_a_wrong_number_of_processes_is_refused(clone, value):
    status, err, asked = clone.run("local.sh", value)
    assert (status, asked) == (2, []) and "it must be a number from 1" in err


def test_it_runs_where_the_caller_stands(clone, tmp_path):
    python = clone.bin / "python3"
    python.write_text(python.read_text().replace('*) echo "$*"', '*) echo "$PWD"'))
    (tmp_path / "elsewhere").mkdir()
    *_, asked = clone.run("local.sh", cwd=tmp_path / "elsewhere")
    assert asked[-1] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "change",
    ["pyproject", "killed pip", "half made", "other python"],
)
def test_what_no_longer_fits_is_made_again(clone, change):
    clone.run("local.sh")
    venv = clone.root / ".venv"
    (venv / "old").touch()
    if change == "pyproject":
        with open(clone.root / "pyproject.toml", "a") as file:
            file.write("\n# changed\n")
    elif change == "killed pip":
        (venv / "jaxconv-installing").touch()
        (venv / "jaxconv-.stamp").unlink()
    elif change == "half made":
        (venv / "bin/python").unlink()
    else:
        python = clone.bin / "python3"
        python.write_text(python.read_text().replace("3.11.7", "3.12.0"))
    status, err, asked = clone.run("local.sh")
    assert status == 0 and len(asked) == 2 and "installing jaxconv" in err
    assert (venv / "old").exists() == (change == "pyproject")
    assert clone.run("local.sh")[1] == ""


def test_an_install_that_fails_is_tried_again_and_nothing_is_run(clone):
    status, err, asked = clone.run("local.sh", PIP_STATUS="1")
    assert status == 1 and "pip could not install jaxconv into .venv" in err
    assert len(asked) == 1
    status, err, asked = clone.run("local.sh")
    assert status == 0 and "making it again" not in err and len(asked) == 2


def test_another_interpreter_gets_its_own_environment(clone):
    clone.run("local.sh", PYTHON="python3.13")
    assert (clone.root / ".venv-3.13").is_dir() and not (clone.root / ".venv").exists()
    clone.run("local.sh", PYTHON="python3")
    assert (clone.root / ".venv").is_dir()


@pytest.mark.parametrize(
    ("python", "line"),
    [
        ("python3.10", "PYTHON=python3.10 is Python 3.10.2; it must be Python 3.11 or later\n"),
        ("nowhere", "PYTHON=nowhere does not run; it must be Python 3.11 or later\n"),
    ],
)
def test_an_unusable_interpreter_is_refused_in_one_line(clone, python, line):
    status, err, asked = clone.run("local.sh", PYTHON=python)
    assert (status, err, asked) == (2, line, [])


def test_test_checks_style_and_then_runs_pytest(clone):
    *_, asked = clone.run("test.sh", "--slow", "tests/models")
    assert asked[0].endswith("--editable .[test,parity,tpu-aot]")
    assert asked[1:] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m pytest -n 2 --dist loadfile --slow tests/models",
    ]
    *_, asked = clone.run("test.sh", JAXCONV_PARITY="0")
    assert asked[0].endswith("--editable .[test]") and asked[-1] == "-m pytest -n 2 --dist loadfile"
    status, err, asked = clone.run("test.sh", JAXCONV_PARITY="no")
    assert (status, err, asked) == (2, "JAXCONV_PARITY=no; it must be 0 or 1\n", [])


def test_test_stops_at_the_first_failure(clone):
    status, _, asked = clone.run("test.sh", RUN_STATUS="1")
    assert status == 1 and asked[1:] == ["-m ruff check ."]


def test_scripts_are_executable():
    for script in [*(_ROOT / "launch").glob("*.sh"), _ROOT / ".ci" / "run"]:
        assert os.access(script, os.X_OK) or script.name == "environment.sh", script
