"""Files as sequences: every row is a record or in quarantine, wherever it lies."""

import concurrent.futures
import gzip
import json
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.conversation import Conversation, Message, PreferencePair, to_row, write_jsonl
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.data.rows import Rows
from jaxconv.data.sources import open_source
from jaxconv.errors import Refused

DATA = Path(os.environ.get("JAXCONV_DATA", Path(__file__).parents[3] / "shared" / "data"))


def chat(i, words="Hello"):
    messages = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": words}]
    return {"messages": messages, "n": i}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "work" / "quarantine.jsonl")


def kept(quarantine):
    return [json.loads(line) for line in quarantine.path.read_text().splitlines()]


def test_records_are_read_in_order_and_at_random(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(*map(chat, range(50)), chat(50, "ö\u2028\x85")))
    source = open_source(path, "openai", quarantine)
    assert (len(source), source.rows, source.kind) == (51, 51, Conversation)
    assert [record.meta["n"] for record in source] == list(range(51))
    assert source[7].id == "chats.jsonl:8" and source[-1].messages[1].content == "ö\u2028\x85"
    with pytest.raises(IndexError):
        source[51]
    assert not quarantine.path.exists() and quarantine.notes("") == []


def test_bad_rows_are_kept_with_the_reason(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl"
    silent = {"messages": [{"role": "user", "content": "1?"}]}
    path.write_bytes(
        lines(chat(0))
        + b"\n \n"
        + b'{"messages": "\xff"}\n'
        + b"{]\r\n"
        + lines(silent, chat(1), 7, chat(2) | {"messages": []})
        + lines(chat(3))[:-9]
    )
    source = open_source(path, "openai", quarantine)
    assert [record.meta["n"] for record in source] == [0, 1]
    assert (source.rows, len(quarantine)) == (8, 6)
    assert quarantine.counts == {
        "invalid_utf8": 1,
        "invalid_json": 1,
        "no_assistant_message": 1,
        "wrong_type": 1,
        "empty_conversation": 1,
        "torn_last_line": 1,
    }
    rows = kept(quarantine)
    assert [row["line"] for row in rows] == [4, 5, 6, 8, 9, 10]
    assert {row["file"] for row in rows} == {str(path)}
    assert rows[0]["row"] == '{"messages": "\\xff"}\n'
    assert json.loads(rows[2]["row"]) == silent and rows[2]["field"] == "messages"
    (note,) = quarantine.notes("bad/rows.jsonl")
    assert (
        note.startswith("6 rows could not be read, see bad/rows.jsonl: ")
        and "torn last line 1" in note
    )


def test_a_last_line_without_a_newline_is_as_good_as_any(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(chat(0), chat(1))[:-1])
    assert len(open_source(path, "openai", quarantine)) == 2


def test_a_file_with_nothing_good_is_refused(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines({"messages": []}, {"messages": 3}))
    line = r"none of 2 rows is good as 'openai'; first .*chats\.jsonl, line 1, messages: it has no"
    with pytest.raises(Refused, match=line):
        open_source(path, "openai", quarantine)
    path.write_bytes(b"\n\n")
    for format in ("openai", "auto"):
        with pytest.raises(Refused, match=r"chats\.jsonl has no rows"):
            open_source(path, format, quarantine)


def test_what_cannot_be_opened_is_refused_by_name(tmp_path, quarantine):
    with pytest.raises(Refused, match=r"format 'alpaca'; it must be one of auto, jaxconv, sotopia"):
        open_source(tmp_path, "alpaca", quarantine)
    with pytest.raises(Refused, match="there is not there"):
        open_source(tmp_path / "there", "auto", quarantine)
    with pytest.raises(Refused, match=r"holds no file whose name ends with \.jsonl, \.jsonl\.gz"):
        open_source(tmp_path, "auto", quarantine)
    for name, content, line in (
        ("a.txt", b"", "its name must end with"),
        ("a.json", b"{}", "holds a dict; a .json file must be an array"),
        ("b.json", lines(1, 2), "is not JSON"),
        ("a.jsonl.gz", b"plain", "is not a gzip file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=line) as refused:
            open_source(tmp_path / name, "openai", quarantine)
        assert name in str(refused.value)
    assert not list((tmp_path / "work").rglob("*.partial"))


def test_zipped_arrays_and_folders(tmp_path, quarantine):
    folder = tmp_path / "chats"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(chat(0), chat(1), 3)))
    (folder / "b.json").write_text(json.dumps([chat(2), None, chat(3)], indent=1))
    (folder / "c.jsonl").write_bytes(lines(chat(4)))
    (folder / "more" / "d.jsonl").write_bytes(lines(chat(5)))
    (folder / ".hidden.jsonl").write_bytes(b"{")
    (folder / "README.md").write_text("about")
    for _ in range(2):  # the second time from what the first one wrote
        source = open_source(folder, "auto", quarantine)
        assert source.format == "openai"
        assert [record.meta["n"] for record in source] == list(range(6))
        assert [record.id for record in source][2:4] == ["b.json:1", "b.json:3"]
        assert len(list((tmp_path / "work" / "rows").glob("*.jsonl"))) == 2
    rows = kept(quarantine)[:2]
    assert [(Path(row["file"]).name, row["line"]) for row in rows] == [
        ("a.jsonl.gz", 3),
        ("b.json", 2),
    ]


def test_what_a_pass_writes_is_not_read_by_the_next(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(chat(0), 3)))
    for _ in range(2):
        source = open_source(tmp_path, "openai", Quarantine(tmp_path / "quarantine.jsonl"))
        assert (len(source), source.rows) == (1, 2)


def test_half_of_a_zipped_file_is_read_and_said_to_be_half(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl.gz"
    rng = random.Random(0)
    rows = [chat(i, rng.randbytes(40).hex()) for i in range(400)]
    whole = gzip.compress(lines(*rows))
    path.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        source = open_source(path, "openai", quarantine)
        assert 50 < len(source) < 400
        assert [record.meta["n"] for record in source] == list(range(len(source)))
    assert quarantine.counts["damaged_file"] == 2
    assert len(source) + len(quarantine) // 2 == source.rows


def test_tables(tmp_path, quarantine, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from datetime import UTC, datetime

    from pyarrow import parquet

    rows = [
        {"conversation_hash": "a", "timestamp": datetime(2023, 4, 9, tzinfo=UTC)}
        | {"conversation": chat(0)["messages"], "toxic": False}
    ]
    path = tmp_path / "chats.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (record,) = open_source(path, "auto", quarantine)
    assert record.id == "a" and record.meta["timestamp"] == "2023-04-09T00:00:00+00:00"

    (tmp_path / "bad.parquet").write_bytes(b"PAR")
    with pytest.raises(Refused, match=r"bad\.parquet is not a parquet file"):
        open_source(tmp_path / "bad.parquet", "auto", quarantine)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Refused, match=r"bad\.parquet needs pyarrow"):
        open_source(tmp_path / "bad.parquet", "auto", quarantine)


def samples():
    """A row of each format."""
    reply = {"role": "assistant", "content": "Hello"}
    other = reply | {"content": "No"}
    conversation = Conversation("a", (Message("user", "Hi"), Message("assistant", "Hello")))
    pair = PreferencePair("p", (), (Message("assistant", "a"),), (Message("assistant", "b"),))
    brief = [["Environment", "Ann", "You are Ann."]]
    return [
        ("openai", chat(0)),
        ("jaxconv", to_row(conversation)),
        ("jaxconv", to_row(pair)),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "Hello"}]}),
        ("wildchat", {"conversation_hash": "a", "conversation": [reply]}),
        (
            "sotopia",
            {"environment": "e", "agents": [], "messages": [brief, [["Ann", "Environment", "Hi"]]]},
        ),
        ("rated", {"block": {"1": ["SYSTEM", "Hello", "", "4"]}}),
        ("preference", {"chosen": [reply], "rejected": [other]}),
        ("completion", {"prompt": "Hi", "completion": "Hello"}),
        ("hh_rlhf", {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}),
    ]


@pytest.mark.parametrize(("name", "row"), samples())
def test_the_format_is_that_of_the_first_good_row(name, row, tmp_path, quarantine, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" + lines({"messages": "?"}, row))
    with caplog.at_level("INFO"):
        source = open_source(path, "auto", quarantine)
    assert source.format == name and f"'{name}'" in caplog.text
    assert len(source) == 1 and len(quarantine) == 2
    assert {n for n, _ in samples()} == set(FORMATS)


def test_a_format_that_nobody_knows_is_refused_with_the_fields(tmp_path, quarantine):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines({"question": "2+2", "answer": "4"}))
    with pytest.raises(
        Refused, match=r"known format \(jaxconv, .*line 1.*fields: answer, question"
    ):
        open_source(path, "auto", quarantine)


def test_records_of_one_source_are_of_one_kind(tmp_path, quarantine):
    path = tmp_path / "rows.jsonl"
    rows = [row for name, row in samples() if name == "jaxconv"]
    path.write_bytes(lines(*rows))
    source = open_source(path, "jaxconv", quarantine)
    assert source.kind is Conversation and quarantine.counts == {"mixed_kinds": 1}


def test_views_of_an_episode_are_records_of_their_own(tmp_path, quarantine):
    path = tmp_path / "episodes.jsonl"
    brief = [["Environment", name, f"You are {name}."] for name in ("Ann", "Bob")]
    said = [[name, "Environment", f'said: "I am {name}."'] for name in ("Ann", "Bob")]
    row = {"environment": "e", "agents": [], "messages": [brief, said]}
    path.write_bytes(lines(row, row))
    source = open_source(path, "sotopia", quarantine)
    assert (len(source), source.rows) == (4, 2)
    assert [record.meta["agent"] for record in source] == ["Ann", "Bob"] * 2
    assert source[3].messages[-1] == Message("assistant", "I am Bob.")


def test_a_file_that_changes_under_the_run_is_refused(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(chat(0), chat(1)))
    source = open_source(path, "openai", quarantine)
    path.write_bytes(lines(chat(1), chat(0), chat(2)))
    with pytest.raises(Refused, match=r"chats\.jsonl has changed since it was opened"):
        source[0]


def test_threads_and_grain_read_the_same_records(tmp_path, quarantine):
    grain = pytest.importorskip("grain")
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(*(chat(i, "Hello " * (i % 7 + 1)) for i in range(300))))
    source = open_source(path, "openai", quarantine)
    order = random.Random(0).sample(range(300), 300)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [r.meta["n"] for r in pool.map(source.__getitem__, order)] == order
    dataset = grain.MapDataset.source(source).map(lambda record: record.meta["n"])
    assert list(dataset.to_iter_dataset()) == list(range(300))


def test_a_new_pass_begins_a_new_quarantine(tmp_path, quarantine):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"{\n" + lines(chat(0)))
    for _ in range(2):
        again = Quarantine(quarantine.path)
        open_source(path, "openai", again)
        assert len(kept(again)) == len(again) == 1


@pytest.mark.parametrize("format", ["openai", "auto"])
def test_files_that_are_as_they_were_are_not_gone_through_again(tmp_path, monkeypatch, format):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"{\n" + lines(*map(chat, range(9)), {"messages": []}))
    place = tmp_path / "work" / "quarantine.jsonl"
    first, bad = open_source(path, format, Quarantine(place)), place.read_bytes()
    passes = []
    read = Rows.__iter__
    monkeypatch.setattr(Rows, "__iter__", lambda rows: passes.append(rows.name) or read(rows))
    quarantine = Quarantine(place)
    again = open_source(path, format, quarantine)
    assert not passes and list(again) == list(first) and place.read_bytes() == bad
    assert (again.format, again.kind, again.rows) == ("openai", Conversation, 11)
    assert quarantine.counts == {"invalid_json": 1, "empty_conversation": 1}
    with path.open("ab") as file:
        file.write(lines(chat(9)))
    quarantine = Quarantine(place)
    other = open_source(path, format, quarantine)
    assert set(passes) == {path} and [r.meta["n"] for r in other] == list(range(10))
    assert len(quarantine) == 2 and other.kept != first.kept


def test_half_of_an_index_is_made_anew(tmp_path, monkeypatch, quarantine):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(*map(chat, range(5))))

    def killed(partial, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jaxconv.data.sources.publish", killed)
        open_source(path, "openai", quarantine)
    assert len(open_source(path, "openai", quarantine)) == 5


DAMAGE = {
    "nothing": lambda rng, line: line,
    "a byte": lambda rng, line: (
        line[: (k := rng.randrange(len(line)))]
        + rng.randbytes(1).replace(b"\n", b"!")
        + line[k + 1 :]
    ),
    "its end": lambda rng, line: line[: rng.randrange(1, len(line))],
    "a role": lambda rng, line: line.replace(b'"role"', b'"Role"'),
    "a type": lambda rng, line: line.replace(b'"Hello"', b"4"),
    "no object": lambda rng, line: b"[" + line + b"]",
    "blank": lambda rng, line: b"  ",
}


@given(st.lists(st.sampled_from(sorted(DAMAGE)), max_size=12), st.booleans(), st.integers(0, 999))
@settings(deadline=None)
def test_every_row_of_a_damaged_file_is_good_or_in_quarantine(
    tmp_path_factory, damages, newline, seed
):
    folder = tmp_path_factory.mktemp("damaged")
    rng = random.Random(seed)
    rows = [lines(chat(i))[:-1] for i in range(len(damages))]
    found = [DAMAGE[damage](rng, row) for damage, row in zip(damages, rows, strict=True)]
    content = b"\n".join([lines(chat(-1))[:-1], *found]) + (b"\n" if newline else b"")
    (folder / "chats.jsonl").write_bytes(content)
    quarantine = Quarantine(folder / "quarantine.jsonl")
    source = open_source(folder / "chats.jsonl", "openai", quarantine)
    rows = [row for row in content.split(b"\n") if row.strip()]
    assert len(source) + len(quarantine) == source.rows == len(rows)
    if quarantine.counts:
        entries = kept(quarantine)
        assert len(entries) == len(quarantine)
        assert all(entry["reason"] and entry["line"] >= 2 for entry in entries)
    good = {-1, *(i for i, damage in enumerate(damages) if damage == "nothing")}
    assert good <= {record.meta.get("n") for record in source}


@pytest.mark.skipif(not (DATA / "hh_rlhf").is_dir(), reason="no hh_rlhf in JAXCONV_DATA")
def test_all_2312_pairs_of_hh_rlhf_load(quarantine):
    with gzip.open(DATA / "hh_rlhf" / "harmless-base_test.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    source = open_source(DATA / "hh_rlhf", "auto", quarantine)
    assert len(source) == source.rows == len(rows) == 2312 and not quarantine.counts
    assert source.format == "hh_rlhf" and source.kind is PreferencePair
    names = {"user": "Human", "assistant": "Assistant"}
    for row, pair in zip(rows, source, strict=True):
        # Every character is in the words or is markup.
        for key in ("chosen", "rejected"):
            turns = [(names[m.role], m.content) for m in (*pair.prompt, *getattr(pair, key))]
            assert "".join(f"\n\n{name}: {words}" for name, words in turns) == row[key]
        assert pair.prompt[-1].role == "user"
    answers = [(len(pair.chosen), len(pair.rejected)) for pair in source]
    assert {n: answers.count(n) for n in set(answers)} == {(1, 1): 2307, (2, 1): 4, (1, 2): 1}
    assert sum(not pair.chosen[-1].content for pair in source) == 4


def test_own_records_come_back(tmp_path, quarantine):
    pair = PreferencePair("p", (), (Message("assistant", "a"),), (Message("assistant", ""),))
    write_jsonl(tmp_path / "pairs.jsonl", [pair, pair])
    assert list(open_source(tmp_path / "pairs.jsonl", "auto", quarantine)) == [pair, pair]
