"""Scripts speak well, keep their limits, differ in temper."""

from statistics import mean

import pytest

from jaxconv.data.conversation import Message
from jaxconv.envs import make, play
from jaxconv.envs.bargaining import (
    HELD_OUT,
    TEMPERAMENTS,
    TRAINING,
    scripted_corpus,
    scripted_player,
)
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


def test_unknown_names_are_refused():
    env = make("bargaining")
    env.reset(0)
    with pytest.raises(Refused, match=r"'angry'.*greedy"):
        scripted_player(env, "angry", env.agents[0], 0)
    with pytest.raises(Refused, match="Zoe"):
        scripted_player(env, "fair", "Zoe", 0)
