"""Whether the workdir of a run in several processes is one folder for all of them."""

import secrets
import socket
import time
from pathlib import Path

from jaxconv import processes
from jaxconv.errors import Refused
from jaxconv.train.workdir import Workdir

_SHOWN = 10.0  # seconds until a network file system shows a new file to other machines


def refuse_private(workdir: Workdir) -> None:
    """Refuses, in every process alike, a workdir that they do not all see. Each calls this; of one
    in a bucket, and in a single process, there is nothing to refuse.

    Process 0 leaves a hidden file whose name nobody else can know, the others look for it.

    Raises:
        Refused: a process has another folder of that name, on its machine or below its own.
    """
    if processes.count() == 1 or workdir.url:
        return
    name = processes.of_process_0("mark of the workdir", lambda: _mark(workdir.path))
    place = f"{workdir} on {socket.gethostname()}"
    seen = _appears(workdir.path / name)
    places = processes.gather("who sees the mark", (place, seen))
    if workdir.is_writer:
        (workdir.path / name).unlink()
    others = [f"process {i} has {place}" for i, (place, seen) in enumerate(places) if not seen]
    if others:
        raise Refused(
            f"--workdir={workdir}: process 0 has {places[0][0]}, {others[0]}, and they are not the "
            "same folder; it must be on a file system that all processes see, or gs://… or s3://…"
        )


def _mark(folder: Path) -> str:
    name = f".seen-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _SHOWN
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
