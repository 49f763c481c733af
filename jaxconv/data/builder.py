"""Prepared data sets: ArrayRecord files that `tensorflow_datasets` writes and reads.

`python -m jaxconv.data.builder --input=chats.jsonl --format=auto --out=DIR` prepares one;
`jaxconv.data.sources.open_source(DIR)` reads it. TensorFlow is not imported. This module imports
`tensorflow_datasets` at its head, so it is itself imported only by what needs it.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from jaxconv import durable
from jaxconv.data.conversation import Record, from_row, parse_line, to_line
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.data.sources import AUTO, Source, open_source
from jaxconv.errors import Refused

PART_BYTES = 512 << 20
"""A split's size. `tensorflow_datasets` holds one in memory to sort it, and past 1000 MiB it wants
TensorFlow, so a larger set has several."""


class Conversations(tfds.core.GeneratorBasedBuilder):
    """Conversations or preference pairs in the order of their source.

    A record is one feature, its line of JSON: messages are nested and of any number, and so they
    come back exactly as they were.

    Args:
        source: where records come from.
        data_dir: the folder that `tensorflow_datasets` keeps data sets in.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Source, data_dir: Path):
        self._source = source
        super().__init__(data_dir=data_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations or preference pairs, one line of JSON each.",
            features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        starts = [0]
        size = 0
        for i, record in enumerate(self._source):
            length = len(to_line(record).encode())
            if size and size + length > PART_BYTES:
                starts.append(i)
                size = 0
            size += length
        parts = itertools.pairwise([*starts, len(self._source)])
        return {f"part{k}": self._generate_examples(*part) for k, part in enumerate(parts)}

    def _generate_examples(self, begin: int, end: int) -> Iterator[tuple[int, dict[str, str]]]:
        for i in range(begin, end):
            yield i, {"record": to_line(self._source[i])}


def prepare(source: Source, folder: Path, *, shards: int | None = None) -> None:
    """Writes a source into `folder`, which appears whole or not at all.

    Args:
        source: at least one record.
        folder: must not be there yet.
        shards: files of each `PART_BYTES`; None leaves their number to `tensorflow_datasets`, which
            goes by size.

    Raises:
        Refused: the folder is there.
    """
    if folder.exists():
        raise Refused(f"{folder} is there already; --out must be a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        builder = Conversations(source=source, data_dir=partial)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=shards)
        )
        durable.publish(Path(builder.data_dir), folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Prepared(Source):
    """A data set that `prepare` wrote."""

    def __init__(self, folder: Path):
        self.format = "prepared"
        builder = tfds.builder_from_directory(folder)
        if set(builder.info.features) != {"record"}:
            raise Refused(f"{folder} is a data set, but jaxconv.data.builder did not prepare it")
        parts = sorted(builder.info.splits, key=lambda name: int(name.removeprefix("part")))
        self._lines = builder.as_data_source(split="+".join(parts))
        self.rows = len(self)
        self.kind = type(self[0])

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        return from_row(parse_line(self._lines[range(len(self))[i]]["record"]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 0 done, 2 refused, 3 some rows were bad."""
    parser = argparse.ArgumentParser(prog="python -m jaxconv.data.builder", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="a file or a folder of files")
    parser.add_argument("--format", default=AUTO, help=f"{AUTO}, {', '.join(FORMATS)}")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--shards", type=int, help="files; by default their number goes by size")
    args = parser.parse_args(argv)
    kept = args.out.with_name(f"{args.out.name}.quarantine.jsonl")
    kept.unlink(missing_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as scratch:
        quarantine = Quarantine(Path(scratch) / kept.name)
        try:
            source = open_source(args.input, args.format, quarantine)
            prepare(source, args.out, shards=args.shards)
        except Refused as refused:
            print(f"jaxconv: {refused}", file=sys.stderr)
            return 2
        finally:
            if quarantine.counts:
                quarantine.path.rename(kept)
    print(
        f"{args.out}: {len(source)} records ({source.kind.__name__}) of {source.rows} rows, "
        f"format {source.format!r}"
    )
    for note in quarantine.notes(str(kept)):
        print(note)
    return 3 if len(quarantine) else 0


if __name__ == "__main__":
    sys.exit(main())
