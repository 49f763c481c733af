import json

from jaxconv import envs
from jaxconv.evals import episodes
from jaxconv.train.workdir import Workdir


def test_episodes_have_sotopias_fields_and_can_be_played_again(tmp_path, played):
    env = envs.make("bargaining", players=(3,))
    env.reset(7)
    game = played([1.0, 2.0, 3.0], cast=("a", "b"), seed=7, deal=True)
    game.agents = env.agents
    game.transcript = [(1, "Hello."), (2, 'I say "no".')]

    with Workdir(tmp_path / "run") as workdir:
        episodes.write(
            workdir, "bargaining", lambda n: envs.make("bargaining", players=(n,)), [game, game]
        )
        lines = (workdir.artifacts / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 2
    found = json.loads(lines[0])
    assert found["models"] == ["a", "b", "b"] and found["tag"] == "deal" and found["seed"] == 7
    assert [agent["first_name"] for agent in found["agents"]] == list(env.agents)
    assert all(agent["secret"] and agent["personality_and_values"] for agent in found["agents"])
    assert len(found["environment"]["agent_goals"]) == 3
    assert found["messages"][0] == [["Environment", agent, "brief"] for agent in env.agents]
    assert found["messages"][1:] == [
        [[env.agents[1], "Environment", 'said: "Hello."']],
        [[env.agents[2], "Environment", 'said: "I say "no"."']],
    ]
    assert [overall for overall, _ in found["rewards"]] == [1.0, 2.0, 3.0]
    assert found["rewards"][0][1].keys() == envs.DIMENSIONS.keys()


def test_a_cut_game_has_no_rewards(played):
    env = envs.make("bargaining")
    found = episodes.episode_log("bargaining", env, played([None, None], seed=3))
    assert found["rewards"] == [None, None] and found["tag"] == "cut"
