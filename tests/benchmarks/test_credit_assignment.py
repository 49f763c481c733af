"""The relay world, and how the comparison of estimators keeps and sums up its runs."""

import itertools
import json
import sys
from pathlib import Path

import pytest

from jaxconv.errors import Refused

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import credit_assignment
import relay_world
from relay_world import LETTERS, PAY, Relay, answer, scripted_episode


def test_a_perfect_script_scores_one_and_both_are_paid_once_at_the_end():
    env = Relay(12)
    step = env.reset(3)
    said = dict.fromkeys(env.agents, 0)
    while step.to_act:
        assert not step.rewards and not step.terminated
        (speaker,) = step.to_act
        said[speaker] += 1
        question = step.observations[speaker][-1].content.split()[2:]
        step = env.step({speaker: " ".join(answer(env.state_dict()["code"], question))})
    assert said == {"ann": 12, "bob": 12}
    assert step.terminated and not step.truncated
    assert step.rewards == {"ann": PAY, "bob": PAY}


@pytest.mark.parametrize("pattern", list(itertools.product([True, False], repeat=4)))
def test_a_point_needs_a_right_turn_after_a_right_one(pattern):
    env = Relay(2)
    step = env.reset(0)
    points = 0
    for turn, right in enumerate(pattern):
        (speaker,) = step.to_act
        shown, left, *question = step.observations[speaker][-1].content.split()
        assert (int(shown), int(left)) == (points, 4 - turn)
        a, b = answer(env.state_dict()["code"], question)
        wrong = next(letter for letter in LETTERS if letter != a)
        step = env.step({speaker: f"{a if right else wrong} {b}"})
        points += right and (turn == 0 or pattern[turn - 1])
    assert step.infos["ann"]["score"] == step.infos["bob"]["score"] == points / 4
    assert step.infos["ann"]["right"] == sum(pattern) / 4
    assert step.rewards["ann"] == PAY * points / 4


@pytest.mark.parametrize("text", ["", "a", "a b c", "a z", "ab c", "a bc", "A b"])
def test_what_is_not_two_letters_is_invalid_and_the_question_is_asked_again(text):
    env = Relay(2)
    (speaker,) = env.reset(5).to_act
    question = env.state_dict()["question"]
    step = env.step({speaker: text})
    assert step.infos[speaker] == {"valid": False}
    (other,) = step.to_act
    assert other != speaker
    assert step.observations[other][-1].content.split() == ["0", "3", *question]


def test_an_episode_goes_on_from_its_state():
    def rest(env):
        out = []
        for words in ("a b", "c d", "e f", "g h", "a a", "b b"):
            speaker = env._speaker()
            out.append(env.step({speaker: words}))
        return out

    first, second = Relay(4), Relay(4)
    first.reset(7)
    first.step({first._speaker(): "a c"})
    first.step({first._speaker(): "d d"})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rest(first) == rest(second)


def test_codes_are_different_permutations():
    tables = [tuple(t[letter] for letter in LETTERS) for t in relay_world.TABLES.values()]
    assert len(set(tables)) == len(relay_world.CODES)
    assert all(sorted(t) == sorted(LETTERS) for t in tables)


def test_scripts_are_right_as_often_as_they_should_be():
    right = [scripted_episode(12, 0.7, seed).infos["ann"]["right"] for seed in range(200)]
    a_letter = 0.7 + 0.3 / len(LETTERS)
    assert sum(right) / len(right) == pytest.approx(a_letter**2, abs=0.03)


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "runs.json"
    results = credit_assignment.read(credit_assignment.Settings(), path)
    results["runs"]["a"] = {"seed": 1, "log": {"score": [0.5]}}
    path.write_text(credit_assignment.compact_json(results))
    assert credit_assignment.read(credit_assignment.Settings(), path) == results
    with pytest.raises(Refused, match="other settings"):
        credit_assignment.read(credit_assignment.Settings(iterations=3), path)


def test_the_interval_over_seeds_is_that_of_student():
    estimate = credit_assignment.over_seeds([1.0, 2.0, 3.0], "score")
    half = 4.302653 / 3**0.5  # 97.5 % point with two degrees of freedom
    assert estimate.value == 2.0 and estimate.n == 3
    assert estimate.ci95 == pytest.approx((2.0 - half, 2.0 + half), rel=1e-6)


def test_the_table_pairs_each_variant_with_the_default_by_seed():
    def run(variant, seed, gain):
        log = {"score": [0.0, 0.0, 0.4], "explained_variance": [0.0, 0.0, 0.25]}
        return {
            "variant": variant,
            "seed": seed,
            "warm_start": 0.3,
            "gain": {"value": gain},
            "log": log,
        }

    other = "token GAE, λ 1"
    runs = [run(credit_assignment.DEFAULT, s, 0.1 * s) for s in range(3)]
    runs += [run(other, s, 0.1 * s + 0.2) for s in range(1, 4)]
    results = {"settings": {"critic_warmup": 2}, "runs": dict(enumerate(runs))}
    [row] = [line for line in credit_assignment.table(results) if line.startswith(f"| {other} |")]
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert cells[2] == "+0.200 [+0.200, +0.200]"  # over seeds 1 and 2, which both have
    assert cells[3] == "2 of 2"
    assert cells[4].startswith("+0.100") and cells[5] == "0.25"
