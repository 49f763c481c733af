"""How long a run took, over all the processes that worked on it."""

import itertools
import json
import time

from jaxconv.train import atomic, metrics
from jaxconv.train.workdir import Workdir

_FILE = "attempts.jsonl"


def begin(workdir: Workdir) -> None:
    """Notes that this process starts to work on the run."""
    if workdir.is_writer:
        path = workdir.path / _FILE
        with atomic.disk_full_is_failure(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"start": time.time()}) + "\n")


def wall_seconds(workdir: Workdir) -> float:
    """Seconds from each start to the last sign of life before the next; the last one lasts until
    now.

    A sign of life is a record of `metrics.jsonl`, so of a process that was killed the time after
    its last record is missing.
    """
    path = workdir.path / _FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    starts = [json.loads(line)["start"] for line in lines]
    if not starts:
        return 0.0
    alive = sorted(record["time"] for record in metrics.read(workdir))
    total = time.time() - starts[-1]
    for start, following in itertools.pairwise(starts):
        seen = [moment for moment in alive if start <= moment < following]
        total += seen[-1] - start if seen else 0.0
    return total
