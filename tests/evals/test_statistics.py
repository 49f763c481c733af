"""Intervals: coverage by simulation, known answers, degenerate samples."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.evals.statistics import (
    Estimate,
    bootstrap_mean,
    mean_of_few,
    paired_difference,
    proportion,
    ratio,
    with_repetitions,
)


def coverage(estimate, truth, trials):
    """Share of `trials` whose interval holds `truth`; estimate(rng, seed) makes one."""
    hits = 0
    for k in range(trials):
        low, high = estimate(np.random.default_rng(k), k).ci95
        hits += low <= truth <= high
    return hits / trials


def test_an_estimate_is_json_able_and_readable():
    estimate = bootstrap_mean(np.arange(10.0), seed=0, unit="score")
    again = json.loads(json.dumps(dataclasses.asdict(estimate)))
    assert again["value"] == 4.5 and again["n"] == 10 and again["unit"] == "score"
    assert again["ci95"] == list(estimate.ci95)
    assert str(Estimate(0.5, (0.25, 0.75), 8, "rate")) == "0.5 [0.25, 0.75] rate (n=8)"
    assert str(Estimate(3.0, None, 1, "steps")) == "3 steps (n=1)"


def test_the_mean_interval_is_that_of_the_normal_theory_for_a_large_sample():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=4000)
    estimate = bootstrap_mean(x, seed=1, unit="")
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert estimate.value == pytest.approx(x.mean())
    np.testing.assert_allclose(estimate.ci95, [x.mean() - half, x.mean() + half], atol=0.1 * half)


def test_coverage_of_the_mean():
    share = coverage(
        lambda rng, k: bootstrap_mean(rng.exponential(size=80), seed=k, unit="", resamples=1000),
        truth=1.0,
        trials=300,
    )
    assert 0.91 <= share <= 0.98


def test_clusters_keep_the_coverage_that_single_turns_lose():
    def turns(rng):  # 40 episodes of 8 turns that share most of their luck
        episode = np.repeat(np.arange(40), 8)
        return rng.normal(size=40)[episode] + 0.3 * rng.normal(size=320), episode

    def clustered(rng, k):
        x, episode = turns(rng)
        return bootstrap_mean(x, seed=k, unit="", clusters=episode, resamples=1000)

    def single(rng, k):
        return bootstrap_mean(turns(rng)[0], seed=k, unit="", resamples=1000)

    assert coverage(clustered, 0.0, 200) >= 0.90
    assert coverage(single, 0.0, 200) < 0.70


def test_clusters_count_units_and_leave_the_mean_alone():
    x, labels = np.array([1.0, 2.0, 3.0, 10.0]), ["a", "a", "a", "b"]
    estimate = bootstrap_mean(x, seed=0, unit="", clusters=labels)
    assert estimate.n == 2
    assert estimate.value == 4.0


def test_pairing_takes_out_what_both_sides_share():
    rng = np.random.default_rng(0)
    luck = 10 * rng.normal(size=400)
    a, b = luck + 0.3 + 0.5 * rng.normal(size=400), luck
    estimate = paired_difference(a, b, seed=0, unit="score")
    assert estimate.value == pytest.approx(np.mean(a - b))
    assert estimate.ci95[0] > 0
    assert estimate.ci95[1] - estimate.ci95[0] < 0.15
    mirrored = paired_difference(b, a, seed=0, unit="score")
    assert mirrored.value == -estimate.value
    assert mirrored.ci95[1] < 0


def test_the_null_is_rejected_at_its_rate():
    share = coverage(
        lambda rng, k: paired_difference(
            rng.normal(size=100), rng.normal(size=100), seed=k, unit="", resamples=1000
        ),
        truth=0.0,
        trials=300,
    )
    assert 0.91 <= share <= 0.98


def test_wilson_by_hand():
    # Wilson 1927 at z = 1.959964: 8 of 10
    estimate = proportion(8, 10)
    np.testing.assert_allclose(estimate.ci95, [0.4902, 0.9433], atol=1e-4)
    assert estimate == Estimate(0.8, estimate.ci95, 10, "rate")


@pytest.mark.parametrize("p", [0.02, 0.3, 0.95])
def test_wilson_coverage(p):
    k = np.arange(61)
    from scipy.stats import binom

    held = [low <= p <= high for low, high in (proportion(int(i), 60).ci95 for i in k)]
    assert binom.pmf(k, 60, p) @ np.array(held) > 0.92  # exact, over every outcome


def test_wilson_has_width_where_a_bootstrap_has_none():
    low, high = proportion(0, 20).ci95
    assert low == pytest.approx(0.0, abs=1e-12) and 0.1 < high < 0.2
    assert proportion(1, 1).ci95[0] < 0.5


def test_ratio_is_of_sums_over_units():
    invalid, turns = np.array([1.0, 0.0, 2.0, 0.0]), np.array([10.0, 5.0, 5.0, 0.0])
    estimate = ratio(invalid, turns, seed=0, unit="rate")
    assert estimate.value == pytest.approx(3 / 20)
    assert estimate.n == 3  # an episode without turns says nothing
    assert 0.0 <= estimate.ci95[0] <= 0.15 <= estimate.ci95[1] <= 0.4


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(x, seed=3, unit="") == bootstrap_mean(x, seed=3, unit="")
    assert bootstrap_mean(x, seed=3, unit="") != bootstrap_mean(x, seed=4, unit="")


@settings(max_examples=25, deadline=None)
@given(
    x=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12),
    labels=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_every_interval_is_finite_and_within_the_data(x, labels):
    labels = labels[: len(x)]
    if len(set(labels)) > 1:
        estimate = bootstrap_mean(x, seed=0, unit="", clusters=labels, resamples=200)
        slack = 1e-9 * max(1.0, max(map(abs, x)))
        assert min(x) - slack <= estimate.ci95[0] <= estimate.ci95[1] <= max(x) + slack


@pytest.mark.filterwarnings("error")
def test_units_that_agree_have_no_width_and_no_warning():
    assert bootstrap_mean([2.0] * 9, seed=0, unit="").ci95 == (2.0, 2.0)
    # equal but for rounding: means of 0.1 added three times and one time
    x, labels = [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 1]
    low, high = bootstrap_mean(x, seed=0, unit="", clusters=labels).ci95
    assert low == high == pytest.approx(0.1)


def test_too_little_data_is_refused():
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match=f"there are {len(values)} independent units"):
            bootstrap_mean(values, seed=0, unit="")
    with pytest.raises(ValueError, match="there are 1 independent units"):
        bootstrap_mean([1.0, 2.0], seed=0, unit="", clusters=[7, 7])
    with pytest.raises(ValueError, match="there are 0 independent units"):
        ratio([0.0, 0.0], [0.0, 0.0], seed=0, unit="")
    with pytest.raises(ValueError, match="n is 0"):
        proportion(0, 0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="values holds 1 non-finite"):
        bootstrap_mean([1.0, np.nan], seed=0, unit="")
    with pytest.raises(ValueError, match=r"values has shape \(2, 2\)"):
        bootstrap_mean(np.ones((2, 2)), seed=0, unit="")
    with pytest.raises(ValueError, match="pairs need the same"):
        paired_difference([1.0, 2.0], [1.0], seed=0, unit="")
    with pytest.raises(ValueError, match="clusters have shape"):
        bootstrap_mean([1.0, 2.0], seed=0, unit="", clusters=[1])
    with pytest.raises(ValueError, match=r"a denominator is -1\.0"):
        ratio([1.0, 1.0], [2.0, -1.0], seed=0, unit="")
    with pytest.raises(ValueError, match="successes is 5"):
        proportion(5, 4)


def test_a_thousand_episodes_take_well_under_a_second():
    x = np.random.default_rng(0).normal(size=1024)
    bootstrap_mean(x, seed=0, unit="")  # scipy is imported
    start = time.process_time()
    bootstrap_mean(x, seed=0, unit="", resamples=5000)
    assert time.process_time() - start < 1.0


def test_the_mean_of_a_few_has_students_interval():
    found = mean_of_few([0.4, 0.5, 0.6], unit="rate")
    assert found.value == pytest.approx(0.5) and found.n == 3
    # t of 0.975 with 2 degrees of freedom is 4.3027, the deviation 0.1.
    assert found.ci95[1] - 0.5 == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="1 values"):
        mean_of_few([1.0], unit="rate")


def test_repetitions_widen_an_interval_within_its_bounds():
    one = Estimate(0.5, (0.4, 0.6), 100, "rate")
    assert with_repetitions(one, [0.5], within=(0, 1)) == one
    assert with_repetitions(one, [0.5] * 5, within=(0, 1)).ci95 == pytest.approx(one.ci95)
    half = np.diff(mean_of_few([0.4, 0.5, 0.6], unit="rate").ci95)[0] / 2
    found = with_repetitions(one, [0.4, 0.5, 0.6], within=(0, 1))
    assert found.ci95 == pytest.approx((0.5 - np.hypot(0.1, half), 0.5 + np.hypot(0.1, half)))
    assert with_repetitions(one, [0.1, 0.9], within=(0, 1)).ci95 == (0, 1)
