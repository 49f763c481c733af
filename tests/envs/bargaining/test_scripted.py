"""Scripts speak well, keep their limits, differ in temper."""

from statistics import mean

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxconv.data.conversation import Message
from jaxconv.envs import make, play
from jaxconv.envs.bargaining import (
    HELD_OUT,
    TEMPERAMENTS,
    TRAINING,
    scripted_corpus,
    scripted_player,
)
from jaxconv.envs.bargaining.language import ABOUT, FIXED
from jaxconv.envs.bargaining.parser import MAX_CHARACTERS
from jaxconv.envs.bargaining.rules import replay
from jaxconv.envs.bargaining.scenario import draw, utility
from jaxconv.errors import Refused

EVERY = tuple(TEMPERAMENTS)


@pytest.mark.parametrize("kind", ["division", "terms"])
@pytest.mark.parametrize("players", [2, 3, 4, 5])
def test_every_sentence_is_valid_and_no_limit_is_crossed(players, kind):
    options = {"players": (players,), "kinds": (kind,)}
    for episode in scripted_corpus(options, 80, 1000, EVERY):
        scenario = draw(episode.seed, (players,), (kind,), (3, 5))
        table = replay(scenario, [m.content for m in episode.transcript])
        for turn in table.turns:
            assert turn.valid, (turn.text, turn.reason)
            assert len(turn.text) < MAX_CHARACTERS
            own = scenario.private[turn.seat]
            for act in turn.acts:
                if act.kind == "accept":
                    assert utility(own, turn.seat, turn.standing) >= own.limit
                elif act.kind == "propose":
                    assert utility(own, turn.seat, act.detail) >= own.limit


def by_temperament(one, other, n=120):
    env = make("bargaining")

    def cast(env):
        pair = zip(env.agents, (one, other), strict=True)
        return {agent: scripted_player(env, name, agent, 0) for agent, name in pair}

    episodes = [play(env, cast, seed) for seed in range(n)]
    return [episode.infos[episode.agents[0]] for episode in episodes]


def test_temperaments_are_what_their_names_say():
    deals = {name: mean(i["deal"] for i in by_temperament(name, "fair")) for name in EVERY}
    gains = {
        name: mean(i["payoff"] for i in by_temperament(name, "yielding") if i["deal"])
        for name in EVERY
    }
    assert deals["yielding"] == max(deals.values())
    assert deals["fair"] > deals["stubborn"]
    assert gains["greedy"] > gains["fair"] > 5.0
    assert gains["stubborn"] > gains["yielding"]


def test_the_corpus_has_deals_failures_and_sloppiness():
    infos = [i for e in scripted_corpus({}, 600, 0) for i in e.infos.values()]
    assert 0.7 < mean(i["deal"] for i in infos) < 0.95
    for name in ("believability", "secret", "social_rules"):
        scores = [i["dimensions"][name] for i in infos]
        assert min(scores) < max(scores)
    assert {i["end"] for i in infos} == {"deal", "left", "limit"}


def test_held_out_temperaments_are_apart():
    assert set(HELD_OUT) == {"reciprocal", "deadline"}
    assert not set(HELD_OUT) & set(TRAINING) and set(HELD_OUT) | set(TRAINING) == set(EVERY)


def test_a_script_survives_what_it_does_not_understand():
    env = make("bargaining")
    env.reset(0)
    one, other = env.agents
    player = scripted_player(env, "fair", one, 0)
    assert player.act([Message("system", "?"), Message("user", "Gr\x00 blub.", other)])
    assert player.act([])


WHOLE = (
    "I take nothing.",
    "You take nothing.",
    "I take everything.",
    "I take two books, you take the rest.",
    "I take one hat and nothing.",
    "I take nine balls.",
    "I propose low price, high fee, middle bonus.",
    "I propose high price and low budget.",
    "I want low deposit and low fee.",
    *(frame.format(word) for kind in ABOUT.values() for frame in kind for word in ("hats", "two")),
    *(text for texts in FIXED.values() for text in texts),
)
SENTENCES = st.one_of(
    st.sampled_from(WHOLE),
    st.sampled_from([*FIXED["reject"], *FIXED["accept"], *WHOLE[:4]]),  # what offers are about
    st.text(max_size=30),
)
UTTERANCES = st.lists(SENTENCES, max_size=4).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    temperament=st.sampled_from(EVERY),
    players=st.integers(2, 5),
    kind=st.sampled_from(["division", "terms"]),
    seed=st.integers(0, 1000),
    said=st.lists(UTTERANCES, min_size=20, max_size=20),
)
@example("yielding", 2, "division", 0, ["No. I take nothing."] * 20)
@example("yielding", 2, "division", 1, ["No. I take nothing."] * 20)
@example("fair", 3, "division", 2, ["No. I take nothing.", "Deal."] * 10)
def test_a_script_speaks_well_whatever_it_hears(temperament, players, kind, seed, said):
    env = make("bargaining", players=(players,), kinds=(kind,))
    step = env.reset(seed)
    mine = env.agents[0]
    script = scripted_player(env, temperament, mine, seed)
    heard, said = [], iter(said)
    while step.to_act:
        (speaker,) = step.to_act
        heard += step.observations.get(mine, [])
        text = script.act(heard) if speaker == mine else next(said)
        heard = [] if speaker == mine else heard
        step = env.step({speaker: text})
        if speaker == mine:
            assert step.infos[mine]["valid"], (text, step.infos[mine]["reason"])


def test_an_offer_that_the_table_refused_is_not_taken():
    env = make("bargaining")
    seed = next(
        seed for seed in range(100) if (first := env.reset(seed)).to_act[0] != env.agents[0]
    )
    env.reset(seed)
    mine, (other,) = env.agents[0], first.to_act
    generous = "I take nothing."
    for opener, taken in ((generous, True), (f"No. {generous}", False), (f"{generous} Hm?", False)):
        env.reset(seed)
        valid = env.step({other: opener}).infos[other]["valid"]
        text = scripted_player(env, "yielding", mine, 0).act([Message("user", opener, other)])
        info = env.step({mine: text}).infos[mine]
        assert info["valid"], (opener, text, info["reason"])
        assert (valid, info.get("end") == "deal") == (taken, taken), (opener, text)


def test_unknown_names_are_refused():
    env = make("bargaining")
    env.reset(0)
    with pytest.raises(Refused, match=r"'angry'.*greedy"):
        scripted_player(env, "angry", env.agents[0], 0)
    with pytest.raises(Refused, match="Zoe"):
        scripted_player(env, "fair", "Zoe", 0)
