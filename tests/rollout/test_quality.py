"""Which turns the filter flags, and that its verdicts stand beside the right turns."""

import pytest

from jaxconv.rollout.quality import REASONS, QualityRules, degenerate, review
from jaxconv.rollout.selfplay import Game, Played
from jaxconv.rollout.stream import Stream

RULES = QualityRules(repeated_ngram=2, repeats=3, min_logprob=-2.0)
END = 1


@pytest.mark.parametrize(
    ("text", "logprobs", "reason"),
    [
        ("I want 3 books", [-0.5, -1.0], None),
        ("", [-0.5], "empty"),
        (" \n", [-0.5], "empty"),
        ("a b a b a b", [-0.5], "repetition"),
        ("a b a b c a", [-0.5], None),  # twice only
        ("a a a a", [-0.5], "repetition"),
        ("xq zv", [-1.0, -3.5], "gibberish"),
        ("xq zv", [-1.0, -3.0], None),  # a mean of just -2
    ],
)
def test_a_turn_is_flagged_for_one_reason(text, logprobs, reason):
    assert degenerate(text, logprobs, RULES) == reason


def played(*turns: tuple[str, list[int], list[float]]) -> Played:
    """One game in which seat 0 says `turns` and seat 1 is a script."""
    stream = Stream()
    for _, tokens, logprobs in turns:
        stream.hear([9, 9])
        stream.say(tokens, logprobs, [0.0] * len(tokens))
    return Played(
        game=Game(0, 0, ("model", "script")),
        agents=("a", "b"),
        teams=("all", "all"),
        streams=[stream, Stream()],
        turn_rewards=[[0.0] * len(turns), [0.0]],
        texts=[[text for text, _, _ in turns], [""]],
        valid=[[True] * len(turns), [True]],
        rewards=[0.0, 0.0],
        infos=[{}, {}],
        transcript=[],
        brief=["", ""],
    )


def test_verdicts_stand_beside_sampled_turns_alone():
    games = [
        played(("I agree", [5, END], [-0.1, -0.1]), ("", [END], [-0.1])),
        played(("cut off", [5, 6], [-0.1, -0.1]), ("xq", [7, END], [-9.0, -0.1])),
    ]
    verdicts, shares = review(games, END, RULES)
    # What was cut at its budget is counted, but keeps its credit and so its cost.
    assert verdicts == [[[True, False], []], [[True, False], []]]
    assert shares == {"empty": 0.25, "repetition": 0, "gibberish": 0.25, "unfinished": 0.25}
    assert set(shares) == {*REASONS, "unfinished"}


def test_a_stream_refuses_records_that_do_not_match():
    with pytest.raises(ValueError, match="2 tokens, 1 log-probs, 2 values"):
        Stream().say([1, 2], [0.0], [0.0, 0.0])
