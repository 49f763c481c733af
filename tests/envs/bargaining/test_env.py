"""The environment as a runner sees it."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.conversation import Message
from jaxconv.envs import make
from jaxconv.envs.bargaining import TEMPERAMENTS, scripted_corpus, scripted_player
from jaxconv.envs.bargaining.language import ABOUT, FIXED
from jaxconv.envs.dimensions import DIMENSIONS
from jaxconv.envs.episode import play

ANYTHING = {"players": (2, 3, 4, 5), "kinds": ("division", "terms")}
PIECES = [
    *(text for texts in FIXED.values() for text in texts),
    *(text.format(word) for texts in ABOUT.values() for text in texts for word in ("hat", "four")),
    *("I take one book.", "I take two hats, Bob gets the rest.", "You get", "the rest", "and"),
    *("low price", "I propose", "\n", ".", "?", "Ann", "!!!", "\x00", "ＤＥＡＬ", "é"),
]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=5).map(" ".join))


def cast(env, seed=0):
    names = list(TEMPERAMENTS)
    rng = random.Random(seed)
    return {agent: scripted_player(env, rng.choice(names), agent, seed) for agent in env.agents}


def as_lists(step):
    return json.loads(
        json.dumps(
            [
                step.to_act,
                {
                    a: [[m.role, m.content, m.name] for m in ms]
                    for a, ms in step.observations.items()
                },
                step.rewards,
                step.terminated,
                step.truncated,
                step.infos,
            ]
        )
    )


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), texts=st.lists(TEXTS, min_size=25, max_size=25))
def test_no_text_breaks_it_and_scores_stay_in_range(seed, texts):
    env = make("bargaining", **ANYTHING)
    step = env.reset(seed)
    for text in texts:
        (speaker,) = step.to_act
        step = env.step({speaker: text})
        assert set(step.rewards) == set(env.agents)
        if not step.to_act:
            break
        assert not any(step.rewards.values()) and not step.terminated
    assert step.terminated and not step.truncated
    for agent in env.agents:
        info = step.infos[agent]
        assert 0.0 <= step.rewards[agent] <= 1.0
        assert set(info["dimensions"]) == set(DIMENSIONS)
        for name, (low, high) in DIMENSIONS.items():
            assert low <= info["dimensions"][name] <= high
        assert info["deal"] == (info["payoff"] is not None) == (info["end"] == "deal")
    as_lists(step)


def test_what_each_one_hears():
    env = make("bargaining", players=(3,))
    step = env.reset(5)
    assert list(step.observations) == list(env.agents)
    assert all([m.role for m in ms] == ["system"] for ms in step.observations.values())
    (speaker,) = step.to_act
    step = env.step({speaker: "Hello\n there."})
    heard = [Message("user", "Hello there.", speaker)]
    assert step.observations == {a: heard for a in env.agents if a != speaker}
    assert step.infos == {speaker: {"valid": False, "reason": "unknown"}}
    assert env.agents.index(step.to_act[0]) == (env.agents.index(speaker) + 1) % 3
    assert env.teams == dict.fromkeys(env.agents, "all")


def test_nothing_private_is_heard_but_what_was_said():
    for seed in range(60):
        env = make("bargaining", **ANYTHING)
        episode = play(env, cast, seed)
        said = {m.content for m in episode.transcript}
        for agent, view in episode.views.items():
            assert [m.role for m in view].count("system") == 1
            for message in view[1:]:
                assert message.content in said
                assert message.role == ("user" if message.name else "assistant")
                assert message.name != agent
            heard = [(m.name or agent, m.content) for m in view[1:]]
            assert heard == [(m.name, m.content) for m in episode.transcript]


def test_briefs_do_not_depend_on_the_secrets_of_others():
    from dataclasses import replace

    from jaxconv.envs.bargaining.language import brief

    scenario = make("bargaining", players=(3,))
    scenario.reset(1)
    scenario = scenario.scenario
    other = replace(
        scenario.private[1], values=(9, 9, 9), limit=9, trait="frank", occupation="pilot"
    )
    changed = replace(scenario, private=(scenario.private[0], other, scenario.private[2]))
    for seat in (0, 2):
        assert brief(changed, seat, rules=True) == brief(scenario, seat, rules=True)
    assert brief(changed, 1) != brief(scenario, 1)


def test_same_seed_same_game_whatever_happens_around():
    alone = [as_lists_of(play(make("bargaining", **ANYTHING), cast, seed)) for seed in range(20)]
    random.seed(1)
    envs = [make("bargaining", **ANYTHING) for _ in range(20)]
    steps = [env.reset(seed) for seed, env in enumerate(envs)]
    casts = [cast(env) for env in envs]
    heard = [
        {a: list(s.observations[a]) for a in e.agents} for e, s in zip(envs, steps, strict=True)
    ]
    told = [[] for _ in envs]
    while any(step.to_act for step in steps):
        for i, env in enumerate(envs):
            random.random()
            if not steps[i].to_act:
                continue
            (speaker,) = steps[i].to_act
            text = casts[i][speaker].act(heard[i][speaker])
            heard[i][speaker] = []
            told[i].append([speaker, text])
            steps[i] = env.step({speaker: text})
            for agent, messages in steps[i].observations.items():
                heard[i][agent] += messages
    together = [[told[i], dict(steps[i].rewards), as_lists(steps[i])[5]] for i in range(len(envs))]
    assert together == alone
    state = random.getstate()
    play(make("bargaining"), cast, 3)
    assert random.getstate() == state


def as_lists_of(episode):
    told = [[m.name, m.content] for m in episode.transcript]
    return [told, dict(episode.rewards), json.loads(json.dumps(episode.infos))]


@pytest.mark.parametrize("seed", range(12))
def test_going_back_to_any_turn_changes_nothing(seed):
    env = make("bargaining", **ANYTHING)
    step = env.reset(seed)
    players = cast(env, seed)
    inbox = {agent: list(step.observations[agent]) for agent in env.agents}
    frames = []
    while True:
        state = json.dumps(
            [env.state_dict(), {agent: player.state_dict() for agent, player in players.items()}]
        )
        frames.append((state, {a: list(ms) for a, ms in inbox.items()}, as_lists(step)))
        if not step.to_act:
            break
        (speaker,) = step.to_act
        text = players[speaker].act(inbox[speaker])
        inbox[speaker] = []
        step = env.step({speaker: text})
        for agent, messages in step.observations.items():
            inbox[agent] += messages

    for (state, inbox, (to_act, *_)), (_, _, expected) in pairwise(frames):
        saved, player_states = json.loads(state)
        again = make("bargaining", **ANYTHING)
        again.load_state_dict(saved)
        assert again.state_dict() == saved
        (speaker,) = to_act
        player = cast(again, seed)[speaker]
        player.load_state_dict(player_states[speaker])
        assert player.state_dict() == player_states[speaker]
        assert as_lists(again.step({speaker: player.act(inbox[speaker])})) == expected


def test_state_before_the_first_episode():
    env = make("bargaining")
    state = env.state_dict()
    env.reset(0)
    env.load_state_dict(state)
    with pytest.raises(ValueError, match="reset"):
        env.step({"Ann": "Hello."})


def test_wrong_actions_are_errors():
    env = make("bargaining")
    step = env.reset(0)
    (speaker,) = step.to_act
    (other,) = set(env.agents) - {speaker}
    with pytest.raises(ValueError, match=speaker):
        env.step({other: "Hello."})
    with pytest.raises(ValueError, match=speaker):
        env.step({})
    with pytest.raises(TypeError, match="int"):
        env.step({speaker: 3})
    step = env.step({speaker: "I walk away."})
    assert step.terminated
    with pytest.raises(ValueError, match="end of the episode"):
        env.step({other: "Hello."})


def test_weights_choose_what_is_rewarded():
    only = dict.fromkeys(DIMENSIONS, 0.0) | {"goal": 1.0}
    env = make("bargaining", weights=only)
    for seed in range(20):
        episode = play(env, cast, seed)
        for agent in episode.agents:
            goal = episode.infos[agent]["dimensions"]["goal"]
            assert episode.rewards[agent] == pytest.approx(goal / 10)


def test_the_end_and_the_beginning_are_drawn_within_bounds():
    lengths, firsts = set(), set()
    env = make("bargaining", turns=(2, 4))
    for seed in range(200):
        step = env.reset(seed)
        firsts.add(env.agents.index(step.to_act[0]))
        said = 0
        while step.to_act:
            step = env.step({step.to_act[0]: "Hello."})
            said += 1
        lengths.add(said)
    assert lengths == {4, 5, 6, 7, 8} and firsts == {0, 1}


def test_the_corpus_is_a_function_of_its_seed():
    def texts(seed, n):
        return [
            [(m.name, m.content) for m in e.transcript] for e in scripted_corpus(ANYTHING, n, seed)
        ]

    assert texts(0, 6) == texts(0, 6)
    assert texts(0, 6)[3:] == texts(3, 3)
