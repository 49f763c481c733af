"""Files of conversations or preference pairs as sequences with random access.

One pass over the files finds every good row and remembers where it lies; after that a record is
read from disk when it is asked for, so a data set may be larger than memory. What the pass found is
kept, and as long as the files stay as they are, no other is made.
"""

import json
import logging
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

import jaxconv
from jaxconv import storage
from jaxconv.data.conversation import Conversation, Invalid, PreferencePair, Record, parse_line
from jaxconv.data.fingerprint import digest, fingerprint
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.data.rows import Rows, files_of
from jaxconv.durable import publish
from jaxconv.errors import Refused

AUTO = "auto"
_KINDS = {kind.__name__: kind for kind in (Conversation, PreferencePair)}


def open_source(path: PurePath | str, format: str, quarantine: Quarantine) -> "Source":
    """Opens a file, a folder of files or a folder that `jaxconv.data.builder` prepared.

    Args:
        path: of suffix .jsonl, .jsonl.gz, .json (an array) or .parquet, which needs pyarrow. What
            is not .jsonl is written as such once, in the folder `rows` beside the quarantine.
            Also on an object store (gs://…, s3://…), of which a copy is made there.
        format: one of `FORMATS`, or "auto": that of the first good row. A prepared folder has its
            own.
        quarantine: takes the bad rows.

    Returns records in the order of the files' names and rows.

    Raises:
        Refused: no such file or format; no good row at all.
    """
    shown = storage.named(path)  # which a copy of it does not change
    if format != AUTO and format not in FORMATS:
        raise Refused(f"format {format!r}; it must be one of {', '.join((AUTO, *FORMATS))}")
    cache = quarantine.path.parent / "rows"
    path = storage.fetch(str(path), cache) if storage.is_url(path) else Path(path)
    if not path.exists():
        raise Refused(f"{path} is not there; it must be a file or folder of conversations")
    if (path / "dataset_info.json").is_file():
        from jaxconv.data.builder import Prepared

        source: Source = Prepared(path)
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        source.made_of = fingerprint(files, path)
        source.kept = cache / digest(source.made_of)
        return source
    # Which may lie in the folder that is read; a fetched one lies in them.
    own = () if storage.is_url(shown) else (cache, quarantine.path)
    files = files_of(path, own, shown)
    made_of = fingerprint(files, path)
    # Another version may find other rows good, and quarantine names the place of the files.
    where = str(shown) if storage.is_url(shown) else str(path.resolve())
    asked = {"path": where, "format": format, "jaxconv": jaxconv.__version__}
    kept = cache / digest(asked | made_of)
    names = [shown if file == path else shown / file.relative_to(path) for file in files]
    rows = [Rows.of(file, cache, name) for file, name in zip(files, names, strict=True)]
    if (kept / _ABOUT).is_file():
        index = Index.load(kept)
        quarantine.add_all(kept / _BAD)
    else:
        begin = quarantine.path.stat().st_size if quarantine.path.exists() else 0
        index = _read_all(shown, rows, format, quarantine)
        index.save(kept, quarantine.path, begin)
    return RowSource(rows, index, made_of, kept)


class Source(Sequence[Record]):
    """Records by number; safe in several threads.

    Attributes:
        format: what they were read as.
        kind: `Conversation` or `PreferencePair`; all are of one kind.
        rows: how many rows there were, the bad ones included.
        made_of: the fingerprint of its files.
        kept: a folder for what was found out about it; others of it have other ones.
    """

    format: str
    kind: type[Record]
    rows: int
    made_of: Mapping[str, str]
    kept: Path


class RowSource(Source):
    """Records of files with one row a line."""

    def __init__(
        self, files: Sequence[Rows], index: "Index", made_of: Mapping[str, str], kept: Path
    ):
        self.format, self.kind, self.rows = index.format, index.kind, index.rows
        self.made_of, self.kept = made_of, kept
        self._files, self._at = files, index.at

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, i: int) -> Record:
        number, offset, length, line, part = map(int, self._at[i])
        file = self._files[number]
        return _read(self.format, file, line, file.read(offset, length))[part]


# ---------------------------------------------------------------- the index

_ABOUT, _AT, _BAD = "index.json", "index.npy", "quarantine.jsonl"


@dataclass(frozen=True)
class Index:
    """Where the good records of some files lie.

    Attributes:
        format, kind, rows: as of `Source`.
        at: int64 [n, 5]: of each record its file, where its row begins there, how long it is, its
            line, and which record of the row it is.
    """

    format: str
    kind: type[Record]
    rows: int
    at: np.ndarray

    def save(self, folder: Path, quarantine: Path, begin: int) -> None:
        """Keeps it, with the bad rows that stand in `quarantine` from byte `begin` on."""
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.save(partial / _AT, self.at)
        with open(partial / _BAD, "wb") as copy:
            if quarantine.exists():
                with open(quarantine, "rb") as file:
                    file.seek(begin)
                    shutil.copyfileobj(file, copy)
        about = {"format": self.format, "kind": self.kind.__name__, "rows": self.rows}
        (partial / _ABOUT).write_text(json.dumps(about) + "\n")
        publish(partial, folder)

    @classmethod
    def load(cls, folder: Path) -> "Index":
        about = json.loads((folder / _ABOUT).read_text())
        kind = _KINDS[about["kind"]]
        return cls(about["format"], kind, about["rows"], np.load(folder / _AT, mmap_mode="r"))


def _read_all(path: PurePath, files: Sequence[Rows], format: str, quarantine: Quarantine) -> Index:
    """Finds the good rows; the bad ones go into quarantine."""
    if format == AUTO:
        format = _recognise(path, files)
        logging.getLogger(__name__).info("%s: its first good row is of format %r", path, format)
    at, rows = array("q"), 0
    kind: type[Record] | None = None
    first = None
    for number, file in enumerate(files):
        line = 0
        for line, offset, raw in file:
            rows += 1
            try:
                records = _read(format, file, line, raw)
                if kind is not None and type(records[0]) is not kind:
                    what = f"it is a {type(records[0]).__name__}; the rows before are not"
                    raise Invalid("", "mixed_kinds", what)
            except Invalid as invalid:
                quarantine.add(file.name, line, raw, invalid)
                first = first or f"{file.name}, line {line}, {invalid}"
                continue
            kind = type(records[0])
            for part in range(len(records)):
                at.extend((number, offset, len(raw), line, part))
        if file.damage:
            rows += 1
            quarantine.add(file.name, line + 1, b"", Invalid("", "damaged_file", file.damage))
    if not rows:
        raise Refused(f"{path} has no rows")
    if kind is None:
        raise Refused(f"{path}: none of {rows} rows is good as {format!r}; first {first}")
    return Index(format, kind, rows, np.array(at, np.int64).reshape(-1, 5))


def _read(format: str, file: Rows, line: int, raw: bytes) -> Sequence[Record]:
    try:
        row = parse_line(raw)
    except Invalid as invalid:
        if raw.endswith(b"\n") or invalid.reason not in ("invalid_json", "invalid_utf8"):
            raise
        raise Invalid("", "torn_last_line", f"it ends in the middle ({invalid})") from None
    return FORMATS[format].read(row, f"{file.name.name}:{line}")


def _recognise(path: PurePath, files: Sequence[Rows]) -> str:
    """The format of the first row that is good in the format that it looks like."""
    first = None
    for file in files:
        for line, _, raw in file:
            try:
                row = parse_line(raw)
                name = next((n for n, f in FORMATS.items() if f.looks_like(row)), None)
                if name is None:
                    found = ", ".join(sorted(row)) or "none"
                    raise Invalid(
                        "", "unknown_format", f"it looks like no format (fields: {found})"
                    )
                FORMATS[name].read(row, "")
                return name
            except Invalid as invalid:
                first = first or f"{file.name}, line {line}, {invalid}"
    if first is None:
        raise Refused(f"{path} has no rows")
    raise Refused(f"{path}: no good row of a known format ({', '.join(FORMATS)}); first {first}")
