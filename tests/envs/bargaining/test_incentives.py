"""What is not negotiating does not pay: degenerate ways to play score below every script."""

import random
from statistics import mean

import pytest

from jaxconv.envs import make, play
from jaxconv.envs.bargaining import TRAINING, scripted_player
from jaxconv.envs.bargaining.language import FIXED, say_offer, say_share
from jaxconv.envs.bargaining.parser import understand
from jaxconv.envs.bargaining.scenario import utility

GAMES = 250


class Degenerate:
    """Plays by one trick. It may know everything about the scenario."""

    def __init__(self, trick, scenario, agent):
        self.trick, self.scenario = trick, scenario
        self.seat = scenario.setting.agents.index(agent)
        self.own = scenario.private[self.seat]
        self.turn = -1
        self.standing = None

    def act(self, messages):
        self.turn += 1
        for message in messages:
            if message.role == "user":
                heard = understand(self.scenario.setting, 1 - self.seat, message.content)
                for act in heard.acts if heard.reason is None else ():
                    if act.kind == "propose":
                        self.standing = act.detail
        return getattr(self, self.trick)()

    def leaves_at_once(self):
        return "I walk away."

    def is_silent(self):
        return ""

    def babbles(self):
        return "books hats balls deal deal"

    def only_courteous(self):
        return FIXED["courtesy"][self.turn % 8]

    def only_asks(self):
        return FIXED["ask"][self.turn % 5]

    def only_refuses(self):
        return FIXED["reject"][self.turn % 8] if self.standing else FIXED["ask"][0]

    def takes_anything(self):
        return "Deal." if self.standing else "Hello."

    def gives_all_away(self):
        return "I accept." if self.standing else "I take nothing."

    def demands_all(self):
        return ["I take everything.", "I want everything.", "Give me everything."][self.turn % 3]

    def blurts_its_limit(self):
        if self.standing and utility(self.own, self.seat, self.standing) >= self.own.limit:
            return "Deal."
        half = [[count // 2 for count in self.scenario.setting.counts] for _ in range(2)]
        half[1 - self.seat] = [
            count - mine for count, mine in zip(self.scenario.setting.counts, half[0], strict=True)
        ]
        share = say_share(half[0], self.scenario.setting.counts, random.Random(0))
        return f"My limit is {self.own.limit} points. I take {share}."


TRICKS = [name for name in vars(Degenerate) if not name.startswith("_") and name != "act"]


class Negotiator(Degenerate):
    """Asks, tells the truth, is kind once, offers a fair efficient share, takes what is good."""

    def act(self, messages):
        self.trick = "negotiates"
        return super().act(messages)

    def negotiates(self):
        setting, own = self.scenario.setting, self.own
        given = utility(own, self.seat, self.standing) if self.standing else 0.0
        if given >= max(own.limit, 6 - self.turn):
            return "Thank you. Deal."
        wish = setting.topics[own.values.index(max(own.values))]
        if self.turn == 0:
            words = f"I care most about the {wish}."
        else:
            words = "Thank you." if self.turn == 1 else ""
        best = max(self._offers(), key=self._fairness)
        offer = say_offer(setting, self.seat, best, random.Random(self.turn), self.turn, 0.0)
        return f"{words} {offer} {'What matters most to you?' if self.turn == 0 else ''}".strip()

    def _offers(self):
        counts = self.scenario.setting.counts
        for a in range(counts[0] + 1):
            for b in range(counts[1] + 1):
                for c in range(counts[2] + 1):
                    mine = (a, b, c)
                    rest = tuple(n - m for n, m in zip(counts, mine, strict=True))
                    yield (mine, rest) if self.seat == 0 else (rest, mine)

    def _fairness(self, offer):
        both = [utility(own, at, offer) for at, own in enumerate(self.scenario.private)]
        return min(both) + 0.1 * sum(both) - 100 * (both[self.seat] < self.own.limit)


def mean_scores(build):
    """Mean overall score and reward of seat 0 or 1 in turn against each training script."""
    env = make("bargaining")
    overall, rewards = [], []
    for seed in range(GAMES):
        chosen = seed % 2

        def cast(env, seed=seed, chosen=chosen):
            other = env.agents[1 - chosen]
            script = TRAINING[seed % len(TRAINING)]
            return {
                env.agents[chosen]: build(env, env.agents[chosen], seed),
                other: scripted_player(env, script, other, seed),
            }

        episode = play(env, cast, seed)
        agent = episode.agents[chosen]
        overall.append(episode.infos[agent]["overall"])
        rewards.append(episode.rewards[agent])
    return mean(overall), mean(rewards)


@pytest.fixture(scope="module")
def worst_script():
    scores = [
        mean_scores(lambda env, agent, seed, name=name: scripted_player(env, name, agent, seed))
        for name in TRAINING
    ]
    return tuple(map(min, zip(*scores, strict=True)))


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_pays(trick, worst_script):
    overall, reward = mean_scores(lambda env, agent, _: Degenerate(trick, env.scenario, agent))
    assert overall < worst_script[0] and reward < worst_script[1]


def test_negotiating_pays_most(worst_script):
    overall, reward = mean_scores(lambda env, agent, _: Negotiator("", env.scenario, agent))
    for name in TRAINING:
        script = mean_scores(
            lambda env, agent, seed, name=name: scripted_player(env, name, agent, seed)
        )
        assert overall > script[0] + 0.3 and reward > script[1] + 0.03


@pytest.mark.parametrize("trick", ["only_courteous", "only_asks", "babbles", "is_silent"])
def test_two_cannot_collude_in_nonsense(trick):
    env = make("bargaining")

    def scores(build):
        episodes = [
            play(env, lambda env: {a: build(env, a) for a in env.agents}, seed)
            for seed in range(60)
        ]
        return mean(info["overall"] for e in episodes for info in e.infos.values())

    nonsense = scores(lambda env, agent: Degenerate(trick, env.scenario, agent))
    assert nonsense < scores(lambda env, agent: scripted_player(env, "stubborn", agent, 0))
