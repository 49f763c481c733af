"""Advantages against exact enumeration, a plain Python oracle, and their own special cases."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.objectives.advantages import (
    check_pair,
    hierarchical_advantages,
    token_gae,
    turn_advantages,
)

_path = Path(__file__).parents[2] / "benchmarks" / "advantage_bias.py"
_spec = importlib.util.spec_from_file_location("advantage_bias", _path)
bias = sys.modules["advantage_bias"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bias)

hierarchical = jax.jit(hierarchical_advantages, static_argnames=("anchor", "deposit"))
gae = jax.jit(token_gae)
ONES = dict.fromkeys(("gamma_turn", "lam_turn", "gamma_token", "lam_token"), 1.0)
GENERAL = {"gamma_turn": 0.9, "lam_turn": 0.8, "gamma_token": 0.97, "lam_token": 0.7}
PAIRS = [("first", "return"), ("last", "return"), ("last", "seed")]
CORRECT = [name for name in bias.ESTIMATORS if not name.startswith("refused")]


def streams(seed, B=3, T=24, N=6):
    """Random streams: turns of random lengths, some empty, environment and forced tokens between.

    Values and token rewards are drawn everywhere, so that reading off the mask shows.
    """
    rng = np.random.default_rng(seed)
    turn_ids, mask = np.full((B, T), -1, np.int32), np.zeros((B, T), bool)
    for b in range(B):
        i = 0
        for turn in range(rng.integers(0, N + 1)):
            i += rng.integers(0, 3)
            length = rng.integers(0, 5)
            turn_ids[b, i : i + length] = turn
            mask[b, i : i + length] = rng.random(turn_ids[b, i : i + length].shape) < 0.8
            i += length
    present = turn_ids.max(axis=1, initial=-1) + 1
    turn_rewards = rng.normal(size=(B, N)) * (np.arange(N) < present[:, None])
    return {
        "values": rng.normal(size=(B, T)).astype(np.float32),
        "turn_rewards": turn_rewards.astype(np.float32),
        "token_rewards": rng.normal(size=(B, T)).astype(np.float32),
        "turn_ids": turn_ids,
        "action_mask": mask,
        "bootstrap": (rng.normal(size=B) * (rng.random(B) < 0.5)).astype(np.float32),
    }


def oracle(s, *, gamma_turn, lam_turn, gamma_token, lam_token, anchor, deposit, keep=None):
    """The equations, token by token, in float64 Python."""
    B, N = s["turn_rewards"].shape
    out = np.zeros(s["values"].shape)
    for b in range(B):
        turns = []  # (positions of the action tokens, reward, keep)
        for n in range(N):
            where = [i for i, t in enumerate(s["turn_ids"][b]) if t == n and s["action_mask"][b, i]]
            if where:
                m = 1.0 if keep is None else float(keep[b, n])
                turns.append([where, float(s["turn_rewards"][b, n]), m])
            elif turns:
                turns[-1][1] += float(s["turn_rewards"][b, n])
        v = s["values"][b].astype(np.float64)
        A, V_next = 0.0, float(s["bootstrap"][b])
        for where, reward, m in reversed(turns):
            V = v[where[0] if anchor == "first" else where[-1]]
            A = reward + gamma_turn * V_next - V + gamma_turn * lam_turn * A
            V_next = V
            later = None
            for i in reversed(where):
                r = float(s["token_rewards"][b, i])
                if later is None:
                    out[b, i] = r + (m * A if deposit == "seed" else m * A + V - v[i])
                else:
                    out[b, i] = r + gamma_token * v[later] - v[i]
                    out[b, i] += gamma_token * lam_token * out[b, later]
                later = i
    return out


# ---- exact enumeration


@pytest.fixture(scope="module", params=[0, 1, 2])
def tree(request):
    return bias.random_tree(request.param)


def test_the_tree_is_itself_right(tree):
    # the exact gradient agrees with the score-function identity Σ P(path) R(path) ∇ log P(path)
    returns_P = tree.turn_rewards_PN.sum(axis=1)
    by_score, _ = tree.expectation(np.tile(returns_P[:, None], (1, bias.T)))
    np.testing.assert_allclose(by_score, tree.gradient_S, atol=1e-12)
    assert tree.probability_P.sum() == pytest.approx(1.0)
    assert tree.values_PT[0, 0] == pytest.approx(tree.probability_P @ returns_P)


@pytest.mark.parametrize("name", CORRECT)
def test_correct_estimators_are_unbiased(tree, name):
    assert tree.relative_error(bias.ESTIMATORS[name](tree, tree.values_PT)) < 1e-5


@pytest.mark.parametrize("name", CORRECT)
def test_a_wrong_critic_leaves_them_unbiased_without_discounts(tree, name):
    assert tree.relative_error(bias.ESTIMATORS[name](tree, tree.noisy_values(seed=7))) < 1e-5


@pytest.mark.parametrize("name", [n for n in CORRECT if n != "token GAE"])
def test_a_turn_lambda_below_one_is_unbiased_with_an_exact_critic(tree, name):
    advantages = bias.ESTIMATORS[name](tree, tree.values_PT, lam_turn=0.5)
    assert tree.relative_error(advantages) < 1e-5


def test_first_anchor_has_the_least_variance_at_turn_lambda_half(tree):
    def variance(name, **options):
        return tree.expectation(bias.ESTIMATORS[name](tree, tree.values_PT, **options))[1]

    first = variance("hierarchical, first + return", lam_turn=0.5)
    last = variance("hierarchical, last + return", lam_turn=0.5)
    assert first < last < variance("token GAE")


@pytest.mark.parametrize("name", [n for n in bias.ESTIMATORS if n.startswith("refused")])
def test_the_refused_readings_are_biased(tree, name):
    assert tree.relative_error(bias.ESTIMATORS[name](tree, tree.values_PT)) > 0.3


def test_truncation_with_an_exact_bootstrap_is_unbiased(tree):
    # cut after the second turn and the other side's answer: what is left of the gradient stays
    cut = 8
    paths = len(tree.bits_PT)
    advantages, _ = hierarchical(
        tree.values_PT[:, :cut],
        tree.turn_rewards_PN[:, :2],
        np.zeros((paths, cut)),
        np.tile(bias.TURN_IDS[:cut], (paths, 1)),
        np.tile(bias.IS_ACTION[:cut], (paths, 1)),
        tree.values_PT[:, cut],
        **ONES,
    )
    mean_S, _ = tree.expectation(np.pad(np.asarray(advantages), ((0, 0), (0, bias.T - cut))))
    early_S = np.arange(mean_S.size) < 2**cut - 1
    exact = tree.gradient_S[early_S]
    assert np.linalg.norm(mean_S[early_S] - exact) / np.linalg.norm(exact) < 1e-5


# ---- the oracle and special cases


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    pair=st.sampled_from(PAIRS),
    rates=st.tuples(*[st.floats(0.0, 1.0) for _ in range(4)]),
    filtered=st.booleans(),
)
def test_agrees_with_the_plain_oracle(seed, pair, rates, filtered):
    s = streams(seed)
    options = dict(zip(ONES, rates, strict=True))
    keep = np.random.default_rng(seed + 1).random(s["turn_rewards"].shape)
    keep = np.where(keep < 0.4, 0.0, keep).astype(np.float32) if filtered else None
    anchor, deposit = pair
    advantages, targets = hierarchical(
        **s, **options, anchor=anchor, deposit=deposit, keep_turns=keep
    )
    want = oracle(s, **options, anchor=anchor, deposit=deposit, keep=keep)
    np.testing.assert_allclose(advantages, want, rtol=1e-4, atol=1e-4)
    action = s["action_mask"] & (s["turn_ids"] >= 0)
    np.testing.assert_allclose(
        targets, np.where(action, want + s["values"], 0.0), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pair=st.sampled_from(PAIRS))
def test_equals_token_gae_when_nothing_is_discounted(seed, pair):
    s = streams(seed)
    s["token_rewards"] = np.zeros_like(s["values"])
    rewards = np.zeros_like(s["values"])
    for b in range(len(rewards)):  # a turn's reward on the last action token at or before it
        for n, reward in enumerate(s["turn_rewards"][b]):
            where = np.flatnonzero(s["action_mask"][b] & (s["turn_ids"][b] <= n))
            where = where[s["turn_ids"][b, where] >= 0]
            if where.size:
                rewards[b, where[-1]] += reward
    mask = s["action_mask"] & (s["turn_ids"] >= 0)
    got = hierarchical(**s, **ONES, anchor=pair[0], deposit=pair[1])
    want = gae(s["values"], rewards, mask, s["bootstrap"], gamma=1.0, lam=1.0)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_token_gae_by_hand():
    # two action tokens around an environment token: d1 = 2 + .5·0 − 3 = −1; d0 = 1 + .5·3 − 2 = .5
    advantages, targets = gae(
        np.array([[2.0, 99.0, 3.0]]),
        np.array([[1.0, 99.0, 2.0]]),
        np.array([[1, 0, 1]]),
        np.zeros(1),
        gamma=0.5,
        lam=0.5,
    )
    np.testing.assert_allclose(advantages, [[0.25, 0.0, -1.0]])
    np.testing.assert_allclose(targets, [[2.25, 0.0, 2.0]])


def test_first_with_seed_is_refused_and_so_are_unknown_names():
    s = streams(0)
    with pytest.raises(ValueError, match="anchor 'first' with deposit 'seed'"):
        hierarchical_advantages(**s, **ONES, anchor="first", deposit="seed")
    with pytest.raises(ValueError, match="anchor is 'middle'"):
        check_pair("middle", "return")
    with pytest.raises(ValueError, match="deposit is 'reward'"):
        check_pair("last", "reward")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("turn_rewards", (2, 6)),
        ("turn_rewards", (3, 0)),
        ("token_rewards", (3, 1)),
        ("turn_ids", (3, 23)),
        ("action_mask", (1, 24)),
        ("bootstrap", (3, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    s = streams(0)
    s[name] = np.zeros(shape, s[name].dtype)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        hierarchical_advantages(**s, **ONES)


def test_float_turn_ids_are_refused():
    s = streams(0)
    s["turn_ids"] = s["turn_ids"].astype(np.float32)
    with pytest.raises(ValueError, match="turn_ids has dtype float32"):
        hierarchical_advantages(**s, **ONES)


def test_integer_rewards_are_not_truncated():
    s = streams(3)
    s["turn_rewards"] = np.round(s["turn_rewards"] * 3).astype(np.int32)
    s["token_rewards"] = np.round(s["token_rewards"]).astype(np.int32)
    as_float = dict(
        s,
        turn_rewards=s["turn_rewards"].astype(np.float32),
        token_rewards=s["token_rewards"].astype(np.float32),
    )
    got, want = hierarchical(**s, **GENERAL), hierarchical(**as_float, **GENERAL)
    assert got[0].dtype == jnp.float32
    assert np.any(np.asarray(got[0]) % 1 != 0)
    np.testing.assert_array_equal(got, want)
    mask = s["action_mask"]
    token = gae(s["values"], s["token_rewards"], mask, s["bootstrap"], gamma=0.9, lam=0.9)
    want = gae(s["values"], as_float["token_rewards"], mask, s["bootstrap"], gamma=0.9, lam=0.9)
    assert token[0].dtype == jnp.float32
    np.testing.assert_array_equal(token, want)


def test_bfloat16_values_are_reckoned_in_float32():
    s = streams(4)
    s["values"] = jnp.asarray(s["values"], jnp.bfloat16)
    advantages, targets = hierarchical(**s, **GENERAL)
    assert advantages.dtype == targets.dtype == jnp.float32
    exact = dict(s, values=np.asarray(s["values"], np.float32))
    np.testing.assert_array_equal(advantages, hierarchical(**exact, **GENERAL)[0])


def one_turn_each(turns, T):
    """One row whose own turns are single tokens, an environment token after each."""
    turn_ids = np.full((1, T), -1, np.int32)
    turn_ids[0, : 2 * turns : 2] = np.arange(turns)
    return turn_ids


def test_truncation_bootstraps_and_termination_does_not():
    turn_ids = one_turn_each(2, 4)
    common = (np.zeros((1, 4)), np.zeros((1, 2)), np.zeros((1, 4)), turn_ids, turn_ids >= 0)
    truncated, _ = hierarchical(*common, np.array([10.0]), **{**ONES, "gamma_turn": 0.5})
    terminated, _ = hierarchical(*common, np.array([0.0]), **{**ONES, "gamma_turn": 0.5})
    np.testing.assert_allclose(truncated, [[2.5, 0.0, 5.0, 0.0]])
    np.testing.assert_array_equal(terminated, 0.0)


def test_the_filter_silences_its_turn_and_keeps_earlier_credit():
    turn_ids = one_turn_each(3, 6)
    s = {
        "values": np.array([[0.5, 9.0, 0.25, 9.0, 0.125, 9.0]]),
        "turn_rewards": np.array([[0.0, 0.0, 1.0]]),
        "token_rewards": np.zeros((1, 6)),
        "turn_ids": turn_ids,
        "action_mask": turn_ids >= 0,
        "bootstrap": np.zeros(1),
    }
    free, _ = hierarchical(**s, **ONES)
    kept, targets = hierarchical(**s, **ONES, keep_turns=np.array([[True, False, True]]))
    np.testing.assert_allclose(free[0, ::2], [0.5, 0.75, 0.875])
    np.testing.assert_allclose(kept[0, ::2], [0.5, 0.0, 0.875])
    np.testing.assert_allclose(targets[0, 2], 0.25)  # the dropped turn teaches the critic nothing
    turns = turn_advantages(
        *(s[k] for k in ("values", "turn_rewards", "turn_ids", "action_mask", "bootstrap")),
        gamma_turn=1.0,
        lam_turn=1.0,
        keep_turns=np.array([[1.0, 0.0, 1.0]]),
    )
    np.testing.assert_allclose(turns.target, [[1.0, 0.25, 1.0]])


def test_token_rewards_stay_in_their_own_turn():
    turn_ids = np.array([[0, 0, -1, 1, 1, 1, -1, 2, 2]], np.int32)
    rng = np.random.default_rng(0)
    values, turn_rewards = rng.normal(size=(1, 9)), rng.normal(size=(1, 3))
    token_rewards = np.zeros((1, 9))
    token_rewards[0, 4] = 1.0
    common = (turn_ids, turn_ids >= 0, np.zeros(1))
    base, _ = hierarchical(values, turn_rewards, np.zeros((1, 9)), *common, **GENERAL)
    moved, _ = hierarchical(values, turn_rewards, token_rewards, *common, **GENERAL)
    decay = GENERAL["gamma_token"] * GENERAL["lam_token"]
    np.testing.assert_allclose(moved - base, [[0, 0, 0, decay, 1, 0, 0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e30])
def test_nothing_off_the_mask_is_read(fill):
    s = streams(5)
    off = ~(s["action_mask"] & (s["turn_ids"] >= 0))
    spoiled = dict(s)
    for name in ("values", "token_rewards"):
        spoiled[name] = np.where(off, fill, s[name]).astype(np.float32)
    for anchor, deposit in PAIRS:
        options = {**GENERAL, "anchor": anchor, "deposit": deposit}
        np.testing.assert_array_equal(
            hierarchical(**spoiled, **options), hierarchical(**s, **options)
        )
    arrays = ("values", "token_rewards", "action_mask", "bootstrap")
    s["action_mask"] = spoiled["action_mask"] = ~off
    want = gae(*(s[k] for k in arrays), gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(gae(*(spoiled[k] for k in arrays), gamma=0.9, lam=0.8), want)


def test_rows_are_independent_and_a_longer_buffer_changes_nothing():
    s = streams(6, B=4)
    whole = np.asarray(hierarchical(**s, **GENERAL))
    for b in range(4):
        alone = hierarchical(**{k: x[b : b + 1] for k, x in s.items()}, **GENERAL)
        np.testing.assert_allclose(np.asarray(alone)[:, 0], whole[:, b], rtol=1e-6)
    wide = {k: np.pad(x, ((0, 0), (0, 3))) for k, x in s.items() if x.ndim == 2}
    wide["turn_ids"][:, -3:] = -1
    longer = np.asarray(hierarchical(**wide, bootstrap=s["bootstrap"], **GENERAL))
    np.testing.assert_allclose(longer[..., :-3], whole, rtol=1e-6)
    np.testing.assert_array_equal(longer[..., -3:], 0.0)


def test_empty_rows_give_zeros():
    s = streams(7)
    s["action_mask"] = np.zeros_like(s["action_mask"])
    s["bootstrap"] = np.ones_like(s["bootstrap"])
    np.testing.assert_array_equal(hierarchical(**s, **GENERAL), 0.0)


def test_a_turn_without_action_tokens_hands_its_reward_back():
    # the agent's last turn is a forced marker only; the outcome must still reach its words
    turn_ids = np.array([[0, -1, 1]], np.int32)
    s = (np.zeros((1, 3)), np.array([[0.0, 1.0]]), np.zeros((1, 3)), turn_ids)
    advantages, _ = hierarchical(*s, np.array([[1, 0, 0]]), np.zeros(1), **GENERAL)
    np.testing.assert_allclose(advantages, [[1.0, 0.0, 0.0]])


def test_a_turn_id_past_the_reward_buffer_is_loud():
    s = streams(8)
    s["turn_rewards"] = s["turn_rewards"][:, :1]
    action = s["action_mask"] & (s["turn_ids"] >= 0)
    assert np.any(s["turn_ids"][action] >= 1)
    advantages = np.asarray(hierarchical(**s, **GENERAL)[0])
    assert np.all(np.isnan(advantages[action & (s["turn_ids"] >= 1)]))
    assert np.all(np.isfinite(advantages[~action]))


@pytest.mark.parametrize(("anchor", "deposit"), PAIRS)
def test_gradients_are_finite_and_right(anchor, deposit):
    s = streams(9)
    spoiled = np.where(s["action_mask"] & (s["turn_ids"] >= 0), s["values"], np.nan)
    f = partial(hierarchical, **GENERAL, anchor=anchor, deposit=deposit)

    def loss(rewards, values):
        return jnp.sum(f(**{**s, "values": values, "turn_rewards": rewards})[0])

    by_reward, by_value = jax.grad(loss, (0, 1))(jnp.asarray(s["turn_rewards"]), spoiled)
    assert np.all(np.isfinite(by_reward)) and np.all(np.isfinite(by_value))
    bumped = s["turn_rewards"].copy()
    bumped[0, 0] += 1.0  # the function is linear in the rewards
    np.testing.assert_allclose(
        by_reward[0, 0], loss(bumped, s["values"]) - loss(s["turn_rewards"], s["values"]), atol=1e-3
    )
