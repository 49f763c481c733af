"""Environments by name."""

import subprocess
import sys

import pytest

from jaxconv import envs
from jaxconv.errors import Refused


def test_make_and_players():
    env = envs.make("bargaining", players=[3], turns=[2, 2])
    env.reset(0)
    player = envs.players("bargaining", env, "fair", env.agents[1], 4)
    assert player.act([])
    training, held_out = envs.temperaments("bargaining")
    assert "greedy" in training and "deadline" in held_out
    (episode,) = envs.scripted_corpus("bargaining", {"players": (3,)}, 1, 0, held_out)
    assert len(episode.agents) == 3


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("chess", {}, r"'chess'.*bargaining"),
        ("bargaining", {"size": 3}, r"'size'.*players"),
        ("bargaining", {"players": (1,)}, "players"),
        ("bargaining", {"players": (6,)}, "2 to 5"),
        ("bargaining", {"players": ()}, "players"),
        ("bargaining", {"players": 2}, "players"),
        ("bargaining", {"kinds": ("war",)}, "division, terms"),
        ("bargaining", {"turns": (4, 3)}, "turns"),
        ("bargaining", {"turns": (1, 2, 3)}, "turns"),
        ("bargaining", {"turns": (1.5, 2)}, "turns"),
        ("bargaining", {"rules": "yes"}, "rules"),
        ("bargaining", {"weights": {"fun": 1}}, "fun"),
    ],
)
def test_refusals_name_the_option_and_what_it_may_be(name, options, says):
    with pytest.raises(Refused, match=says):
        envs.make(name, **options)


def test_environments_know_no_jax():
    code = (
        "import sys, jaxconv.envs as e; e.make('bargaining').reset(0); "
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
