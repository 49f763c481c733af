"""Every sentence that can be said means what was to be said."""

import random
from itertools import product

import pytest

from jaxconv.envs.bargaining.language import (
    ABOUT,
    FIXED,
    MINE,
    TERMS,
    YOURS,
    Act,
    brief,
    environment,
    join,
    plural,
    profile,
    say_about,
    say_offer,
    say_share,
)
from jaxconv.envs.bargaining.parser import understand
from jaxconv.envs.bargaining.scenario import ISSUES, ITEMS, OPTIONS, POINTS, Setting, draw

POOL = Setting("division", ("Ann", "Bob"), ITEMS, (2, 1, 4))
TABLE = Setting("terms", ("Ann", "Bob"), ISSUES[:3], ())


def shares(counts):
    return product(*(range(count + 1) for count in counts))


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_sentences_mean_their_act(kind):
    for text in FIXED[kind]:
        for said in (text, text.upper(), f"  {text} ", text.rstrip(".?")):
            heard = understand(POOL, 0, said)
            assert heard.reason is None and heard.acts == (Act(kind),), said


def test_sentences_of_different_acts_are_different():
    said = [text for texts in FIXED.values() for text in texts]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("kind", ["most", "least"])
def test_sentences_about_topics(kind):
    for frame, (topic, count) in product(ABOUT[kind], zip(POOL.topics, POOL.counts, strict=True)):
        assert understand(POOL, 0, frame.format(plural(topic, count))).acts == (Act(kind, topic),)
    for frame, topic in product(ABOUT[kind], TABLE.topics):
        assert understand(TABLE, 0, frame.format(topic)).acts == (Act(kind, topic),)


def test_sentences_about_limits():
    for number in range(POINTS + 1):
        for seed in range(20):
            said = say_about("limit", POOL, number, random.Random(seed))
            assert understand(POOL, 0, said).acts == (Act("limit", number),)


@pytest.mark.parametrize("seat", [0, 1])
def test_every_share_in_every_frame_is_the_offer(seat):
    rng = random.Random(0)
    for share in shares(POOL.counts):
        rest = tuple(whole - part for whole, part in zip(POOL.counts, share, strict=True))
        for frame in MINE:
            heard = understand(POOL, seat, frame.format(say_share(share, POOL.counts, rng)))
            assert heard.acts == (Act("propose", (share, rest) if seat == 0 else (rest, share)),)
        for frame in YOURS:
            heard = understand(POOL, seat, frame.format(say_share(share, POOL.counts, rng)))
            assert heard.acts == (Act("propose", (rest, share) if seat == 0 else (share, rest)),)


def test_every_option_in_every_frame_is_the_offer():
    for offer in product(range(len(OPTIONS)), repeat=3):
        for frame in TERMS:
            before = [f"{OPTIONS[o]} {t}" for o, t in zip(offer, TABLE.topics, strict=True)]
            after = [f"{t} {OPTIONS[o]}" for o, t in zip(offer, TABLE.topics, strict=True)]
            for parts in (before, after, after[::-1]):
                heard = understand(TABLE, 1, frame.format(join(parts)))
                assert heard.acts == (Act("propose", offer),)


@pytest.mark.parametrize("players", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["division", "terms"])
def test_said_offers_are_understood_for_any_number(players, kind):
    rng = random.Random(players)
    for seed in range(200):
        scenario = draw(seed, (players,), (kind,), (3, 5))
        setting = scenario.setting
        if kind == "terms":
            offer = tuple(rng.randrange(3) for _ in setting.topics)
        else:
            parts = [[0] * len(ITEMS) for _ in range(players)]
            for topic, count in enumerate(setting.counts):
                for _ in range(count):
                    parts[rng.randrange(players)][topic] += 1
            offer = tuple(map(tuple, parts))
        seat = rng.randrange(players)
        said = say_offer(setting, seat, offer, rng, rng.randrange(9), rng.random())
        heard = understand(setting, seat, said)
        assert heard.reason is None and heard.acts == (Act("propose", offer),), said


@pytest.mark.parametrize("kind", ["division", "terms"])
def test_brief_holds_every_number_its_agent_needs_and_no_other(kind):
    for seed in range(50):
        scenario = draw(seed, (3,), (kind,), (3, 5))
        own = scenario.private[1]
        text = brief(scenario, 1)
        numbers = [
            int(word) for word in text.replace(",", " ").replace(".", " ").split() if word.isdigit()
        ]
        assert numbers == [*own.values, own.limit]
        assert len(text.split()) <= 30


def test_brief_with_rules_gives_examples_that_are_understood():
    for seed in range(50):
        scenario = draw(seed, (2, 3), ("division", "terms"), (3, 5))
        text = brief(scenario, 0, rules=True)
        assert text.startswith(brief(scenario, 0))
        for example in text.split('"')[1::2]:
            assert understand(scenario.setting, 0, example).reason is None, example


def test_profiles_have_the_shape_of_sotopia():
    scenario = draw(3, (3,), ("division",), (3, 5))
    someone, where = profile(scenario, 2), environment(scenario)
    assert someone.first_name == scenario.setting.agents[2]
    assert str(scenario.private[2].limit) in someone.secret
    assert where.relationship == 1 and len(where.agent_goals) == 3
    assert where.codename == "bargaining_division_3"
