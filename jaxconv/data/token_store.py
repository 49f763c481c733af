"""Tokenised examples on disk: each conversation goes through its template and tokenizer once.

A store is a folder of flat arrays that are mapped into memory, so a data set may be larger than it.
An example is one stream of tokens, or two for a preference pair.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxconv.data.examples import TokenExample
from jaxconv.durable import publish


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Attributes:
    tokens: int32 [all tokens].
    mask: bool [all tokens], what is to be learned.
    offsets: int64 [n · streams + 1], where each stream begins and the last one ends.
    record: int64 [n], which record of the source each example was made of.
    streams: of an example: 1, or 2 (chosen, rejected).
    counts: what became of the records, by name.
    ids: of records that are not simply whole, by the same names; not all where there are many.
    made_of: fingerprint of the source, the template and the tokenizer.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    record: np.ndarray
    streams: int
    counts: Mapping[str, int]
    ids: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    made_of: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.record)

    @property
    def stream_lengths(self) -> np.ndarray:
        """int64 [n, streams], tokens of each stream."""
        return np.diff(self.offsets).reshape(-1, self.streams)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each example, all its streams together."""
        return self.stream_lengths.sum(axis=1)

    def stream(self, i: int) -> TokenExample:
        """Stream `i` of all streams: example `i // streams`."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return TokenExample(self.tokens[part], self.mask[part])

    def __getitem__(self, i: int) -> list[TokenExample]:
        """The streams of example `i`."""
        return [self.stream(i * self.streams + side) for side in range(self.streams)]


def build(
    folder: Path,
    examples: Iterable[tuple[int, Sequence[TokenExample]]],
    counts: Mapping[str, int],
    ids: Mapping[str, Sequence[str]] = MappingProxyType({}),
    *,
    streams: int,
    made_of: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a store; it appears whole or not at all.

    Args:
        folder: where; it must not be there yet.
        examples: (record, streams of one example) one after the other.
        counts, ids: as of `TokenStore`; read when the last example has come.
        streams: of an example.
        made_of: as of `TokenStore`.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    offsets, record = [0], []
    with open(partial / "tokens.bin", "wb") as tokens, open(partial / "mask.bin", "wb") as mask:
        for source, parts in examples:
            if len(parts) != streams:
                raise ValueError(f"record {source} has {len(parts)} streams; expected {streams}")
            record.append(source)
            for part in parts:
                # Not `tofile`, which says nothing of a full disk.
                tokens.write(np.asarray(part.tokens, np.int32).tobytes())
                mask.write(np.asarray(part.mask, bool).tobytes())
                offsets.append(offsets[-1] + len(part.tokens))
    np.save(partial / "offsets.npy", np.array(offsets, np.int64))
    np.save(partial / "record.npy", np.array(record, np.int64))
    about = {"streams": streams, "counts": dict(counts), "ids": dict(ids)}
    about["made_of"] = dict(made_of)
    (partial / "store.json").write_text(json.dumps(about, indent=2) + "\n")
    publish(partial, folder)


def load(folder: Path) -> TokenStore:
    """The store that `build` wrote."""
    about = json.loads((folder / "store.json").read_text())
    offsets, record = np.load(folder / "offsets.npy"), np.load(folder / "record.npy")

    def mapped(name: str, dtype) -> np.ndarray:
        if not offsets[-1]:
            return np.zeros(0, dtype)  # an empty file cannot be mapped
        return np.memmap(folder / name, dtype, mode="r")

    return TokenStore(
        mapped("tokens.bin", np.int32),
        mapped("mask.bin", bool),
        offsets,
        record,
        about["streams"],
        about["counts"],
        about.get("ids", {}),  # stores of before have none
        about.get("made_of", {}),
    )
