"""The fault server as a process of its own, and the small task that it answers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers here, also in child processes
from served import Served


@pytest.fixture
def serve(tmp_path_factory):
    """Starts servers: `serve(rate=0.05, …)`, with the options of `fault_server.py`."""
    started = []

    def start(**options) -> Served:
        started.append(Served.start(tmp_path_factory.mktemp("server") / "log.jsonl", **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
