"""Files on object stores: data that is fetched before it is read, and a workdir kept in a bucket.

A store has whole objects: no folders, no renames, no appends, no locks. So work is done on a folder
of this machine, and whole files go from and to the bucket: at the start, before each checkpoint and
at the end. Checkpoints alone are written there directly, by Orbax and from every process.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from jaxconv.errors import Failed, Refused

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_STAYS = ("checkpoints", "artifacts/rows")
"""What is not copied: checkpoints are there already, rows are made anew from the data."""
_ON_DEMAND = "export"
"""Not copied from the bucket before it is read: a model may take all of a machine's disk."""
_FIRST, _LAST = "config.json", "report.json"
_KNOWN = ".bucket.json"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is such as gs://bucket/name."""
    return re.match(r"[a-z][a-z0-9]*://", os.fspath(path)) is not None


def named(path: PurePath | str) -> PurePath:
    """What messages call a path: a URL keeps its slashes.

    Raises:
        Refused: a URL that is neither gs:// nor s3://.
    """
    if not is_url(path):
        return Path(path)
    _kind(os.fspath(path))
    from etils import epath

    return epath.Path(path)


def below(url: str, name: str) -> PurePath:
    """A place below a URL, which Orbax writes to: an `epath.Path`."""
    return named(url) / name


def local_place(url: str, process: int = 0) -> Path:
    """The folder of this machine that stands for a URL: in `$JAXCONV_SCRATCH`, by default
    `$XDG_CACHE_HOME/jaxconv/workdirs` (`~/.cache` without the variable). Every process has one."""
    base = os.environ.get("JAXCONV_SCRATCH")
    if not base:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(cache) / "jaxconv" / "workdirs"
    return Path(base).expanduser().resolve() / f"{url.rpartition('/')[2]}-{_digest(url)}-{process}"


def fetch(url: str, folder: Path) -> Path:
    """A copy below `folder` of the file or folder at a URL; what is there already is not read again
    unless the store tells of another version.

    Raises:
        Refused: nothing is there, or the package for this kind of store is missing.
        Failed: the store cannot be read.
    """
    store, root = _store(url)
    with _reaching(url):
        about = _about(store, root)
        if about is None:
            raise Refused(f"{url} is not there; it must be a file or folder")
        single = about["type"] == "file"
        objects = {root: about} if single else _objects(store, root)
    place = folder / _digest(url) / root.rpartition("/")[2]
    known = _Known(place.parent / _KNOWN)
    targets = {path: place / path.removeprefix(root).lstrip("/") for path in objects}
    with _reaching(url):
        for path, about in sorted(objects.items()):
            _get(store, path, targets[path], about, known, path)
    if not single:
        for file in [file for file in place.rglob("*") if file.is_file()]:
            if file not in targets.values():
                file.unlink()
    return place


def refuse_small_scratch(folder: Path, size: int) -> None:
    """Refuses a model of so many bytes that `folder`, which stands for a URL, has no room for."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise Refused(
            f"the exported model takes {size / 1e9:,.1f} GB and {folder} has {free / 1e9:,.1f} GB "
            "free; JAXCONV_SCRATCH may name a folder on a larger disk"
        )


def remove(url: str) -> None:
    """Removes everything below a URL."""
    store, root = _store(url)
    with _reaching(url):
        if _about(store, root) is not None:
            store.rm(root, recursive=True)


class Mirror:
    """A folder of this machine that stands for what is below a URL."""

    def __init__(self, folder: Path, url: str):
        self._folder, self._url = folder, url
        self._store, self._root = _store(url)
        self._known = _Known(folder / _KNOWN)

    def pull(self) -> None:
        """Makes the folder like the bucket: what is only here is removed. The export comes when it
        is fetched; what is here of another one than the bucket has is removed."""
        found = self._found()
        for name, (path, about) in sorted(found.items()):
            if _is_below(name, _ON_DEMAND):
                if not self._known.is_copy(name, self._folder / name, _stamp(about)):
                    del found[name]
            else:
                with _reaching(self._url):
                    _get(self._store, path, self._folder / name, about, self._known, name)
        for name in self._names():
            if name not in found:
                (self._folder / name).unlink()
        self._known.forget(set(self._known.names()) - set(found))

    def fetch_export(self) -> None:
        """Copies the export here; what was changed here since it was last sent stays.

        Raises:
            Refused: there is no room for it.
        """
        missing = {
            name: (path, about)
            for name, (path, about) in self._found().items()
            if _is_below(name, _ON_DEMAND)
            and not ((self._folder / name).is_file() and self._known.remote(name) == _stamp(about))
        }
        refuse_small_scratch(self._folder, sum(about["size"] for _, about in missing.values()))
        for name, (path, about) in sorted(missing.items()):
            with _reaching(self._url):
                _get(self._store, path, self._folder / name, about, self._known, name)

    def _found(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """What the bucket has of all that is copied: name -> (its path there, about it)."""
        with _reaching(self._url):
            self._store.invalidate_cache()
            objects = _objects(self._store, self._root)
        named = {path.removeprefix(self._root).lstrip("/"): path for path in objects}
        return {n: (path, objects[path]) for n, path in named.items() if not _stays(n)}

    def push(self) -> None:
        """Makes the bucket like the folder; files that have not changed are not sent again."""
        here = self._names()
        with _reaching(self._url):
            for name in sorted(here, key=_turn):
                file, path = self._folder / name, f"{self._root}/{name}"
                stamp = _local_stamp(file)
                if self._known.local(name) != stamp:
                    self._store.put_file(str(file), path)
                    self._store.invalidate_cache()
                    self._known.put(name, stamp, _stamp(self._store.info(path)))
            gone = set(self._known.names()) - set(here)
            for name in gone:
                if _about(self._store, f"{self._root}/{name}") is not None:
                    self._store.rm_file(f"{self._root}/{name}")
            self._known.forget(gone)

    def _names(self) -> list[str]:
        files = (file for file in self._folder.rglob("*") if file.is_file())
        names = (file.relative_to(self._folder).as_posix() for file in files)
        return [name for name in names if not _stays(name)]


class _Known:
    """Which version of an object each local file is a copy of; kept in a hidden file."""

    def __init__(self, path: Path):
        self._path = path
        self._entries: dict[str, list[Any]] = {}
        if path.is_file():
            self._entries = json.loads(path.read_text())

    def names(self) -> list[str]:
        return list(self._entries)

    def local(self, name: str) -> list[int] | None:
        return self._entries.get(name, [None])[0]

    def remote(self, name: str) -> str | None:
        return self._entries.get(name, [None, None])[1]

    def is_copy(self, name: str, file: Path, remote: str) -> bool:
        return file.is_file() and self._entries.get(name) == [_local_stamp(file), remote]

    def put(self, name: str, local: list[int], remote: str) -> None:
        self._entries[name] = [local, remote]
        self._write()

    def forget(self, names: set[str]) -> None:
        for name in names:
            del self._entries[name]
        if names:
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text(json.dumps(self._entries))
        partial.replace(self._path)


def _get(store: Any, path: str, target: Path, about: dict, known: _Known, name: str) -> None:
    """Copies an object here unless its copy, known as `name`, is here."""
    stamp = _stamp(about)
    if known.is_copy(name, target, stamp):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    store.get_file(path, str(partial))
    partial.replace(target)
    known.put(name, _local_stamp(target), stamp)


def _about(store: Any, path: str) -> dict[str, Any] | None:
    """What the store says of an object or a folder; None where there is none. (`exists` also says
    no when it could not ask.)"""
    try:
        return store.info(path)
    except FileNotFoundError:
        return None


def _objects(store: Any, root: str) -> dict[str, dict[str, Any]]:
    """All below a folder. A list that could not be read is an error and not an empty folder, which
    would cost the copy of this machine."""
    if _about(store, root) is None:
        return {}
    objects = store.find(root, detail=True)
    if not objects:
        raise OSError("its objects could not be listed")
    return objects


def _turn(name: str) -> tuple[bool, bool, bool, str]:
    """When a file is sent: who finds the config.json of a model finds its weights too."""
    return name == _LAST, name != _FIRST, name.endswith("/config.json"), name


def _stays(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return hidden or any(_is_below(name, kept) for kept in _STAYS)


def _is_below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def _store(url: str) -> tuple[Any, str]:
    """(the file system, the path in it)."""
    import fsspec

    kind = _kind(url)
    try:
        store, root = fsspec.core.url_to_fs(url)
    except ImportError:
        raise Refused(f"{url} needs {_PACKAGES[kind]}; the extra jaxconv[cloud] has it") from None
    return store, root.rstrip("/")


def _kind(url: str) -> str:
    kind = url.partition("://")[0]
    if kind not in _PACKAGES:
        raise Refused(f"{url}: no such kind of store; it may be gs://… or s3://…")
    return kind


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except (Refused, Failed):
        raise
    except Exception as error:  # every store has errors of its own
        reason = str(error).strip().splitlines()
        raise Failed(
            f"cannot reach {url}: {reason[-1] if reason else type(error).__name__}"
        ) from error


def _stamp(about: dict[str, Any]) -> str:
    """What tells one version of an object from another."""
    parts = ("etag", "ETag", "generation", "mtime", "LastModified", "created", "size")
    return " ".join(str(about[part]) for part in parts if about.get(part) is not None)


def _local_stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:12]
