"""Labels a file of any size with a saved classifier, in several processes or on a Ray cluster.

    python -m jaxconv.label_stream CLASSIFIER SOURCE TARGET --workers=4
    python -m jaxconv.label_stream CLASSIFIER SOURCE TARGET --workers=16 --ray

The file is read in blocks, a few of which are in memory; the target has a line for each row, in
order, as `text_classifier.label_file` writes it, and appears whole or not at all.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxconv.durable import publish
from jaxconv.errors import Failed, Refused
from jaxconv.llm.ray_nodes import cluster
from jaxconv.models.text_classifier import Labelled, TextClassifier, load_text_classifier

_ROWS = 4096  # of a block
_AHEAD = 2  # blocks under way for each worker

Block = tuple[int, Sequence[str]]
"""(rows before it, its lines)."""
Lines = tuple[list[str], int]
"""(a line of JSON for each row, how many of them are errors)."""


class Blocks(Sequence):
    """Blocks of lines of a file, by number; where they begin is found in one pass."""

    def __init__(self, source: Path):
        self._source, self._begin = source, [0]
        with source.open("rb") as file:
            at = 0
            for number, line in enumerate(file, 1):
                at += len(line)
                if number % _ROWS == 0:
                    self._begin.append(at)
        if self._begin[-1] == at or not at:
            self._begin.pop()
        self._end = [*self._begin[1:], at]

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, i: int) -> Block:
        with self._source.open("rb") as file:
            file.seek(self._begin[i])
            read = file.read(self._end[i] - self._begin[i])
        # What is not UTF-8 becomes half of a surrogate pair, which is an error of its row alone.
        lines = read.decode(errors="surrogateescape").split("\n")
        return i * _ROWS, lines[:-1] if read.endswith(b"\n") else lines


class Labeller:
    """Labels blocks; the classifier is loaded in the process that does.

    Args:
        files: of the classifier's folder, by their paths in it.
        field: of the text.
    """

    def __init__(self, files: dict[str, bytes], field: str):
        self._files, self._field = files, field

    @functools.cached_property
    def _classifier(self) -> TextClassifier:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self._files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return load_text_classifier(folder)

    def __call__(self, block: Block) -> Lines:
        """(a line of JSON for each row, how many of them are errors)."""
        before, lines = block
        rows = list(self._classifier.label_rows(lines, field=self._field))
        found = [json.dumps(row | {"row": row["row"] + before}) for row in rows]
        return found, sum("error" in row for row in rows)


def label_stream(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    field: str = "text",
    workers: int = 1,
    ray: bool = False,
) -> Labelled:
    """Labels a JSON Lines file with the classifier of a folder.

    Args:
        folder: that `save_text_classifier` wrote.
        source, target: files.
        field: of the text.
        workers: processes, of this machine or of the cluster.
        ray: whether they are on the Ray cluster at RAY_ADDRESS, or else on one of this machine. The
            classifier and the rows are sent to them, so nothing has to be on a shared disk; what a
            lost node had is done again by another.

    Raises:
        Refused: no such classifier or file, or ray is not installed.
        Failed: the target cannot be written.
    """
    source, target, folder = Path(source), Path(target), Path(folder).expanduser()
    if workers < 1:
        raise Refused(f"workers is {workers}; it must be at least 1")
    if not source.is_file():
        raise Refused(f"{source}: no such file")
    load_text_classifier(folder)  # refuses one that is damaged before any work is done
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    labeller, blocks = Labeller(files, field), Blocks(source)
    partial = target.with_name(f".{target.name}.partial")
    rows = errors = 0
    try:
        with (
            (_on_ray if ray else _here)(labeller, blocks, workers) as labelled,
            partial.open("w", encoding="utf-8") as file,
        ):
            for lines, bad in labelled:
                file.writelines(f"{line}\n" for line in lines)
                rows, errors = rows + len(lines), errors + bad
        publish(partial, target)
    except OSError as error:
        raise Failed(f"cannot write {target}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Labelled(rows, errors)


@contextlib.contextmanager
def _here(labeller: Labeller, blocks: Blocks, workers: int) -> Iterator[Iterator[Lines]]:
    """In processes of this machine, which Grain starts where there are several."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain asks for some of its own, which nobody else has read
        flags.FLAGS.mark_as_parsed()
    found = (
        grain.MapDataset.source(blocks)
        .map(labeller)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    )
    if workers > 1:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        found = found.mp_prefetch(options)
    iterator = iter(found)
    try:
        yield iterator
    finally:
        iterator.close()


@contextlib.contextmanager
def _on_ray(labeller: Labeller, blocks: Blocks, workers: int) -> Iterator[Iterator[Lines]]:
    with cluster(workers) as ray:
        actor = ray.remote(max_restarts=-1, max_task_retries=-1)(_Worker)
        shared = ray.put(labeller)
        yield _in_order(ray, [actor.remote(shared) for _ in range(workers)], blocks)


class _Worker:
    def __init__(self, labeller: Labeller):
        self._labeller = labeller

    def label(self, block: Block) -> Lines:
        return self._labeller(block)


def _in_order(ray: Any, actors: Sequence[Any], blocks: Blocks) -> Iterator[Lines]:
    turn, under_way = itertools.cycle(actors), collections.deque()
    for i in range(len(blocks)):
        under_way.append(next(turn).label.remote(blocks[i]))
        if len(under_way) == _AHEAD * len(actors):
            yield ray.get(under_way.popleft())
    while under_way:
        yield ray.get(under_way.popleft())


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jaxconv.label_stream`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxconv.label_stream",
        description="Labels a JSON Lines file with a saved classifier.",
    )
    parser.add_argument("classifier", help="folder of the classifier")
    parser.add_argument("source", help="JSON Lines file")
    parser.add_argument("target", help="JSON Lines file to write")
    parser.add_argument("--field", default="text", help="field of the text")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--ray", action="store_true", help="on the Ray cluster at RAY_ADDRESS")
    given = parser.parse_args(argv)
    try:
        done = label_stream(
            given.classifier,
            given.source,
            given.target,
            field=given.field,
            workers=given.workers,
            ray=given.ray,
        )
    except Refused as error:
        print(f"jaxconv: refused: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"jaxconv: failed: {error}", file=sys.stderr)
        return 1
    print(f"{done.rows:,} rows labelled, {done.errors:,} without a text: {given.target}")
    return 3 if done.errors else 0


if __name__ == "__main__":
    # By its name, under which other processes import what they are sent.
    from jaxconv import label_stream as module

    sys.exit(module.main())
