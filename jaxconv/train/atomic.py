"""Writing a file so that it is either the old one or the whole new one, whatever happens."""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxconv.durable import sync
from jaxconv.errors import Failed

# What an operating system says when there is no room: device, quota, file-size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = tuple(os.strerror(code) for code in _FULL)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one that it came from, says that there is no room to write.

    Libraries in C++ raise their own types with the operating system's words in the text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if not isinstance(seen, OSError) and any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def disk_full_is_failure(path: Path) -> Iterator[None]:
    """Turns a full disk inside the block into one line that names `path`."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise Failed(f"disk full while writing {path}: {_last_line(error)}") from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: a temporary file beside it, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with disk_full_is_failure(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    # The rename itself lives in the folder, which has to reach the disk too.
    sync(path.parent)


def write_text(path: Path, content: str) -> None:
    """Like `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Like `write_bytes`; strict JSON (no NaN), two-space indent, a final newline."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
