"""The nodes of a Ray cluster, and what a run of a task does and has on them."""

import hashlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxconv.errors import Failed, Refused
from jaxconv.llm import ray_worker
from jaxconv.llm.backends.base import Backend
from jaxconv.llm.journal import Journal
from jaxconv.llm.merge import merge_journals
from jaxconv.llm.results import Result

_OBJECTS = 256 << 20  # bytes of memory for what is on its way, in a cluster of our own
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # and nothing said of what Ray Data always does
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_LOOKED_S = 0.2  # seconds between two looks at whether to stop


@contextmanager
def cluster(workers: int) -> Iterator[Any]:
    """The module `ray`, connected: to the cluster that this process is connected to already, to the
    one at RAY_ADDRESS, or to one of this machine alone, which ends with the block.

    Raises:
        Refused: ray is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise Refused("ray is not installed; pip install 'jaxconv[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS", "local")}
    if options["address"] == "local":
        options |= {
            "num_cpus": max(workers, 1),
            "object_store_memory": _OBJECTS,
            "include_dashboard": False,
        }
    with _own_signal_handlers():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray Data shows no progress inside the block and prints no stack of ours: what goes wrong is
    raised.

    Raises:
        Failed: something went wrong on a node that none of its rows accounts for.
    """
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    silent = {"enable_progress_bars": False, "print_on_execution_start": False}
    before, level = {name: getattr(context, name) for name in silent}, logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        for name, value in silent.items():
            setattr(context, name, value)
        yield
    except ray.exceptions.RayError as error:
        raise Failed(f"on a Ray node: {_last_line(error)}") from error
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Puts back after the block what it made of signals: how a run stops is not Ray's to say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Nodes:
    """All nodes, for a run with this journal."""

    def __init__(self, ray: Any, journal: Journal):
        self._ray, self._journal = ray, journal
        self._name = uuid.uuid4().hex[:16]
        if journal.path is not None:  # so that the next run with it finds what this one leaves
            place = f"{socket.gethostname()}:{journal.path.absolute()}"
            self._name = hashlib.sha256(place.encode()).hexdigest()[:16]

    def alive(self) -> list[str]:
        """Their ids."""
        return [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]

    def prepare(self, backend: Backend) -> None:
        """Sees that all nodes can ask, and merges what an earlier run left on them.

        Raises:
            Refused: one cannot.
        """
        self._gather(self._ray.cloudpickle.dumps(backend))

    def _gather(self, backend: bytes | None = None) -> set[int]:
        """Merges the journals on all nodes, and removes them; returns the shares that they are
        of."""
        with tempfile.TemporaryDirectory() as folder:
            visited = [node for node in self.alive() if self._visited(node, Path(folder), backend)]
            found = sorted(Path(folder).iterdir())
            merge_journals(found, self._journal)
        for node in visited:
            with suppress(
                self._ray.exceptions.RayError
            ):  # a journal that is merged again is no harm
                self._ray.get(self._on(node, ray_worker.forget).remote(self._name))
        return {int(path.stem.rsplit("-", 1)[1]) for path in found}

    def _visited(self, node: str, folder: Path, backend: bytes | None) -> bool:
        """Copies a node's journals; False where the node is lost."""
        visit = self._on(node, ray_worker.visit, num_returns="streaming")
        try:
            for reference in visit.remote(self._name, backend):
                name, message, at, part = self._ray.get(reference)
                if message:
                    raise ray_worker.ENDS[name](f"Ray node {node[:8]}: {message}")
                if part:
                    _write(folder / f"{node}-{name}", at, part)
        except self._ray.exceptions.RayError as error:
            for path in folder.glob(f"{node}-*"):
                path.unlink()  # half a journal is none
            if node in self.alive():
                raise Failed(f"on Ray node {node[:8]}: {_last_line(error)}") from error
            return False
        return True

    def _on(self, node: str, what: Callable[..., Any], **options: Any) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._ray.remote(what).options(num_cpus=0, scheduling_strategy=there, **options)

    def ask(
        self,
        shares: Sequence[ray_worker.Share],
        stop: Callable[[], bool],
        tell: Callable[[Result], None],
    ) -> None:
        """Has all shares asked for and merges their journals. Of a share with a budget of which
        nobody knows any more what it took, the journal says that all of it may be spent.

        Args:
            shares: at most as many as the cluster has CPUs.
            stop: asked often whether to stop.
            tell: told of each result when it is there, without its value; an error that it raises
                ends the run.

        Raises:
            Failed, Refused, Stopped: a worker could not go on, or was asked to stop.
        """
        ray, ends, raised = self._ray, {}, []
        here = ray.get_runtime_context().get_node_id()
        control = self._on(here, ray_worker.Control).remote()
        with tempfile.TemporaryDirectory() as folder:

            def work() -> None:
                try:
                    for row in self._rows(shares, control):
                        ends[row["number"]] = row["ended"], row["message"]
                        if row["part"]:
                            _write(Path(folder) / f"share-{row['number']}", row["at"], row["part"])
                except BaseException as error:
                    raised.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            try:
                while thread.is_alive():
                    thread.join(_LOOKED_S)
                    for result in ray.get(control.take.remote()):
                        tell(result)
                    if stop():
                        control.stop.remote()
            finally:
                control.stop.remote()
                thread.join()
                known = {n for n, (ended, _) in ends.items() if ended != ray_worker.LOST}
                try:
                    merge_journals(sorted(Path(folder).iterdir()), self._journal)
                    known |= self._gather()
                finally:
                    self._write_off(
                        [share for share in shares if share.number not in known], control
                    )
        if raised:
            raise raised[0]
        for kind, error in ray_worker.ENDS.items():
            for ended, message in ends.values():
                if ended == kind:
                    raise error(message)

    def _write_off(self, lost: Sequence[ray_worker.Share], control: Any) -> None:
        begun = {share.number for share in lost}
        if lost:
            with suppress(self._ray.exceptions.RayError):  # then any of them may have begun
                begun &= self._ray.get(control.begun.remote())
        for share in lost:
            tokens, usd = share.settings.budget_tokens, share.settings.budget_usd
            if share.number in begun and (tokens or usd):
                self._journal.write_off(
                    share.task.name,
                    share.task.prompt.version,
                    share.backend.model,
                    "a share of rows on a Ray node that was lost",
                    tokens=tokens,
                    usd=usd,
                )

    def _pickled(self, share: ray_worker.Share) -> bytes:
        """With the task's own modules in it, which no node need have."""
        task = share.task
        parts = (task.input, task.output, task.rules, *task.checks)
        names = {getattr(part, "__module__", "") for part in parts}
        modules = [
            sys.modules[name]
            for name in names
            if name in sys.modules and name != "__main__" and not name.startswith("jaxconv.")
        ]
        pickler = self._ray.cloudpickle
        for module in modules:
            pickler.register_pickle_by_value(module)
        try:
            return pickler.dumps(share)
        finally:
            for module in modules:
                pickler.unregister_pickle_by_value(module)

    def _rows(self, shares: Sequence[ray_worker.Share], control: Any) -> Iterator[dict[str, Any]]:
        """What the workers give, as it comes."""
        data = self._ray.data
        with _quiet(self._ray):
            items = [{"number": share.number, "share": self._pickled(share)} for share in shares]
            asked = data.from_items(items, override_num_blocks=len(items)).map_batches(
                ray_worker.Worker,
                fn_constructor_args=(self._name, control),
                batch_size=1,
                batch_format="pyarrow",
                # One share at a time: by default those that are up first take two each.
                compute=data.ActorPoolStrategy(size=len(items), max_tasks_in_flight_per_actor=1),
                num_cpus=1,
            )
            for table in asked.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from table.to_pylist()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _write(path: Path, at: int, part: bytes) -> None:
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.seek(at)
        file.write(part)
