"""Programs compiled in a process of their own: for eight fake devices, and for TPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


def _run(source: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def run_program() -> Callable[[str], Any]:
    """run_program(source): what a Python of its own prints as its last line, read as JSON."""
    return _run


@pytest.fixture(scope="session")
def run_with_libtpu() -> Callable[[str], Any]:
    """The same with libtpu at hand, which a process loads once and for all."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra tpu-aot): nothing compiles for TPUs")
    return lambda source: _run(source, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
