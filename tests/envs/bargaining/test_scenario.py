"""What is drawn is playable."""

from itertools import product

import pytest

from jaxconv.envs.bargaining.scenario import POINTS, draw, utility, valuations


@pytest.mark.parametrize("kind", ["division", "terms"])
def test_everything_is_worth_ten_to_everyone(kind):
    for seed in range(300):
        scenario = draw(seed, (2, 3, 4, 5), (kind,), (3, 5))
        setting = scenario.setting
        players = len(setting.agents)
        assert len(set(setting.agents)) == players == len(scenario.private)
        assert 3 * players <= scenario.utterances <= 5 * players
        assert 0 <= scenario.first < players
        for seat, own in enumerate(scenario.private):
            if kind == "division":
                all_mine = tuple(
                    setting.counts if at == seat else (0, 0, 0) for at in range(players)
                )
                assert utility(own, seat, all_mine) == POINTS
            else:
                assert utility(own, seat, own.wants) == POINTS
                assert utility(own, seat, (1,) * len(setting.topics)) == POINTS / 2
            assert 1 <= own.limit <= 5


def test_all_are_drawn():
    drawn = [draw(seed, (2, 3), ("division", "terms"), (3, 5)) for seed in range(100)]
    assert {(len(s.private), s.setting.kind) for s in drawn} == set(
        product((2, 3), ("division", "terms"))
    )
    assert drawn[7] == draw(7, (2, 3), ("division", "terms"), (3, 5))


def test_two_can_usually_agree():
    possible = 0
    for seed in range(200):
        scenario = draw(seed, (2,), ("division",), (3, 5))
        ann, bob = scenario.private
        counts = scenario.setting.counts
        possible += any(
            utility(ann, 0, (share, rest)) >= ann.limit
            and utility(bob, 1, (share, rest)) >= bob.limit
            for share in product(*(range(count + 1) for count in counts))
            for rest in [tuple(n - s for n, s in zip(counts, share, strict=True))]
        )
    assert possible / 200 > 0.95


def test_valuations_by_enumeration():
    assert set(valuations((1, 2, 10))) == {
        v
        for v in product(range(11), range(6), range(2))
        if v[0] + 2 * v[1] + 10 * v[2] == 10 and sum(x > 0 for x in v) >= 2
    }
