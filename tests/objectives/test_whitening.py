"""Whitening within teams of unequal size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.objectives.whitening import team_moments, whiten


def two_teams(rng):
    """Five streams of team 0, two of team 1, of unequal lengths; NaN off the mask."""
    teams = np.array([0, 0, 1, 0, 0, 1, 0])
    mask = rng.random((7, 9)) < 0.6
    advantages = rng.normal(size=(7, 9)) * np.where(teams == 0, 2.0, 0.1)[:, None]
    advantages += np.where(teams == 0, 5.0, -3.0)[:, None]
    return np.where(mask, advantages, np.nan).astype(np.float32), mask, teams


def test_each_team_gets_mean_zero_and_spread_one():
    advantages, mask, teams = two_teams(np.random.default_rng(0))
    out = np.asarray(
        jax.jit(whiten, static_argnames="num_groups")(advantages, mask, teams, num_groups=2)
    )
    for team in (0, 1):
        x = out[teams == team][mask[teams == team]]
        assert x.mean() == pytest.approx(0, abs=1e-5)
        assert x.std() == pytest.approx(1, rel=1e-3)
    assert np.all(out[~mask] == 0)


def test_one_team_over_all_would_push_the_weaker_side_down():
    advantages, mask, teams = two_teams(np.random.default_rng(0))
    out = np.asarray(whiten(advantages, mask))
    assert np.all(out[teams == 1][mask[teams == 1]] < 0)


def test_center_keeps_the_scale():
    advantages, mask, teams = two_teams(np.random.default_rng(1))
    out = np.asarray(whiten(advantages, mask, teams, num_groups=2, mode="center"))
    for team in (0, 1):
        rows = teams == team
        x = advantages[rows][mask[rows]]
        np.testing.assert_allclose(out[rows][mask[rows]], x - x.mean(), atol=1e-5)


def test_none_only_clears_what_is_masked():
    advantages, mask, teams = two_teams(np.random.default_rng(2))
    out = whiten(advantages, mask, teams, num_groups=2, mode="none")
    np.testing.assert_array_equal(out, np.where(mask, advantages, 0))


def test_a_team_of_one_stream_keeps_its_outcome():
    advantages = np.array([[1.0, 3.0], [-1.0, -3.0], [4.0, 4.0]], np.float32)
    mask = np.ones((3, 2), bool)
    out = np.asarray(whiten(advantages, mask, np.array([0, 0, 1]), num_groups=2))
    np.testing.assert_allclose(out[2], 4.0 / advantages.std(), rtol=1e-4)
    centred = whiten(advantages, mask, np.array([0, 0, 1]), num_groups=2, mode="center")
    np.testing.assert_allclose(centred[2], 4.0)


def test_streams_without_action_tokens_do_not_count():
    advantages = np.array([[2.0, 4.0], [9.0, 9.0]], np.float32)
    moments = team_moments(advantages, np.array([[1, 1], [0, 0]]), np.zeros(2, int), 2)
    np.testing.assert_allclose(moments.streams, [1, 0])
    np.testing.assert_allclose(moments.tokens, [2, 0])
    np.testing.assert_allclose(moments.mean, [3, 0])
    np.testing.assert_allclose(moments.std, [1, 0])


def test_equal_advantages_become_zero_not_noise():
    out = whiten(np.full((4, 6), 0.3, np.float32), np.ones((4, 6)))
    assert np.all(np.abs(out) < 0.1)


def test_an_empty_batch_is_all_zeros():
    out = whiten(jnp.full((2, 3), jnp.nan), np.zeros((2, 3)), np.zeros(2, int), num_groups=3)
    np.testing.assert_array_equal(out, 0.0)


def test_a_team_id_out_of_range_is_loud():
    out = whiten(np.ones((2, 3)), np.ones((2, 3)), np.array([0, 2]), num_groups=2)
    assert np.all(np.isnan(out[1]))


def test_refusals_name_the_value():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match="mode is 'batch'"):
        whiten(x, x, mode="batch")
    with pytest.raises(ValueError, match="num_groups is 2"):
        whiten(x, x, num_groups=2)
    with pytest.raises(ValueError, match=r"group_ids has shape \(3,\)"):
        whiten(x, x, np.zeros(3, int), num_groups=2)
