"""Intents of banking77: heads on embeddings, how sure they are, and a long file as a stream.

    python benchmarks/intents.py --data=…/banking77 [--model=FOLDER] [--stream=ROWS]

Without `--model` texts are embedded by hashed n-grams. With `--stream` a file of so many rows is
labelled by the logistic regression, and ten times on the way the resident memory is printed.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from jaxconv.models.text_classifier import (
    TextClassifier,
    label_file,
    load_text_classifier,
    save_text_classifier,
)
from jaxconv.models.text_encoder import load_text_encoder
from jaxconv.train import compile_cache
from jaxconv.train.classifiers import METHODS, fit_classifier


def read(file: Path) -> tuple[list[str], list[str]]:
    """(texts, labels) of a file of banking77."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def resident_mb() -> float:
    """Memory of this process that is in RAM."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def stream(classifier: TextClassifier, texts: list[str], rows: int) -> None:
    """Labels a file of `rows` rows with the classifier as a folder holds it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_text_classifier(classifier, folder / "classifier")
        with (folder / "in.jsonl").open("w", encoding="utf-8") as file:
            for i in range(rows):
                file.write(json.dumps({"id": i, "text": f"{texts[i % len(texts)]} {i}"}) + "\n")
        start = time.perf_counter()

        def watch(done: int) -> None:
            if done % max(rows // 10, 1) == 0:
                print(f"{done} rows, {time.perf_counter() - start:.0f} s, {resident_mb():.0f} MB")

        loaded = load_text_classifier(folder / "classifier")
        print(label_file(loaded, folder / "in.jsonl", folder / "out.jsonl", watch=watch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of banking77")
    parser.add_argument("--model", default="", help="folder of sentence-transformers")
    parser.add_argument("--dim", type=int, help="numbers of an embedding")
    parser.add_argument("--stream", type=int, default=0, help="rows of a file to label")
    arguments = parser.parse_args()

    compile_cache.enable()
    encoder = load_text_encoder(arguments.model, dim=arguments.dim)
    print(encoder.about)
    (texts, labels), (test, truth) = (
        read(Path(arguments.data).expanduser() / f"{name}.csv") for name in ("train", "test")
    )
    learned, held_out = encoder.encode(texts), encoder.encode(test)
    classifiers = {}
    for method in METHODS:
        fitted = fit_classifier(learned, labels, method=method)
        found = fitted.classifier.predict(held_out)
        accuracy = np.mean([a == b for a, b in zip(found, truth, strict=True)])
        print(
            f"{method}: accuracy {accuracy:.4f} of {len(test)} test texts; calibration error of "
            f"{fitted.kept_apart} kept apart {fitted.calibration_error:.4f}, "
            f"uncalibrated {fitted.uncalibrated_error:.4f}"
        )
        classifiers[method] = TextClassifier(encoder, fitted.classifier)
    if arguments.stream:
        stream(classifiers["logistic"], texts, arguments.stream)


if __name__ == "__main__":
    main()
