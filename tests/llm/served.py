"""The fault server as a process of its own."""

import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("fault_server.py")


@dataclass
class Served:
    """A server that runs: where, and the file of the requests that it got."""

    process: subprocess.Popen
    url: str
    log: Path

    @classmethod
    def start(cls, log: Path, **options: Any) -> "Served":
        """Starts one with the options of `fault_server.py`."""
        command = [sys.executable, str(PROGRAM), f"--log={log}"]
        command += [
            f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        port = process.stdout.readline().split()[1]
        return cls(process, f"http://127.0.0.1:{port}/v1", log)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def asked(self) -> list[str]:
        """The hash of the row of each request so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line)["row"] for line in lines]

    def stats(self) -> dict[str, int]:
        """Requests completed, and the most at a time."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/stats", timeout=10) as reply:
            return json.load(reply)
