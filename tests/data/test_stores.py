"""Token stores of a run: each record encoded once, found again, accounted for."""

import dataclasses
import json
import re
import resource
from collections.abc import Sequence

import numpy as np
import pytest

from jaxconv.data.conversation import Conversation, Message, PreferencePair
from jaxconv.data.examples import encode, encode_pair
from jaxconv.data.stores import Stores
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused

template = take_apart(train_tokenizer(["how are you today? fine, and you?"] * 5, 300))
WIDTH = 48


def conversation(i: int, exchanges: int = 1, words: str = "ab") -> Conversation:
    turn = (Message("user", words), Message("assistant", f"{i}"))
    return Conversation(f"c{i}", turn * exchanges, {})


def pair(i: int, chosen: int = 4, rejected: int = 4, prompt: int = 4) -> PreferencePair:
    """A pair whose messages have so many words of a token each."""
    first, second = ((Message("assistant", x * n),) for x, n in (("x", chosen), ("y", rejected)))
    return PreferencePair(f"p{i}", (Message("user", "z" * prompt),), first, second, {})


@dataclasses.dataclass
class Read(Sequence):
    """Records that count how often they are read."""

    records: list
    times: int = 0

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        self.times += i < len(self.records)
        return self.records[i]


def stores(folder, policy="truncate_left", width=WIDTH, **changed) -> Stores:
    given = {"template": template, "max_length": width, "policy": policy} | changed
    return Stores(folder, **given)


def assert_streams(store, examples):
    assert len(store) == len(examples)
    for found, expected in zip((store[i] for i in range(len(store))), examples, strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.mask, b.mask)


def test_a_store_holds_what_the_template_makes_of_each_record(tmp_path):
    talks = [conversation(i) for i in range(5)]
    found = stores(tmp_path).conversations("train", talks)
    assert_streams(
        found, [encode(t, template, max_length=WIDTH, policy="refuse")[0] for t in talks]
    )
    pairs = [pair(i) for i in range(5)]
    found = stores(tmp_path).pairs("pairs", pairs)
    encoded = [encode_pair(p, template, max_length=WIDTH, policy="refuse")[0] for p in pairs]
    assert_streams(found, [(p.chosen, p.rejected) for p in encoded])
    assert found.record.tolist() == [0, 1, 2, 3, 4]


def test_a_second_object_finds_them_and_encodes_nothing(tmp_path):
    talks, pairs = Read([conversation(i) for i in range(5)]), Read([pair(i) for i in range(5)])
    first = stores(tmp_path)
    made = first.conversations("train", talks), first.pairs("pairs", pairs)
    assert (talks.times, pairs.times) == (5, 5)
    second = stores(tmp_path)
    again = second.conversations("train", talks), second.pairs("pairs", pairs)
    assert (talks.times, pairs.times) == (5, 5)
    for a, b in zip(made, again, strict=True):
        assert_streams(b, [a[i] for i in range(5)])
        assert a.counts == b.counts and a.record.tolist() == b.record.tolist()


def test_a_store_of_other_data_is_refused_by_name_with_what_changed(tmp_path):
    talks = [conversation(i) for i in range(5)]
    before, now = {"a.jsonl": "9 bytes"}, {"a.jsonl": "10 bytes"}
    stores(tmp_path, made_of=before).conversations("train", talks)
    stores(tmp_path, made_of=before).conversations("train", talks)
    said = (
        f"store {tmp_path / 'train'} was made of other data: a.jsonl was 9 bytes and is 10 bytes; "
        "--overwrite starts anew"
    )
    with pytest.raises(Refused, match=re.escape(said)):
        stores(tmp_path, made_of=now).conversations("train", talks)


def test_a_store_of_another_template_or_tokenizer_is_refused(tmp_path):
    talks = [conversation(i) for i in range(5)]
    stores(tmp_path).conversations("train", talks)
    words = ["how are you today? fine, and you?"] * 5
    other = train_tokenizer(words, 263)
    with pytest.raises(Refused, match="made of other data: the tokenizer was sha256 "):
        stores(tmp_path, template=take_apart(other)).conversations("train", talks)
    again = train_tokenizer(words, 300)  # the very same, made once more
    stores(tmp_path, template=take_apart(again)).conversations("train", talks)
    again.chat_template = again.chat_template.replace("<|user|>", "<|assistant|>") + "{# mine #}"
    with pytest.raises(Refused, match="made of other data: its chat template was sha256 "):
        stores(tmp_path, template=take_apart(again)).conversations("train", talks)


def test_a_store_that_does_not_say_what_it_was_made_of_is_taken(tmp_path):
    talks = [conversation(i) for i in range(5)]
    stores(tmp_path).conversations("train", talks)
    about = json.loads((tmp_path / "train" / "store.json").read_text())
    del about["made_of"], about["ids"]
    (tmp_path / "train" / "store.json").write_text(json.dumps(about))
    assert len(stores(tmp_path, made_of={"a": "b"}).conversations("train", talks)) == 5


def test_half_of_a_store_is_made_anew(tmp_path):
    class Killed(Exception):
        pass

    class Torn(Read):
        def __getitem__(self, i):
            if i == 3:
                raise Killed
            return super().__getitem__(i)

    with pytest.raises(Killed):
        stores(tmp_path).conversations("train", Torn([conversation(i) for i in range(5)]))
    assert not (tmp_path / "train").exists()
    assert len(stores(tmp_path).conversations("train", [conversation(i) for i in range(5)])) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_full_disk_is_an_error_and_leaves_no_store(tmp_path):
    talks = [conversation(i) for i in range(200)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            stores(tmp_path).conversations("train", talks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "train").exists()
    store = stores(tmp_path).conversations("train", talks)
    assert len(store) == 200 and len(store.tokens) == len(store.mask) == store.lengths.sum()


LONG = [conversation(0), conversation(1, exchanges=9), conversation(2, words="ab" * 40)]


@pytest.mark.parametrize(
    ("policy", "records", "outcomes"),
    [
        ("truncate_left", {0, 1}, {"truncated": ["c1"], "left_out": ["c2"]}),
        ("split", {0, 1}, {"split": ["c1"], "left_out": ["c2"]}),
        ("leave_out", {0}, {"left_out": ["c1", "c2"]}),
    ],
)
def test_every_record_is_accounted_for(policy, records, outcomes, tmp_path):
    made = stores(tmp_path, policy)
    store = made.conversations("train", LONG)
    assert set(store.record.tolist()) == records
    assert store.lengths.max() <= WIDTH
    if policy == "split":
        learned = sum(int(e.mask.sum()) for i in range(1, len(store)) for e in store[i])
        whole, _ = encode(LONG[1], template, max_length=10**4, policy="refuse")
        assert len(store) > 2 and learned == whole[0].mask.sum()  # each turn once
    found = made.outcomes()
    for outcome, ids in outcomes.items():
        assert found[outcome]["stores"] == {"train": {"count": len(ids), "of": 3, "ids": ids}}
        assert "longer than config.batch.width=48 tokens" in found[outcome]["why"]
    assert found.keys() == outcomes.keys() and "whole" not in found
    assert ("one exchange" in found["left_out"]["why"]) == (policy != "leave_out")
    again = stores(tmp_path, policy)
    again.conversations("train", LONG)
    assert again.outcomes() == found


def test_one_line_tells_of_all_stores_and_names_the_first_records(tmp_path):
    made = stores(tmp_path)
    many = [conversation(i, words="ab" * 40) for i in range(7)]
    made.conversations("train", [*LONG, *many])
    made.conversations("held_out", [conversation(7), conversation(8, exchanges=9)])
    assert made.notes("artifacts/records.json") == [
        "Truncated (longer than config.batch.width=48 tokens, so their oldest exchanges were "
        "dropped): train 1 of 10, held_out 1 of 2; ids c1, c8, see artifacts/records.json.",
        "Left out (longer than config.batch.width=48 tokens even when cut down to one exchange): "
        "train 8 of 10; ids c2, c0, c1, …, see artifacts/records.json.",
    ]


def test_of_very_many_records_not_all_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxconv.data.stores.IDS", 2)
    made = stores(tmp_path)
    made.conversations("train", [conversation(0), *[LONG[2]] * 5])
    assert made.outcomes()["left_out"]["stores"]["train"] == {
        "count": 5,
        "of": 6,
        "ids": ["c2", "c2"],
    }


def test_nothing_is_noted_where_all_are_whole(tmp_path):
    made = stores(tmp_path)
    made.conversations("train", LONG[:1])
    assert made.outcomes() == {} and made.notes("records.json") == []


def test_a_long_record_is_refused_by_name_where_that_is_asked_for(tmp_path):
    with pytest.raises(Refused, match=r"conversation 'c1' has \d+ tokens; at most 48"):
        stores(tmp_path, "refuse").conversations("train", LONG)
    with pytest.raises(Refused, match=r"pair 'p0' has \d+ tokens; at most 48"):
        stores(tmp_path, "refuse").pairs("pairs", [pair(0, chosen=WIDTH)])
    assert not list(tmp_path.glob("[!.]*"))


def test_a_store_without_examples_is_refused_with_what_became_of_them(tmp_path):
    with pytest.raises(Refused, match=r"train: no example is left of 2 records \(2 left out\); "):
        stores(tmp_path, "leave_out").conversations("train", LONG[1:])
    # The same again, when the empty store is found.
    with pytest.raises(Refused, match=r"config\.batch\.width=48 may be too small"):
        stores(tmp_path, "leave_out").conversations("train", LONG[1:])


@pytest.mark.parametrize("policy", ["truncate_left", "split", "leave_out", "refuse"])
def test_derived_pairs_lie_in_rows_of_their_own_and_refuse_nobody(policy, tmp_path):
    # Two streams of 30 share no row of 48, but each has one; a stream of 70 has none, though it
    # and its short partner are not longer than two rows together.
    pairs = [pair(0, 20, 20), pair(1, 60, 2), pair(2, 2, 60), pair(3, 60, 60), pair(4)]
    made = stores(tmp_path, policy)
    store = made.pairs("choice", pairs, derived=True)
    assert store.record.tolist() == [0, 4]
    assert store.stream_lengths.max() <= WIDTH < store.lengths[0]
    left_out = made.outcomes()["left_out"]["stores"]["choice"]
    assert left_out == {"count": 3, "of": 5, "ids": ["p1", "p2", "p3"]}


def test_derived_conversations_refuse_nobody(tmp_path):
    store = stores(tmp_path, "refuse").conversations("exchanged", LONG, derived=True)
    assert store.record.tolist() == [0]
