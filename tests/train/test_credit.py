"""The switch between estimators: the same streams, credited by turns or by tokens alone."""

import numpy as np
import pytest

from jaxconv.train.ppo import Credit, _advantages

TURN_IDS = np.array(
    [[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, 2, -1], [-1, 0, -1, 1, 1, 1, -1, 2, 2, 2, 2, -1]], np.int32
)


def streams():
    """(values, turn rewards, token rewards, turn ids, kept turns, bootstrap) of two streams."""
    rng = np.random.default_rng(0)
    rewards_BN = np.zeros((2, 8), np.float32)
    rewards_BN[:, :3] = rng.normal(size=(2, 3))
    values_BT = rng.normal(size=TURN_IDS.shape).astype(np.float32)
    return (
        values_BT,
        rewards_BN,
        np.zeros_like(values_BT),
        TURN_IDS,
        np.ones((2, 8), bool),
        np.array([0.0, 0.7], np.float32),
    )


def by_hand(values, rewards, ids, bootstrap, gamma, lam):
    """Token GAE of one stream over its own tokens, turn rewards on the last token of each turn."""
    own = np.flatnonzero(ids >= 0)
    advantage, out, value = 0.0, np.zeros(len(ids)), bootstrap
    for i in own[::-1]:
        last = not np.any(ids[i + 1 :] == ids[i])
        reward = rewards[ids[i]] if last else 0.0
        advantage = reward + gamma * value - values[i] + gamma * lam * advantage
        out[i], value = advantage, values[i]
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
def test_the_token_estimator_is_plain_gae(gamma, lam):
    values, rewards, tokens, ids, keep, bootstrap = streams()
    credit = Credit(estimator="token", gamma_token=gamma, lam_token=lam, gamma_turn=0.3)
    got, targets = _advantages(values, rewards, tokens, ids, keep, bootstrap, credit)
    for b in range(2):
        want = by_hand(values[b], rewards[b], ids[b], bootstrap[b], gamma, lam)
        np.testing.assert_allclose(got[b], want, atol=1e-6)
        own = ids[b] >= 0
        np.testing.assert_allclose(targets[b][own], (want + values[b])[own], atol=1e-6)


def test_both_estimators_agree_when_nothing_is_discounted():
    token = _advantages(*streams(), Credit(estimator="token"))
    turns = _advantages(*streams(), Credit(lam_turn=1.0))
    for a, b in zip(token, turns, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_flagged_turn_earns_nothing_and_earlier_turns_keep_their_credit():
    values, rewards, tokens, ids, keep, bootstrap = streams()
    credit = Credit(estimator="token", lam_token=0.9)
    kept, _ = _advantages(values, rewards, tokens, ids, keep, bootstrap, credit)
    keep[0, 1] = False
    got, targets = _advantages(values, rewards, tokens, ids, keep, bootstrap, credit)
    flagged = (ids == 1) & (np.arange(2)[:, None] == 0)
    assert not np.any(np.where(flagged, got, 0.0))
    np.testing.assert_array_equal(np.where(flagged, targets - values, 0.0), 0.0)
    np.testing.assert_array_equal(np.where(flagged, 0.0, got), np.where(flagged, 0.0, kept))


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match=r"estimator='turn'; it may be"):
        Credit(estimator="turn")
