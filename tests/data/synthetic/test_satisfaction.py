"""The world of satisfied and dissatisfied users: what was planted is what can be found."""

import collections
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxconv.data.synthetic.satisfaction import (
    DISSATISFIED,
    HABITS,
    NOISE,
    SATISFIED,
    ceiling,
    conversations,
    word_list,
)
from jaxconv.data.synthetic.satisfaction.generator import odds
from jaxconv.data.synthetic.satisfaction.language import LANGUAGES


def test_seeds_make_conversations_and_ranges_meet_nowhere():
    assert conversations(3, 4) == conversations(2, 6)[1:5]
    talks = conversations(0, 300)
    assert len({talk.id for talk in talks}) == 300
    assert len({tuple(m.content for m in talk.messages) for talk in talks}) > 295


@given(st.integers(0, 10**6), st.booleans())
def test_speakers_take_turns_and_every_slot_is_filled(seed, held_out):
    (talk,) = conversations(seed, 1, held_out=held_out)
    roles = [message.role for message in talk.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert all(m.content and "{" not in m.content for m in talk.messages)
    assert set(talk.meta["causes"]) <= {*SATISFIED, *DISSATISFIED}
    assert len(set(talk.meta["causes"])) == len(talk.meta["causes"])


@pytest.mark.parametrize("noise", NOISE.values())
def test_who_knows_the_causes_reaches_the_ceiling_and_no_more(noise):
    n = 8000
    right = 0.0
    for talk in conversations(0, n, noise=noise):
        lean = odds(talk.meta["causes"], noise)
        right += 0.5 if lean == 0 else (lean > 0) == (talk.meta["label"] == "sat")
    # Three standard errors of a proportion.
    assert right / n == pytest.approx(ceiling(noise), abs=3 * 0.5 / n**0.5)


def test_the_ceiling_falls_with_noise_to_chance():
    assert ceiling(0.5) == pytest.approx(0.5)
    assert ceiling(0.0) == pytest.approx(1 - 0.15 / 2)  # who shows nothing is anybody's guess
    assert all(a > b for a, b in itertools.pairwise(ceiling(n) for n in NOISE.values()))


def test_users_of_a_domain_have_their_habits_whatever_their_label():
    for label in ("sat", "dsat"):
        for domain, habits in HABITS.items():
            shown = [
                cause in habits
                for talk in conversations(0, 4000)
                if talk.meta["domain"] == domain and talk.meta["label"] == label
                for cause in talk.meta["causes"]
            ]
            # Two of the six causes of each side twelve times as often, none of them twice.
            assert 0.7 < sum(shown) / len(shown) < 0.9


def test_labels_and_languages_have_their_shares():
    talks = conversations(0, 4000)
    labels = collections.Counter(talk.meta["label"] for talk in talks)
    assert labels["sat"] / 4000 == pytest.approx(0.5, abs=0.03)
    spoken = collections.Counter(talk.meta["language"] for talk in talks)
    for code, language in LANGUAGES.items():
        assert spoken[code] / 4000 == pytest.approx(language.share, abs=0.03)


def test_a_cause_stands_in_the_conversation_in_one_of_its_ways():
    for talk in conversations(0, 400):
        said = [m.content for m in talk.messages if m.role == "user"]
        for cause in talk.meta["causes"]:
            if cause != "repetition":
                language = LANGUAGES[talk.meta["language"]]
                ways = (*language.causes[cause], *language.either)
                assert any(text.startswith(way) for text in said[1:] for way in ways)


@pytest.mark.parametrize("noise", NOISE.values())
def test_a_list_of_all_words_of_all_causes_stays_below_the_ceiling(noise):
    right, n = 0.0, 4000
    for talk in conversations(0, n, noise=noise):
        lean = word_list([m.content for m in talk.messages if m.role == "user"])
        right += 0.5 if lean == 0 else (lean > 0) == (talk.meta["label"] == "sat")
    # Five standard errors of a proportion below, and better than guessing.
    assert 0.55 < right / n < ceiling(noise) - 5 * 0.5 / n**0.5


def test_what_both_sides_say_is_told_apart_by_the_answer_before():
    words = tuple(way for language in LANGUAGES.values() for way in language.either)
    evasive = re.compile(
        "|".join(
            re.escape(way).replace(re.escape("{topic}"), ".+")
            for language in LANGUAGES.values()
            for way in language.evasive
        ),
        re.I,
    )
    met = collections.Counter()
    for talk in conversations(0, 1500):
        sides = {c in SATISFIED for c in talk.meta["causes"] if c != "repetition"}
        if len(sides) != 1:  # which cause it is cannot be told from here
            continue
        (satisfied,) = sides
        for before, said in itertools.pairwise(m.content for m in talk.messages):
            if said.startswith(words):
                met[satisfied, evasive.fullmatch(before) is not None] += 1
    assert set(met) == {(True, False), (False, True)} and min(met.values()) > 100


def test_some_ways_are_said_in_held_out_conversations_alone():
    ways = {
        way
        for language in LANGUAGES.values()
        for one in language.causes.values()
        for way in one[2::3]
    }

    def heard(talks):
        return {way for talk in talks for m in talk.messages for way in ways if way in m.content}

    assert not heard(conversations(0, 1500))
    assert len(heard(conversations(0, 1500, held_out=True))) > len(ways) / 2


def test_noise_has_bounds():
    with pytest.raises(ValueError, match=r"noise=0\.7; it may be from 0 to 0\.5"):
        conversations(0, 1, noise=0.7)
