"""Prepared data sets: what goes in comes out, in order, and TensorFlow stays out."""

import concurrent.futures
import json
import subprocess
import sys

import pytest

from jaxconv.data.conversation import Conversation, Message, PreferencePair, write_jsonl
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.sources import open_source
from jaxconv.errors import Refused

builder = pytest.importorskip("jaxconv.data.builder")


def conversations(n):
    words = ["Hi", "ö\u2028\N{GRINNING FACE}", "a" * 5000, "\x00\n"]
    return [
        Conversation(
            f"chat {i}",
            (Message("user", words[i % 4], "ann"), Message("assistant", f"{i} {words[i % 3]}")),
            {"n": i, "deep": [{"x": None, "y": 0.1}]},
        )
        for i in range(n)
    ]


def pairs(n):
    answers = [(Message("assistant", word),) for word in ("", "no")]
    return [PreferencePair(f"pair {i}", (Message("user", "Hi"),), *answers) for i in range(n)]


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "quarantine.jsonl")


@pytest.mark.parametrize("make", [conversations, pairs])
def test_what_goes_in_comes_out_in_order(make, tmp_path, quarantine):
    records = make(50)
    write_jsonl(tmp_path / "records.jsonl", records)
    source = open_source(tmp_path / "records.jsonl", "auto", quarantine)
    builder.prepare(source, tmp_path / "set", shards=3)
    assert len(list((tmp_path / "set").glob("*.array_record-*"))) == 3
    prepared = open_source(tmp_path / "set", "auto", quarantine)
    assert list(prepared) == list(source) == records
    assert (len(prepared), prepared.rows, prepared.kind) == (50, 50, type(records[0]))
    assert prepared.format == "prepared" and prepared[-1] == records[-1]
    with pytest.raises(IndexError):
        prepared[50]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(prepared.__getitem__, range(50))) == records


def test_a_large_set_has_several_parts(tmp_path, quarantine, monkeypatch):
    monkeypatch.setattr(builder, "PART_BYTES", 8_000)
    records = conversations(40)
    write_jsonl(tmp_path / "records.jsonl", records)
    source = open_source(tmp_path / "records.jsonl", "jaxconv", quarantine)
    builder.prepare(source, tmp_path / "set")
    splits = json.loads((tmp_path / "set" / "dataset_info.json").read_text())["splits"]
    assert len(splits) > 10  # so that part10 does not come before part2
    assert list(open_source(tmp_path / "set", "auto", quarantine)) == records


def test_a_set_of_somebody_else_is_refused(tmp_path, quarantine):
    import tensorflow_datasets as tfds

    class Numbers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"n": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": iter([(0, {"n": "one"})])}

        def _generate_examples(self):
            raise NotImplementedError

    other = Numbers(data_dir=tmp_path, file_format="array_record")
    other.download_and_prepare()
    with pytest.raises(Refused, match=r"jaxconv\.data\.builder did not prepare it"):
        open_source(other.data_dir, "auto", quarantine)


def test_the_command_prepares_a_set_without_tensorflow(tmp_path):
    """In a process of its own, which looks at its modules after writing and after reading."""
    (tmp_path / "chats.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "Hello"}]}\n{"messages": []}\n'
    )
    code = (
        "import sys; from pathlib import Path; from jaxconv.data import builder\n"
        "from jaxconv.data.quarantine import Quarantine\n"
        "from jaxconv.data.sources import open_source\n"
        "status = builder.main(['--input=chats.jsonl', '--out=sets/chats', '--shards=1'])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "source = open_source(Path('sets/chats'), 'auto', Quarantine(Path('q.jsonl')))\n"
        "assert source[0].messages[0].content == 'Hello'\n"
        "assert 'tensorflow' not in sys.modules\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "sets/chats: 1 records (Conversation) of 2 rows, format 'openai'" in done.stdout
    note = "1 row could not be read, see sets/chats.quarantine.jsonl: empty conversation 1."
    assert note in done.stdout.splitlines()
    bad = json.loads((tmp_path / "sets" / "chats.quarantine.jsonl").read_text())
    assert bad["line"] == 2 and bad["reason"] == "empty_conversation"
    assert {path.name for path in (tmp_path / "sets").iterdir()} == {
        "chats",
        "chats.quarantine.jsonl",
    }


def test_the_command_is_done_where_no_row_is_bad(tmp_path, capsys):
    write_jsonl(tmp_path / "records.jsonl", pairs(2))
    arguments = [f"--input={tmp_path / 'records.jsonl'}", f"--out={tmp_path / 'set'}"]
    assert builder.main(arguments) == 0
    assert "could not be read" not in capsys.readouterr().out
    assert not (tmp_path / "set.quarantine.jsonl").exists()


def test_refusals_of_the_command(tmp_path, capsys):
    write_jsonl(tmp_path / "records.jsonl", pairs(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "bad.jsonl").write_text("{")
    for source, out, line in (
        ("records.jsonl", "set", "is there already"),
        ("bad.jsonl", "new", "no good row of a known format"),
        ("none.jsonl", "new", "is not there"),
    ):
        arguments = [f"--input={tmp_path / source}", f"--out={tmp_path / out}"]
        assert builder.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("jaxconv: ") and line in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_without_it_the_readers_load_nothing_heavy():
    code = (
        "import sys, jaxconv.data.sources\n"
        "heavy = {'tensorflow_datasets', 'transformers', 'pyarrow', 'grain', 'jax', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
