"""The folder of one run: what lies where, who holds it, and which config it belongs to."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import jaxconv
from jaxconv import storage
from jaxconv.errors import Refused
from jaxconv.train import atomic

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """Holds a folder for the life of the process and knows the paths in it.

    Args:
        path: the folder; made when it is not there. A folder with foreign files is refused. Of one
            on an object store (gs://…, s3://…) `path` is the copy of this machine, and `pull` and
            `push` keep both alike; see `jaxconv.storage`.
        writer: whether this process writes (process 0 of a run). The writer takes an exclusive
            lock, which the operating system frees when the process ends, however it ends; all
            others only read, and their `MetricsWriter` and reports do nothing. The lock is one of
            this machine: an object store has none.
        process: which process of the run this is; each has a copy of its own.

    Raises:
        Refused: another process holds the folder, or it has files but is no workdir.
    """

    def __init__(self, path: str | os.PathLike[str], *, writer: bool = True, process: int = 0):
        self.url = os.fspath(path).rstrip("/") if storage.is_url(path) else ""
        self._mirror: storage.Mirror | None = None
        if self.url:
            self.path = storage.local_place(self.url, process)
            self._mirror = storage.Mirror(self.path, self.url)
        else:
            self.path = Path(path).expanduser().resolve()
        self.is_writer = writer
        self._lock: int | None = None
        if self.path.exists() and not self.path.is_dir():
            raise Refused(f"--workdir={self.path} is a file; it must be a folder")
        if not self.url:
            self._refuse_foreign()
        if writer:
            with atomic.disk_full_is_failure(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
        if self.url:
            try:
                self.pull()
                self._refuse_foreign()
            except BaseException:
                self.close()
                raise

    def _refuse_foreign(self) -> None:
        if self.is_foreign(self.path):
            raise Refused(
                f"--workdir={self} has files but no config.json; "
                "it must be a new or empty folder, or one of an earlier run"
            )

    def __str__(self) -> str:
        return self.url or str(self.path)

    def pull(self) -> None:
        """Makes the copy of this machine like the bucket, where there is one."""
        if self._mirror is not None:
            self._mirror.pull()

    def fetch_export(self) -> None:
        """Copies the export from the bucket, where there is one: `pull` leaves it there. Process 0
        must have pushed it (at a barrier).

        Raises:
            Refused: the disk of this machine has no room for it.
        """
        if self._mirror is not None:
            self._mirror.fetch_export()

    def refuse_small_scratch(self, size: int) -> None:
        """Refuses a run in a bucket that will export so many bytes, which the copy of this machine
        has no room for."""
        if self.url:
            files = self.export.rglob("*") if self.export.is_dir() else ()
            there = sum(file.stat().st_size for file in files if file.is_file())
            storage.refuse_small_scratch(self.path, size - there)

    def push(self) -> None:
        """Makes the bucket, where there is one, like the copy of this machine; the writer does."""
        if self._mirror is not None and self.is_writer:
            self._mirror.push()

    @staticmethod
    def is_foreign(path: Path) -> bool:
        """Whether `path` is a folder with files of somebody else: nothing here may delete it."""
        if not path.is_dir() or (path / "config.json").exists():
            return False
        return any(not entry.name.startswith(".") for entry in path.iterdir())

    def _take_lock(self) -> None:
        # flock and not a pid file: it disappears with the process, kill -9 included.
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 64).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise Refused(
                f"--workdir={self.path} is in use by process {holder}; "
                "wait for it, stop it, or give another --workdir"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def discard(self) -> None:
        """Removes the folder and frees it."""
        if self.url:
            storage.remove(self.url)
            self._mirror = None
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Frees the lock. The end of the process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> PurePath:
        return storage.below(self.url, "checkpoints") if self.url else self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def error_log(self) -> Path:
        return self.path / "error.log"

    def read_identity(self) -> dict[str, Any] | None:
        """What `config.json` holds (`recipe`, `preset`, `config_sha`, `config`, `versions`, …), or
        None in a new folder."""
        if not self.config.exists():
            return None
        try:
            return json.loads(self.config.read_text())
        except ValueError as error:
            raise Refused(
                f"{self.config} is not JSON ({error}); it must be the file that a run wrote"
            ) from None

    def write_identity(
        self, config: dict[str, Any], *, preset: str, made_of: Mapping[str, str] | None = None
    ) -> None:
        """Writes `config.json`: the resolved config with all that a result depends on besides it.

        Args:
            config: the resolved config as plain JSON-able values, with `recipe` in it.
            preset: the variant of the config file that it came from.
            made_of: prompts and files that a finished run is begun again for when they change, each
                with what stands for its content.
        """
        if not self.is_writer:
            return
        atomic.write_json(
            self.config,
            {
                "recipe": config.get("recipe", ""),
                "preset": preset,
                "config_sha": config_sha(config),
                "config": config,
                "made_of": dict(made_of or {}),
                "versions": versions(),
                "devices": device_kinds(),
                "git": git_revision(),
            },
        )


def remove(path: str | os.PathLike[str]) -> None:
    """Removes the workdir at `path`, if there is one, for a run that starts anew.

    The folder leaves its place in one rename, so that a kill leaves the old run or none, never half
    of one. What an earlier removal left behind goes too.

    Raises:
        Refused: another process holds it, or it has files but is no workdir.
    """
    if storage.is_url(path):
        with Workdir(path) as workdir:
            storage.remove(workdir.url)
            shutil.rmtree(workdir.path)
        return
    path = Path(path).expanduser().resolve()
    leftovers = list(path.parent.glob(f".{path.name}.removed-*")) if path.parent.is_dir() else []
    if path.exists():
        with Workdir(path):
            doomed = path.with_name(f".{path.name}.removed-{os.getpid()}")
            os.rename(path, doomed)
            leftovers.append(doomed)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def config_sha(config: dict[str, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the config as canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions that the numbers of a run depend on."""
    return {
        "jaxconv": jaxconv.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def device_kinds() -> dict[str, int]:
    """How many devices of each kind this run sees, all processes together."""
    import jax

    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    return kinds


def git_revision() -> str | None:
    """The revision of the source checkout (with `-dirty` when files were changed), else None."""
    root = Path(jaxconv.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
