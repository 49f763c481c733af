"""Files and folders that are whole whatever happens: a kill, or a machine that loses its power.

A rename is one step for whoever looks. But what was written may still be in memory by then, and so
may the rename: a file is there for good when it and its folder were told to go to disk (fsync).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxconv.errors import Failed, Refused


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, path: Path) -> None:
    """Gives a finished file or folder its name, with all that is in it on disk.

    A file replaces an older one; a folder must not be there yet.
    """
    _sync_all(partial)
    partial.replace(path)
    sync(path.parent)


@contextmanager
def whole_folder(folder: Path, marker: str = "config.json") -> Iterator[Path]:
    """A folder to fill beside `folder`, which it replaces only when it is complete and on disk.

    A folder in its place must be empty or hold the file `marker`. A kill while one takes the place
    of the other leaves the older one where `standing` finds it.

    Raises:
        Refused: the folder holds something else.
        Failed: it could not be written (a full disk); nothing half-written is left.
    """
    folder = folder.expanduser().absolute()
    partial, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    if not folder.exists() and old.is_dir():
        old.rename(folder)
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / marker).is_file():
        raise Refused(f"{folder} holds something other than a checkpoint; name another folder")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _sync_all(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise Failed(f"cannot write checkpoint {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def standing(folder: Path) -> Path:
    """Where the folder is that `whole_folder` wrote: in its place, or, after a kill between two
    renames, the older one beside it. `folder` itself where there is none."""
    return folder if folder.exists() or not _old(folder).is_dir() else _old(folder)


def _sync_all(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    for part in [*path.rglob("*"), path]:
        sync(part)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
