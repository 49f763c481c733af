"""A fingerprint changes with the content of a file, and for a large one with its time as well."""

import os

import pytest

from jaxconv.data import fingerprint as module
from jaxconv.data.fingerprint import difference, digest, fingerprint


@pytest.fixture
def talks(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"one\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl").write_bytes(b"two\n")
    return tmp_path


def of(folder):
    return fingerprint(sorted(folder.rglob("*.jsonl")), folder)


def test_files_are_named_below_their_root(talks):
    assert of(talks).keys() == {"a.jsonl", "more/b.jsonl"}
    assert fingerprint([talks / "a.jsonl"], talks / "a.jsonl").keys() == {"a.jsonl"}


def test_a_small_file_is_its_content_alone(talks):
    before = of(talks)
    os.utime(talks / "a.jsonl", ns=(1, 1))
    assert of(talks) == before and difference(before, of(talks)) is None
    (talks / "a.jsonl").write_bytes(b"0ne\n")
    now = of(talks)
    assert difference(before, now) == f"a.jsonl was {before['a.jsonl']} and is {now['a.jsonl']}"
    assert before["a.jsonl"].startswith("4 bytes, sha256 ") and digest(before) != digest(now)


@pytest.mark.parametrize("changed", ["size", "head", "tail", "time"])
def test_of_a_large_file_the_ends_the_size_and_the_time_count(talks, monkeypatch, changed):
    monkeypatch.setattr(module, "WHOLE_BYTES", 10)
    monkeypatch.setattr(module, "_END_BYTES", 3)
    path = talks / "a.jsonl"

    def write(content, time):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        return of(talks)

    before = write(b"head middle tail", 5)
    assert write(b"head muddle tail", 5) == before  # what nobody reads, with its time put back
    content = {"size": b"head mid tail", "head": b"heed middle tail", "tail": b"head middle tall"}
    now = write(content.get(changed, b"head middle tail"), 6 if changed == "time" else 5)
    assert "a.jsonl" in difference(before, now)


def test_files_that_come_and_go_are_named(talks):
    before = of(talks)
    (talks / "more" / "b.jsonl").unlink()
    assert (
        difference(before, of(talks)) == f"more/b.jsonl was {before['more/b.jsonl']} and is absent"
    )
    assert difference(of(talks), before).startswith("more/b.jsonl was absent and is 4 bytes")
