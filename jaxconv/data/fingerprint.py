"""What tells one state of some files from another, without reading all of large ones."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

WHOLE_BYTES = 64 << 20
"""Files up to this size are read; of larger ones the two ends, and the time of the last change."""

_END_BYTES = 1 << 20


def fingerprint(files: Iterable[Path], root: Path) -> dict[str, str]:
    """A line for people about the content of each file, by its name below `root`."""
    return {
        file.name if file == root else str(file.relative_to(root)): _content(file) for file in files
    }


def digest(what: Mapping[str, str] | str) -> str:
    """16 hexadecimal digits that stand for all of it."""
    return _sha(json.dumps(what, sort_keys=True).encode())


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first thing that differs, in one line; None where nothing does."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}"
    return None


def _content(file: Path) -> str:
    stat = file.stat()
    if stat.st_size <= WHOLE_BYTES:
        return f"{stat.st_size} bytes, sha256 {_sha(file.read_bytes())}"
    with open(file, "rb") as source:
        head = source.read(_END_BYTES)
        source.seek(-_END_BYTES, 2)
        ends = _sha(head + source.read())
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns} ns, sha256 of both ends {ends}"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
