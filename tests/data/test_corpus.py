"""What is kept apart, and the data of the controls."""

import collections
import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.conversation import Conversation, Message, PreferencePair
from jaxconv.data.corpus import (
    View,
    assistant_replies,
    chosen_conversation,
    exchange_replies,
    last_exchange,
    opening,
    shuffle_labels,
    split,
)
from jaxconv.data.sources import Source
from jaxconv.errors import Refused

SEEDS = st.integers(0, 1 << 40)


def conversation(i: int, replies: int = 2) -> Conversation:
    """User and assistant in turns; whose words they are can be read off."""
    messages = [Message("system", f"brief {i}")]
    for k in range(replies):
        messages += [Message("user", f"question {i}.{k}"), Message("assistant", f"reply {i}.{k}")]
    return Conversation(f"c{i}", (*messages, Message("user", f"thanks {i}")), {"number": i})


def pair(i: int) -> PreferencePair:
    prompt = (Message("user", f"question {i}"),)
    chosen, rejected = ((Message("assistant", f"{side} {i}"),) for side in ("good", "bad"))
    return PreferencePair(f"p{i}", prompt, chosen, rejected, {"number": i})


# ---------------------------------------------------------------- views


def test_a_view_makes_records_when_they_are_asked_for():
    made = []
    view = View("abcdef", [4, 0, 2], lambda i: made.append(i) or "abcdef"[i].upper())
    assert len(view) == 3 and not made
    assert view[1] == "A" and view[-1] == "C" and made == [0, 2]
    assert list(view) == ["E", "A", "C"] and "C" in view
    with pytest.raises(IndexError):
        view[3]


def test_a_slice_of_a_view_is_a_view():
    view = View("abcdef", range(6), "abcdef".__getitem__)
    assert isinstance(view[1:4], View)
    assert list(view[1:4]) == ["b", "c", "d"] and list(view[::-2]) == ["f", "d", "b"]
    assert list(view[4:][1:]) == ["f"] and list(view[:2][5:]) == []


# ---------------------------------------------------------------- held out


def numbers(view) -> list[int]:
    return [record.meta["number"] for record in view]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), seed=SEEDS, data=st.data())
def test_a_split_is_a_partition_in_order(n, seed, data):
    talks = [conversation(i) for i in range(n)]
    held_out = data.draw(st.integers(0, n - 1))
    validation = data.draw(st.integers(0, n - 1 - held_out))
    sizes = {"validation": validation, "held_out": held_out, "seed": seed}
    corpus = split(talks, **sizes)
    parts = [numbers(part) for part in (corpus.train, corpus.validation, corpus.held_out)]
    assert [len(part) for part in parts] == [n - validation - held_out, validation, held_out]
    assert all(part == sorted(part) for part in parts)
    assert sorted(itertools.chain(*parts)) == list(range(n))
    assert numbers(split(talks, **sizes).held_out) == parts[2]


def test_the_split_of_a_source_is_kept_with_it(tmp_path):
    class Kept(Source):
        made_of, kept, reads = {"a.jsonl": "9 bytes"}, tmp_path / "rows" / "digest", 0

        def __len__(self):
            return 12

        def __getitem__(self, i):
            type(self).reads += 1
            return conversation(i)

    def parts(seed):
        corpus = split(Kept(), validation=3, held_out=4, seed=seed)
        assert corpus.made_of == Kept.made_of
        return [
            part.indices.tolist() for part in (corpus.train, corpus.validation, corpus.held_out)
        ]

    first = parts(0)
    assert Kept.reads == 12 and list(map(len, first)) == [5, 3, 4]
    assert parts(0) == first and Kept.reads == 12
    assert parts(1) != first and Kept.reads == 24
    plain = split([conversation(i) for i in range(12)], validation=3, held_out=4, seed=0)
    assert plain.held_out.indices.tolist() == first[2] and plain.made_of == {}


def test_a_split_is_random():
    talks = [conversation(i) for i in range(50)]
    splits = [split(talks, validation=5, held_out=10, seed=seed) for seed in range(20)]
    draws = {tuple(numbers(corpus.held_out)) for corpus in splits}
    assert len(draws) == 20
    often = collections.Counter(i for drawn in draws for i in drawn)
    assert len(often) > 45  # no record is safe from it


@pytest.mark.parametrize("held_out", [2, 3])
def test_nothing_left_to_train_on_is_refused(held_out):
    said = f"held_out={held_out} and config.data.validation=1; together .* number of records, 3"
    with pytest.raises(Refused, match=said):
        split([pair(i) for i in range(3)], validation=1, held_out=held_out, seed=0)


@settings(max_examples=50, deadline=None)
@given(depths=st.lists(st.integers(1, 3), min_size=12, max_size=20), seed=SEEDS)
def test_a_talk_at_several_depths_is_in_one_part(depths, seed):
    """Records of one talk share their first question and go on to different depths."""
    talks = [
        dataclasses.replace(conversation(i, depth + 1), meta={"number": i, "depth": depth})
        for i, n in enumerate(depths)
        for depth in range(n)
    ]
    corpus = split(talks, validation=4, held_out=5, seed=seed)
    parts = [set(numbers(part)) for part in (corpus.train, corpus.validation, corpus.held_out)]
    assert sum(len(part) for part in parts) == len(depths)  # no talk is in two
    sizes = len(corpus.train), len(corpus.validation), len(corpus.held_out)
    assert sum(sizes) == len(talks) and 2 <= sizes[1] <= 4 and 3 <= sizes[2] <= 5


def test_talks_differ_in_the_system_message_or_the_first_question():
    asks = Message("user", "Where are the keys?")
    talks = [Conversation(f"c{i}", (Message("system", f"house {i}"), asks)) for i in range(2)]
    assert opening(talks[0]) != opening(talks[1])
    deeper = Conversation("d", (*talks[0].messages, Message("assistant", "Here."), asks))
    assert opening(deeper) == opening(talks[0])
    assert opening(pair(4)) == "question 4"
    assert opening(Conversation("c", (Message("assistant", "hello"),), {})) == "c"


def test_talks_that_are_larger_than_a_part_are_refused():
    talks = [dataclasses.replace(conversation(i % 2), id=f"c{i}") for i in range(12)]
    with pytest.raises(Refused, match=r"held_out=4; each of the 2 talks .* has more"):
        split(talks, validation=2, held_out=4, seed=0)


# ---------------------------------------------------------------- exchanged replies


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=12), seed=SEEDS)
def test_replies_are_those_of_another_conversation_and_all_else_stays(counts, seed):
    talks = [conversation(i, n) for i, n in enumerate(counts)]
    exchanged = exchange_replies(talks, seed)
    assert len(exchanged) == len(talks)
    partners = []
    for own, new in zip(talks, exchanged, strict=True):
        assert (new.id, new.meta) == (own.id, own.meta)
        assert [m.role for m in new.messages] == [m.role for m in own.messages]
        for before, after in zip(own.messages, new.messages, strict=True):
            assert (before == after) == (before.role != "assistant")
        (partner,) = {reply.content.split(".")[0].split()[1] for reply in assistant_replies(new)}
        assert partner != str(own.meta["number"])
        partners.append(int(partner))
        # The partner's replies in their order, from the beginning again where it has fewer.
        theirs = assistant_replies(talks[int(partner)])
        said = assistant_replies(new)
        assert said == [theirs[k % len(theirs)] for k in range(len(said))]
    assert sorted(partners) == list(range(len(talks)))  # each is the partner of one
    assert [list(exchange_replies(talks, seed)[:])] == [list(exchanged)]


def test_the_last_exchange_is_before_what_the_user_says_at_the_end():
    prompt, reply = last_exchange(conversation(3))
    assert reply.content == "reply 3.1"
    assert [m.content for m in prompt] == ["brief 3", "question 3.0", "reply 3.0", "question 3.1"]


# ---------------------------------------------------------------- shuffled labels


@given(n=st.integers(0, 30), seed=SEEDS)
def test_half_of_the_labels_are_exchanged(n, seed):
    pairs = [pair(i) for i in range(n)]
    shuffled = shuffle_labels(pairs, seed)
    swapped = 0
    for own, new in zip(pairs, shuffled, strict=True):
        assert (new.id, new.prompt, new.meta) == (own.id, own.prompt, own.meta)
        swapped += new.chosen == own.rejected
        assert {new.chosen, new.rejected} == {own.chosen, own.rejected}
    assert swapped == n // 2
    assert list(shuffle_labels(pairs, seed)) == list(shuffled)
    for one, other in zip(shuffled, shuffle_labels(pairs, seed, opposite=True), strict=True):
        assert (one.chosen, one.rejected) == (other.rejected, other.chosen)


def test_which_labels_are_exchanged_is_random():
    pairs = [pair(i) for i in range(20)]
    patterns = {tuple(p.chosen[0].content[0] for p in shuffle_labels(pairs, s)) for s in range(10)}
    assert len(patterns) == 10


def test_the_chosen_reply_ends_its_conversation():
    found = chosen_conversation(pair(7))
    assert [(m.role, m.content) for m in found.messages] == [
        ("user", "question 7"),
        ("assistant", "good 7"),
    ]
    assert (found.id, found.meta) == ("p7", {"number": 7})
