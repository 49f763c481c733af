"""A classifier with its encoder: a folder that loads in one line and labels files as streams.

The folder holds `classifier.json`, `head.safetensors` and, of an encoder with weights, `encoder/`
as sentence-transformers reads it. Nothing in it is code.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxconv.durable import publish, standing, whole_folder
from jaxconv.errors import Failed, Refused
from jaxconv.models.classifier import Classifier
from jaxconv.models.hashed_ngrams import HashedNgrams
from jaxconv.models.safetensors_io import (
    Tensor,
    TensorFiles,
    read_json,
    save_tensors,
    write_json,
)
from jaxconv.models.sentence_folder import load_sentence_encoder, save_sentence_encoder
from jaxconv.models.text_encoder import TextEncoder

_CONFIG, _HEAD, _ENCODER = "classifier.json", "head.safetensors", "encoder"
_FIELDS = {"labels", "multilabel", "method", "layers", "encoder", "dim"}
_HASHED = "hashed_ngrams"
_AT_ONCE = 4096  # rows that are in memory together


@dataclasses.dataclass(frozen=True)
class Labelled:
    """How many rows of a file were labelled, and of how many the text could not be read."""

    rows: int
    errors: int


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """Attributes:
    encoder: of texts.
    classifier: of their embeddings.
    """

    encoder: TextEncoder
    classifier: Classifier

    def __post_init__(self):
        if self.encoder.width != self.classifier.width:
            raise Refused(
                f"the encoder makes embeddings of width {self.encoder.width}; "
                f"the classifier reads {self.classifier.width}"
            )

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, labels]."""
        return self.classifier.probabilities(self.encoder.encode(texts))

    def predict(self, texts: Sequence[str]) -> list[str] | list[tuple[str, ...]]:
        """The most probable label of each text; of a multilabel head all of at least one half."""
        return self.classifier.named(self.probabilities(texts))

    def label_rows(
        self, lines: Iterable[str], *, field: str = "text", at_once: int = _AT_ONCE
    ) -> Iterator[dict[str, Any]]:
        """Labels JSON Lines as they come, `at_once` in memory.

        Args:
            lines: JSON objects; an empty line is passed over.
            field: of the text.

        Yields:
            One object a line, in order: `row` (its number, from 1), its `id` if it has one, and
            `label` with `probability`, or `labels` to their probabilities, at least one half each;
            or `error` where there is no text, or one that UTF-8 cannot hold.
        """
        numbered = ((i, line) for i, line in enumerate(lines, 1) if line.strip())
        while part := list(itertools.islice(numbered, at_once)):
            parsed = [_parse(number, line, field) for number, line in part]
            readable = [text for _, text in parsed if text is not None]
            found = iter(self.probabilities(readable) if readable else ())
            for row, text in parsed:
                yield row if text is None else row | self._said(next(found))

    def _said(self, probabilities: np.ndarray) -> dict[str, Any]:
        names = self.classifier.labels
        if self.classifier.multilabel:
            chosen = np.flatnonzero(probabilities >= 0.5)
            return {"labels": {names[i]: round(float(probabilities[i]), 6) for i in chosen}}
        best = int(probabilities.argmax())
        return {"label": names[best], "probability": round(float(probabilities[best]), 6)}


def label_file(
    classifier: TextClassifier,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    field: str = "text",
    watch: Callable[[int], None] = lambda rows: None,
) -> Labelled:
    """Labels a JSON Lines file of any size into another one, with `label_rows`.

    The target appears whole or not at all, and replaces an older one.

    Args:
        classifier: what labels.
        source, target: files.
        field: of the text.
        watch: called with the number of rows after each that is done; it may raise to stop.

    Raises:
        Refused: there is no source.
        Failed: the source cannot be read, or the target cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise Refused(f"{source}: no such file")
    partial = target.with_name(f".{target.name}.partial")
    rows = errors = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in classifier.label_rows(_lines(source), field=field):
                file.write(json.dumps(row) + "\n")
                rows, errors = rows + 1, errors + ("error" in row)
                watch(rows)
        publish(partial, target)
    except OSError as error:
        raise Failed(f"cannot write {target}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Labelled(rows, errors)


def save_text_classifier(classifier: TextClassifier, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that `load_text_classifier` loads, whole or not at all.

    Raises:
        Refused: the folder holds something else.
        Failed: it could not be written (a full disk); nothing half-written is left.
    """
    head, encoder = classifier.classifier, classifier.encoder
    is_hashed = isinstance(encoder, HashedNgrams)
    with whole_folder(Path(folder), marker=_CONFIG) as partial:
        write_json(
            partial / _CONFIG,
            {
                "labels": list(head.labels),
                "multilabel": head.multilabel,
                "method": head.method,
                "layers": len(head.kernels),
                "encoder": _HASHED if is_hashed else _ENCODER,
                "dim": encoder.width if is_hashed else encoder.dim,
            },
        )
        arrays = {"slope": head.slope, "shift": head.shift}
        for i, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
            arrays |= {f"kernel_{i}": kernel, f"bias_{i}": bias}
        tensors = [
            Tensor(name, array.shape, "float32", lambda array=array: array)
            for name, array in arrays.items()
        ]
        save_tensors(tensors, partial / _HEAD)
        if not is_hashed:
            save_sentence_encoder(encoder, partial / _ENCODER)


def load_text_classifier(folder: str | os.PathLike[str]) -> TextClassifier:
    """The classifier of a folder that `save_text_classifier` wrote.

    Raises:
        Refused: there is none, or it is damaged.
    """
    folder = standing(Path(folder).expanduser())
    config = read_json(folder / _CONFIG)
    if set(config) != _FIELDS:
        raise Refused(
            f"{folder / _CONFIG} has {', '.join(sorted(config))}; "
            f"expected {', '.join(sorted(_FIELDS))}"
        )
    if not (folder / _HEAD).is_file():
        raise Refused(f"{folder / _HEAD} is missing")
    files = TensorFiles([folder / _HEAD])
    layers = range(config["layers"])
    expected = ["slope", "shift", *(f"{kind}_{i}" for kind in ("kernel", "bias") for i in layers)]
    for name in expected:
        if name not in files.shapes:
            raise Refused(f"{folder / _HEAD}: tensor {name} is missing")
    kernels, biases = (
        tuple(files.read(f"{kind}_{i}") for i in layers) for kind in ("kernel", "bias")
    )
    count = (len(config["labels"]),)
    for name in ("slope", "shift", f"bias_{layers[-1]}"):
        if files.shapes[name] != count:
            raise Refused(
                f"{folder / _HEAD}: tensor {name} has shape {list(files.shapes[name])}; "
                f"{_CONFIG} expects {list(count)}"
            )
    head = Classifier(
        tuple(config["labels"]),
        config["multilabel"],
        kernels,
        biases,
        files.read("slope"),
        files.read("shift"),
        config["method"],
    )
    if config["encoder"] == _HASHED:
        return TextClassifier(HashedNgrams(config["dim"]), head)
    encoder = load_sentence_encoder(folder / _ENCODER, dim=config["dim"])
    return TextClassifier(encoder, head)


def _lines(source: Path) -> Iterator[str]:
    """Of a file; bytes that are no UTF-8 become halves of surrogate pairs."""
    try:
        with source.open(encoding="utf-8", errors="surrogateescape") as lines:
            yield from lines
    except OSError as error:
        raise Failed(f"cannot read {source}: {error}") from error


def _parse(number: int, line: str, field: str) -> tuple[dict[str, Any], str | None]:
    """What is known of a row, and its text."""
    row: dict[str, Any] = {"row": number}
    try:
        line.encode()
        value = json.loads(line)
    except UnicodeEncodeError as error:
        return row | {"error": f"not UTF-8 at character {error.start + 1}"}, None
    except ValueError as error:
        return row | {"error": f"not JSON: {error}"}, None
    except RecursionError:
        return row | {"error": "not read: it is nested too deep"}, None
    if not isinstance(value, dict):
        return row | {"error": f"a {type(value).__name__}; it must be an object"}, None
    if "id" in value:
        row["id"] = value["id"]
    text = value.get(field)
    if not isinstance(text, str):
        return row | {"error": f"{field} is {type(text).__name__}; it must be a string"}, None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        return row | {"error": f"{field} holds {half}, half a pair of surrogates"}, None
    return row, text
