"""Files of conversations as rows: lines of JSON, whatever they were written as."""

import gzip
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jaxconv.errors import Refused

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".tsv", ".tsv.gz")


@dataclass(frozen=True)
class Rows:
    """Lines of a file that are not blank.

    Attributes:
        name: the file that was asked for, which is not here where it was fetched.
        lines: itself, or what was made of it, one row a line.
        stamp: (size, time of last change) of `lines`.
        damage: why the end of the file could not be read; "" for a whole one.
    """

    name: PurePath
    lines: Path
    stamp: tuple[int, int]
    damage: str = ""

    @classmethod
    def of(cls, file: Path, cache: Path, name: PurePath | None = None) -> "Rows":
        """`name` is what messages call the file, where that is not where it lies."""
        name = name or file
        if file.name.endswith(".jsonl"):
            return cls(name, file, _stamp(os.stat(file)))
        about = f"{file.resolve()} {_stamp(os.stat(file))}"
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        lines, damage = cache / f"{file.name}-{digest}.jsonl", ""
        if not lines.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = cache / f".{digest}-{secrets.token_hex(4)}.partial"
            try:
                damage = _WRITERS[_suffix(file)](file, partial, name)
                if damage:  # so that the next pass reports it again
                    lines = lines.with_suffix(".damaged.jsonl")
                partial.replace(lines)
            finally:
                partial.unlink(missing_ok=True)
        return cls(name, lines, _stamp(os.stat(lines)), damage)

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        """(line, offset, bytes) of each row."""
        offset = 0
        with open(self.lines, "rb") as file:
            for number, raw in enumerate(file, 1):
                skipped = 3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0
                if raw[skipped:].strip():
                    yield number, offset + skipped, raw[skipped:]
                offset += len(raw)

    def read(self, offset: int, length: int) -> bytes:
        handle = os.open(self.lines, os.O_RDONLY)
        try:
            if _stamp(os.fstat(handle)) != self.stamp:
                raise Refused(f"{self.lines} has changed since it was opened; start again with it")
            return os.pread(handle, length, offset)
        finally:
            os.close(handle)


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def files_of(path: Path, own: Sequence[Path], name: PurePath) -> list[Path]:
    """The file, or a folder's files by name, folders inside it included but for `own`; `name` is
    what messages call it."""
    if path.is_file():
        if _suffix(path) is None:
            raise Refused(f"{name}: its name must end with {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and _suffix(file)
        and not file.name.startswith(".")
        and not any(file.is_relative_to(mine) for mine in own)
    )
    if not found:
        raise Refused(f"folder {name} holds no file whose name ends with {', '.join(SUFFIXES)}")
    return found


def _unzip(file: Path, to: Path, name: PurePath) -> str:
    with gzip.open(file) as source, open(to, "wb") as target:
        try:
            # `read1`, because `read` loses what it has when the file ends too early.
            while block := source.read1(1 << 16):
                target.write(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            if not target.tell():
                raise Refused(f"{name} is not a gzip file ({error})") from None
            return f"it cannot be unzipped to its end ({error})"
    return ""


def _unfold_array(file: Path, to: Path, name: PurePath) -> str:
    """One line an element; the whole array is in memory for this."""
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise Refused(f"{name} is not JSON ({error}); rows of their own lines are .jsonl") from None
    if not isinstance(rows, list):
        raise Refused(
            f"{name} holds a {type(rows).__name__}; a .json file must be an array of rows"
        )
    _write_lines(to, rows)
    return ""


def _unfold_table(file: Path, to: Path, name: PurePath) -> str:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Refused(f"{name} needs pyarrow; install it or give .jsonl") from None
    try:
        with parquet.ParquetFile(file) as table:
            _write_lines(
                to, (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
            )
    except pyarrow.ArrowInvalid as error:
        raise Refused(f"{name} is not a parquet file ({error})") from None
    return ""


def _unfold_blocks(file: Path, to: Path, name: PurePath) -> str:
    """One line a block of lines, which a blank line ends: `{"block": {line number: its cells}}`."""
    opened = gzip.open if file.name.endswith(".gz") else open
    try:
        # What is not UTF-8 reaches the check that names it, like half a surrogate pair.
        with opened(
            file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=""
        ) as lines:
            _write_lines(to, _blocks(lines))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{name} cannot be unzipped to its end ({error})") from None
    return ""


def _blocks(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    block: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            # No quoting: a cell holds neither tabs nor line ends.
            block[str(number)] = line.rstrip("\r\n").split("\t")
        elif block:
            yield {"block": block}
            block = {}
    if block:
        yield {"block": block}


_WRITERS = {
    ".jsonl.gz": _unzip,
    ".json": _unfold_array,
    ".parquet": _unfold_table,
    ".tsv": _unfold_blocks,
    ".tsv.gz": _unfold_blocks,
}


def _write_lines(to: Path, rows: Iterable[Any]) -> None:
    with open(to, "w", encoding="utf-8") as target:
        for row in rows:
            # ASCII, so that even half a surrogate pair reaches the check that names it.
            target.write(json.dumps(row, default=_time) + "\n")


def _time(value: Any) -> str:
    """Times of a table as ISO 8601."""
    if not hasattr(value, "isoformat"):
        raise Refused(f"a {type(value).__name__} in a table is not supported; it must be JSON-able")
    return value.isoformat()
