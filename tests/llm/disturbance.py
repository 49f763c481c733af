"""A run that is killed and resumed, against one that is left alone."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_server import digest

from jaxconv.llm import Journal

PROGRAM = Path(__file__).with_name("small_task.py")


def finished_rows(journal: Path) -> set[str]:
    """Hashes of the rows that a journal has a result for."""
    db = sqlite3.connect(journal)
    bodies = db.execute(
        "SELECT body FROM requests WHERE key IN (SELECT key FROM attempts JOIN outcomes ON "
        "attempt = number WHERE kind IS NULL UNION SELECT key FROM failures)"
    ).fetchall()
    db.close()
    return {digest(json.loads(body)["messages"][-1]["content"]) for (body,) in bodies}


def kill_and_resume(
    serve: Callable[..., Any],
    folder: Path,
    *,
    n: int,
    rate: float,
    timeout: float,
    kills: int,
    seed: int,
) -> dict[str, int]:
    """Runs the small task undisturbed, and again with kills, against two servers with the same
    faults, and compares.

    Args:
        serve: starts a server, as the fixture of that name.
        folder: for journals and results.
        n: rows.
        rate: of each fault.
        timeout: seconds of a call. On a busy machine a good answer may take long; a row that was
            late once more often than another time may end otherwise.
        kills: how often the program is killed, each time after a random number of requests.
        seed: of these numbers.

    Returns:
        Requests of the undisturbed run and of the disturbed one.
    """
    last = [str(n), str(timeout)]
    calm, rough = serve(rate=rate), serve(rate=rate)
    subprocess.run(
        [sys.executable, PROGRAM, calm.url, folder / "calm.sqlite", folder / "calm", *last],
        check=True,
        timeout=600,
    )
    rng = random.Random(seed)
    journal, out = folder / "rough.sqlite", folder / "rough"
    command = [sys.executable, str(PROGRAM), rough.url, str(journal), str(out), *last]
    total, finished = len(calm.asked()), []
    for _ in range(kills):
        before = len(rough.asked())
        process = subprocess.Popen(command)
        until = before + rng.randrange(1, max(2, int(0.8 * (total - before) / kills)))
        while len(rough.asked()) < until and process.poll() is None:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # what was on its way gets to the server
        finished.append((finished_rows(journal), len(rough.asked())))
    subprocess.run(command, check=True, timeout=600)
    asked = rough.asked()
    assert all(not done & set(asked[at:]) for done, at in finished)
    same = out.read_bytes() == (folder / "calm").read_bytes()
    assert same, _differences(out, folder / "calm")
    with Journal(journal, read_only=True) as kept:
        assert len(asked) > total  # something was interrupted and asked again
        assert sum(cost.calls for cost in kept.costs()) >= len(asked)  # and stands in the journal
    subprocess.run(command, check=True, timeout=600)
    assert len(rough.asked()) == len(asked)  # a finished run asks for nothing
    return {"undisturbed": total, "killed": len(asked)}


def _differences(*paths: Path) -> list[tuple[str, ...]]:
    columns = [path.read_text().splitlines() for path in paths]
    return [lines for lines in zip(*columns, strict=True) if len(set(lines)) > 1][:3]
