"""The processes that worked on a run: how long they took, and whether they were alike."""

import itertools
import json
import time
from typing import Any

from jaxconv.train import atomic, clock, metrics
from jaxconv.train.workdir import Workdir, device_kinds, versions

_FILE = "attempts.jsonl"


def begin(workdir: Workdir) -> None:
    """Notes that this process starts to work on the run, and starts its clock."""
    clock.begin(workdir)
    if workdir.is_writer:
        path = workdir.path / _FILE
        with atomic.disk_full_is_failure(path), open(path, "a", encoding="utf-8") as file:
            # On a line of its own, even after one that a full disk tore.
            record = {"start": time.time(), "versions": versions(), "devices": device_kinds()}
            file.write("\n" + json.dumps(record) + "\n")


def wall_seconds(workdir: Workdir) -> float:
    """Seconds from each start to the last sign of life before the next; the last one lasts until
    now.

    A sign of life is a record of `metrics.jsonl`, so of a process that was killed the time after
    its last record is missing.
    """
    starts = [record["start"] for record in _read(workdir)]
    if not starts:
        return 0.0
    alive = sorted(record["time"] for record in metrics.read(workdir))
    total = time.time() - starts[-1]
    for start, following in itertools.pairwise(starts):
        seen = [moment for moment in alive if start <= moment < following]
        total += seen[-1] - start if seen else 0.0
    return total


def changes(workdir: Workdir) -> list[str]:
    """A note where the run went on under other versions or devices: it is not bit for bit what one
    undisturbed process would have made."""
    out = []
    for before, after in itertools.pairwise(_read(workdir)):
        for what in ("versions", "devices"):
            if before[what] != after[what]:
                out.append(f"It went on with other {what}: {before[what]}, then {after[what]}.")
    return out


def _read(workdir: Workdir) -> list[dict[str, Any]]:
    path = workdir.path / _FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [record for line in lines if (record := metrics.parsed(line)) is not None]
