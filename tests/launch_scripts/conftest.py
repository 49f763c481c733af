"""Stand-ins for the commands of clusters: they write down how they are called, one call a line."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


class Cluster:
    """A folder to run scripts in, with stand-ins first on the path."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = _ROOT
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._log = folder / "calls"

    def command(self, name: str, body: str = ":") -> None:
        """Makes a stand-in. `body` is bash; `$call` is the call as one line, `$calls` how often the
        very same call came before."""
        path = self.bin / name
        path.write_text(
            "#!/usr/bin/env bash\n"
            f'call="{name} $*"\n'
            f'calls=$(grep --count --fixed-strings --line-regexp -e "$call" {self._log} || true)\n'
            f'printf "%s\\n" "$call" >>{self._log}\n'
            f"{body}\n"
        )
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        settings = (
            *("SLURM", "TPU_NAME", "ZONE", "PROJECT_ID", "ACCELERATOR_TYPE", "RUNTIME_VER"),
            "PYTHON",  # the interpreter of the tests, where launch/test.sh was told one
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        return {**kept, "PATH": f"{self.bin}:{kept['PATH']}", "HOME": str(self.folder), **more}

    def run(self, script: str, *arguments: str, **environment: str):
        """Runs a script of launch/ in the folder; standard output, error and status, as text."""
        self._log.write_text("")
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return self._log.read_text().splitlines()

    @staticmethod
    def printed_calls(text: str) -> list[str]:
        """The commands that `--dry_run` printed, unquoted as the stand-ins write them down."""
        lines = (line for line in text.splitlines() if line and not line.startswith("#"))
        return [" ".join(shlex.split(line)) for line in lines]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)
