"""Numbers of a run, in `metrics.jsonl` and TensorBoard: each step of a stage exactly once."""

import json
import math
import secrets
import time
from collections.abc import Mapping
from typing import Any

from jaxconv.train import atomic
from jaxconv.train.workdir import Workdir


class MetricsWriter:
    """Appends the records of one stage; made anew for each stage, also after a resume.

    Write the record of a step before the checkpoint of that step is saved: then, whenever the run
    is killed, no step is missing, and those after the restored one are dropped here and written
    again.

    Args:
        workdir: only its writer process writes; elsewhere all calls do nothing.
        stage: such as `"self_play"`; the `stage` of each record and the prefix of TensorBoard tags.
        resume_at: the restored step. This stage's records after it are dropped; None drops them all
            (the stage starts from its beginning). Records of other stages stay.
    """

    def __init__(self, workdir: Workdir, stage: str, *, resume_at: int | None = None):
        self._stage = stage
        self._path = workdir.metrics
        self._file = None
        self._last_step = -1 if resume_at is None else resume_at
        if not workdir.is_writer:
            return
        from tensorboardX import SummaryWriter

        with atomic.disk_full_is_failure(self._path):
            self._drop_after(self._last_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (close() does)
            # A folder a stage, because purging hides later steps of everything in the folder.
            self._tensorboard = SummaryWriter(
                str(workdir.tensorboard / stage),
                purge_step=self._last_step + 1,
                flush_secs=10,
                # The rest of the name has whole seconds; a quick restart would overwrite the file.
                filename_suffix=f".{secrets.token_hex(4)}",
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one record and flushes it.

        Args:
            step: larger than that of the record before.
            metrics: scalars by name (`"reward/mean"`): Python or numpy numbers or 0-d arrays. A
                value that is not finite is `null` in the file, which is strict JSON.
        """
        if step <= self._last_step:
            raise ValueError(
                f"metrics of {self._stage} step {step}; it must come after {self._last_step}"
            )
        self._last_step = step
        if self._file is None:
            return
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        now = time.time()
        record = {"stage": self._stage, "step": step, "time": round(now, 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with atomic.disk_full_is_failure(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in values.items():
                if math.isfinite(value):  # what is not would be a warning and no point of a curve
                    self._tensorboard.add_scalar(
                        f"{self._stage}/{name}", value, global_step=step, walltime=now
                    )

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._file is not None:
            with atomic.disk_full_is_failure(self._path):
                self._file.close()
                self._tensorboard.close()
            self._file = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _drop_after(self, step: int) -> None:
        """Rewrites the file without this stage's later records and without torn lines."""
        if not self._path.exists():
            return
        before = self._path.read_bytes()
        kept = [
            line
            for line in before.splitlines(keepends=True)
            if (record := parsed(line)) is not None
            and (record.get("stage") != self._stage or record.get("step", 0) <= step)
        ]
        after = b"".join(kept)
        if after != before:
            atomic.write_bytes(self._path, after)


def read(workdir: Workdir, stage: str | None = None) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in order, those of one stage if it is given. A torn last
    line, as a kill leaves it, is left out."""
    if not workdir.metrics.exists():
        return []
    lines = workdir.metrics.read_bytes().splitlines(keepends=True)
    records = [record for line in lines if (record := parsed(line)) is not None]
    return [record for record in records if stage is None or record["stage"] == stage]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None when the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _scalar(name: str, value: Any) -> float | int:
    shape = getattr(value, "shape", ())
    if shape != () or value is None or isinstance(value, str | bytes | dict | list | tuple):
        raise TypeError(f"metric {name} is {value!r:.80}; it must be one number")
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)
