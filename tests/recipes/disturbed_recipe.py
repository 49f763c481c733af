"""A recipe that asks a misbehaving server, killed and resumed, against one that is left alone."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "llm"))

from disturbance import finished_rows  # noqa: E402
from served import Served  # noqa: E402

from jaxconv.llm import Journal  # noqa: E402


def same_after_kills(
    command: Sequence[str],
    folder: Path,
    artifacts: Sequence[str],
    *,
    answers: str,
    rate: float,
    kills: int,
    seed: int,
) -> None:
    """Runs a recipe against two servers with the same faults, one of the runs with kills, and
    asserts that both leave the same files, that no finished row was asked again, and that the
    journal has every call and what it cost.

    Args:
        command: arguments of `jaxconv.launch` but for the workdir and the endpoint.
        folder: for workdirs.
        artifacts: files of the workdir that have to be the same, to the byte.
        answers: file with the `answer` of the server.
        rate: of each fault.
        kills: how often the run is killed, each time after a random number of requests.
        seed: of these numbers.
    """
    calm, rough = (
        Served.start(folder / f"{name}.log", rate=rate, answers=answers, hang=3, seed=seed)
        for name in ("calm", "rough")
    )
    prices = folder / "prices.json"
    price = {"input": 1.0, "output": 2.0}
    prices.write_text(json.dumps({"models": {"faulty": price}}))

    def arguments(name: str, server: Served) -> list[str]:
        return [
            *(sys.executable, "-m", "jaxconv.launch", *command),
            f"--workdir={folder / name}",
            f"--config.llm.base_url={server.url}",
            "--config.llm.timeout_s=1.5",
            "--config.llm.max_attempts=4",
            f"--config.llm.prices={prices}",
        ]

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        whole = subprocess.run(arguments("calm", calm), timeout=600, **options)
        assert whole.returncode in (0, 3), whole.stderr.decode()
        total = len(calm.asked())
        rng = random.Random(seed)
        for _ in range(kills):
            before = len(rough.asked())
            until = before + rng.randrange(1, max(2, int(0.8 * (total - before) / kills)))
            process = subprocess.Popen(arguments("rough", rough), **options)
            while len(rough.asked()) < until and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, process.stderr.read().decode()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            time.sleep(0.3)  # what was on its way gets to the server
        done, at = finished_rows(folder / "rough" / "journal.sqlite"), len(rough.asked())
        ended = subprocess.run(arguments("rough", rough), timeout=600, **options)
        assert ended.returncode == whole.returncode, ended.stderr.decode()
        assert not done & set(rough.asked()[at:])
        for name in artifacts:
            assert (folder / "rough" / name).read_bytes() == (folder / "calm" / name).read_bytes()
        reports = [json.loads((folder / n / "report.json").read_text()) for n in ("calm", "rough")]
        for part in ("results", "baselines"):
            assert reports[0][part] == reports[1][part]
        with Journal(folder / "rough" / "journal.sqlite", read_only=True) as journal:
            costs = journal.costs()
            _assert_costs_are_told(folder / "rough")
        assert sum(cost.calls for cost in costs) >= len(rough.asked()) > total
        assert reports[1]["cost"]["usd"] > 0 and all(cost.usd > 0 for cost in costs)
        again = subprocess.run(arguments("rough", rough), timeout=600, **options)
        asked = len(rough.asked())
        assert again.returncode == whole.returncode and len(rough.asked()) == asked
    finally:
        calm.stop()
        rough.stop()


def _assert_costs_are_told(workdir: Path) -> None:
    """The journal has the cost of every answer in the artifacts, under its key."""
    db = sqlite3.connect(workdir / "journal.sqlite")
    paid = dict(db.execute("SELECT key, sum(usd) FROM calls WHERE value IS NOT NULL GROUP BY key"))
    db.close()
    rows = [
        json.loads(line)
        for file in (workdir / "artifacts" / "answers").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len(rows) > 50 and all(paid[row["key"]] > 0 for row in rows if "value" in row)
