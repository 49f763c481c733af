"""Embeddings that were computed once, on disk, found again by what they were made of.

The key of an embedding is a hash of the encoder's fingerprint, the prompt and the text, so a file
may serve any number of encoders, data sets and runs, and nothing in it is ever out of date. It is
an SQLite database: after a kill it holds every batch that was finished, whole, and several
processes may share it.
"""

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxconv.errors import Failed, Refused

_AT_ONCE = 500  # keys in a query; SQLite takes no more than 999 variables everywhere
_BATCH = 4096  # texts that are encoded, and committed, together
_PATIENCE_S = 60.0  # to wait for another process's commit


class Encodes(Protocol):
    """What makes embeddings; `fingerprint` stands for all that they depend on but the text."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def width(self) -> int: ...

    def encode(self, texts: Sequence[str], *, prompt: str | None = None) -> np.ndarray: ...


class EmbeddingCache:
    """A file of embeddings.

    Args:
        path: of the file; it is made if it is not there.

    Attributes:
        hits, misses: texts that were found, and that had to be encoded, so far.

    Raises:
        Refused: the file is something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path).expanduser()
        self.hits = self.misses = 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self._path, timeout=_PATIENCE_S)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            with self._database:
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS embeddings "
                    "(key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
                )
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise Refused(f"{self._path} is no cache of embeddings: {error}") from error

    def encode(
        self, encoder: Encodes, texts: Sequence[str], *, prompt: str | None = None
    ) -> np.ndarray:
        """`encoder.encode(texts, prompt=prompt)`, float32 [texts, width], of which only what is
        not in the file is computed, each different text once.

        Raises:
            Failed: the file cannot be written.
        """
        out = np.empty((len(texts), encoder.width), np.float32)
        for begin in range(0, len(texts), _BATCH):
            batch = list(texts[begin : begin + _BATCH])
            out[begin : begin + len(batch)] = self._batch(encoder, batch, prompt)
        return out

    def __len__(self) -> int:
        return self._database.execute("SELECT count(*) FROM embeddings").fetchone()[0]

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _batch(self, encoder: Encodes, texts: list[str], prompt: str | None) -> np.ndarray:
        start = hashlib.sha256(repr((encoder.fingerprint, prompt)).encode())
        keys = []
        for text in texts:
            key = start.copy()
            key.update(text.encode("utf-8", "surrogatepass"))
            keys.append(key.digest())
        found = self._look_up(list(dict.fromkeys(keys)))
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        self.hits += len(texts) - len(missing)
        self.misses += len(missing)
        if missing:
            made = np.ascontiguousarray(
                encoder.encode(list(missing.values()), prompt=prompt), np.float32
            )
            vectors = dict(zip(missing, made, strict=True))
            try:
                with self._database:
                    self._database.executemany(
                        "INSERT OR IGNORE INTO embeddings VALUES (?, ?)",
                        ((key, vector.astype("<f4").tobytes()) for key, vector in vectors.items()),
                    )
            except sqlite3.Error as error:
                raise Failed(f"cannot write {self._path}: {error}") from error
            found |= vectors
        return np.stack([found[key] for key in keys])

    def _look_up(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        found = {}
        for begin in range(0, len(keys), _AT_ONCE):
            some = keys[begin : begin + _AT_ONCE]
            marks = ",".join("?" * len(some))
            rows = self._database.execute(
                f"SELECT key, vector FROM embeddings WHERE key IN ({marks})", some
            )
            found.update((key, np.frombuffer(vector, "<f4")) for key, vector in rows)
        return found
