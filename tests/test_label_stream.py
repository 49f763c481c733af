"""A file labelled in blocks, by one process, several, or a Ray cluster: always the same bytes."""

import json
import subprocess
import sys

import pytest

from jaxconv import label_stream
from jaxconv.errors import Refused
from jaxconv.models.hashed_ngrams import HashedNgrams
from jaxconv.models.text_classifier import (
    TextClassifier,
    label_file,
    load_text_classifier,
    save_text_classifier,
)
from jaxconv.train.classifiers import fit_classifier

TEXTS = [f"{said} number {i}" for i in range(12) for said in ("lost card", "exchange rate")]


@pytest.fixture
def folder(tmp_path):
    encoder = HashedNgrams(64)
    head = fit_classifier(encoder.encode(TEXTS), ["card", "rate"] * 12).classifier
    save_text_classifier(TextClassifier(encoder, head), tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def source(tmp_path):
    """Rows of several blocks; among them blank ones, bad ones, and a last one without an end."""
    rows = [json.dumps({"id": i, "text": f"{TEXTS[i % 24]} {i}"}).encode() for i in range(50)]
    rows[7], rows[20], rows[33] = b"", b'{"text": "caf\xe9"}', b"{broken"
    rows[40] = json.dumps({"text": "my card \u2028 \x85 ü"}, ensure_ascii=False).encode()
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(rows))
    return path


@pytest.mark.parametrize("rows", [1, 7, 10, 50, 51, 4096])
def test_blocks_are_what_one_pass_writes(rows, folder, source, tmp_path, monkeypatch):
    whole = label_file(load_text_classifier(folder), source, tmp_path / "whole.jsonl")
    monkeypatch.setattr(label_stream, "_ROWS", rows)
    blocks = label_stream.Blocks(source)
    assert len(blocks) == -(-50 // rows)
    found = label_stream.label_stream(folder, source, tmp_path / "out.jsonl")
    assert found == whole and found.rows == 49 and found.errors == 2
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_without_rows_gives_one_without_rows(folder, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"")
    found = label_stream.label_stream(folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert found.rows == 0 and (tmp_path / "out.jsonl").read_bytes() == b""


def many(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{TEXTS[i % 24]}"}) + "\n" for i in range(20_000)))
    return path


def test_several_processes_write_the_same(folder, tmp_path):
    path, out = many(tmp_path), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "jaxconv.label_stream", folder, path, out, "--workers=2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "20,000 rows labelled, 0 without a text" in done.stdout
    label_file(load_text_classifier(folder), path, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_a_cluster_writes_the_same(folder, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path, out = many(tmp_path), tmp_path / "out.jsonl"
    found = label_stream.label_stream(folder, path, out, workers=2, ray=True)
    assert found.rows == 20_000 and found.errors == 0
    label_file(load_text_classifier(folder), path, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_not_there_is_refused_by_name(folder, source, tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    assert label_stream.main([str(folder), str(tmp_path / "none.jsonl"), out]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    with pytest.raises(Refused, match="workers is 0"):
        label_stream.label_stream(folder, source, out, workers=0)
    assert label_stream.main([str(tmp_path), str(source), out]) == 2
    assert not (tmp_path / "out.jsonl").exists()
