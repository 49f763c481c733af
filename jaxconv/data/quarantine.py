"""Rows that could not be read: kept in a file with the reason, and counted."""

import collections
import json
import os
import threading
from pathlib import Path

from jaxconv.data.conversation import Invalid


class Quarantine:
    """A file of bad rows, `{"file", "line", "field", "reason", "explanation", "row"}` a line.

    It begins anew: what an earlier pass left at `path` goes, because each pass sees every row
    again. The file is made with its first row. Lines are appended whole, so several threads may add
    and a reader never sees half of one but, after a crash, the last.

    Args:
        path: of the file.
        writer: whether this process writes it; others only count.

    Attributes:
        counts: rows by reason.
    """

    def __init__(self, path: Path, *, writer: bool = True):
        self.path = Path(path)
        self._writer = writer
        if writer:
            self.path.unlink(missing_ok=True)
        self.counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, file: Path, line: int, row: bytes, invalid: Invalid) -> None:
        """Keeps one row.

        Args:
            file: where it stands.
            line: its line, from 1; in an array or a table, which row it is.
            row: its bytes; what is not UTF-8 in them is written as escapes.
            invalid: why it is bad.
        """
        entry = {
            "file": str(file),
            "line": line,
            "field": invalid.field,
            "reason": invalid.reason,
            "explanation": str(invalid),
            "row": row.decode(errors="backslashreplace"),
        }
        text = json.dumps(entry, ensure_ascii=False) + "\n"
        with self._lock:
            self._append(text.encode())
            self.counts[invalid.reason] += 1

    def _append(self, line: bytes) -> None:
        if not self._writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        with os.fdopen(handle, "wb") as out:
            out.write(line)

    def add_all(self, path: Path) -> None:
        """Keeps the rows that an earlier pass over the same files kept at `path`."""
        with open(path, "rb") as kept:
            for line in kept:
                with self._lock:
                    self._append(line)
                    self.counts[json.loads(line)["reason"]] += 1

    def notes(self, place: str) -> list[str]:
        """One line for people, if there are bad rows; `place` is where they find the file."""
        if not self.counts:
            return []
        reasons = ", ".join(
            f"{reason.replace('_', ' ')} {count}" for reason, count in self.counts.most_common()
        )
        rows = "1 row" if len(self) == 1 else f"{len(self)} rows"
        return [f"{rows} could not be read, see {place}: {reasons}."]
