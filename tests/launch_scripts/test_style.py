"""Shell scripts pass shellcheck, the manifest passes yamllint; both come with the test extra."""

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent


def test_scripts_pass_shellcheck():
    launch = _ROOT / "launch"
    scripts = [*launch.glob("*.sh"), *launch.glob("*.sbatch"), _ROOT / ".ci" / "run"]
    assert len(scripts) > 5
    command = [_BIN / "shellcheck", "--external-sources", *sorted(scripts)]
    found = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_manifest_passes_yamllint():
    rules = "{extends: default, rules: {line-length: {max: 100}}}"
    command = [_BIN / "yamllint", "--strict", "--config-data", rules, "launch/gke.yaml"]
    found = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
