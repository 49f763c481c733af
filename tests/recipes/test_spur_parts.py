"""The parts of SPUR alone: guards, R, minibatches, thresholds, tests of items, cues."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxconv.llm import Journal, Settings
from jaxconv.llm.answers import parse
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.conversations import Turn
from jaxconv.llm.failures import InvalidAnswer
from jaxconv.recipes import spur_rubrics
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.spur_analysis import (
    _auc,
    balanced_accuracy,
    holm,
    item_tests,
    points_of,
    satisfaction_of,
)
from jaxconv.recipes.spur_features import FEATURES, hand_features
from jaxconv.recipes.spur_rules import REPEATS, Cues
from jaxconv.recipes.spur_tasks import (
    EXTRACTION,
    SCORING,
    SUMMARY,
    ExtractionInput,
    ItemScore,
    ItemScores,
    NumberedItem,
    Pattern,
    RubricItem,
    ScoringInput,
    SummaryInput,
)
from jaxconv.train.workdir import Workdir


def turns(*said: str) -> list[Turn]:
    roles = ("user", "assistant")
    return [Turn(number=i + 1, role=roles[i % 2], content=text) for i, text in enumerate(said)]


TALK = turns("Make a list.", "Here: thanks for asking", "Thanks a lot, <b>friend</b>.", "Bye")


@pytest.mark.parametrize(
    ("pattern", "quote", "message"),
    [
        ("glad", "thanks for asking", "does not stand in a turn of the user's"),  # the assistant's
        ("glad", "list. Thanks", "does not stand in a turn of the user's"),  # of two turns
        ("glad", "", "does not stand"),
        ("gave a thumbs up", "Thanks a lot", "mentions 'thumbs up'"),
        ("as the label says", "Thanks a lot", "mentions 'label'"),
    ],
)
def test_a_reason_has_words_of_the_user_and_does_not_know_the_label(pattern, quote, message):
    given = ExtractionInput(turns=TALK, satisfied=True)
    answer = f'{{"patterns": [{{"pattern": "{pattern}", "quote": "{quote}"}}]}}'
    with pytest.raises(InvalidAnswer) as refused:
        parse(EXTRACTION, given, answer)
    assert message in str(refused.value)


def test_none_is_a_fair_answer_and_a_quote_may_be_as_the_prompt_shows_it():
    given = ExtractionInput(turns=TALK, satisfied=True)
    assert parse(EXTRACTION, given, '{"patterns": []}').patterns == []
    shown = '{"patterns": [{"pattern": "x", "quote": "lot, &lt;b&gt;friend"}]}'
    assert len(parse(EXTRACTION, given, shown).patterns) == 1
    four = ", ".join(['{"pattern": "x", "quote": "Thanks"}'] * 4)
    with pytest.raises(InvalidAnswer):
        parse(EXTRACTION, given, f'{{"patterns": [{four}]}}')


def test_a_reason_may_speak_of_ratings_where_the_user_does():
    talk = turns("The rating of this hotel?", "Four stars.", "That Rating helps.")
    answer = '{"patterns": [{"pattern": "The user trusts the rating", "quote": "“that rating”"}]}'
    given = ExtractionInput(turns=talk, satisfied=True)
    assert len(parse(EXTRACTION, given, answer).patterns) == 1


ITEMS = [NumberedItem(id=id, name=id, description="") for id in ("S1", "S2", "D1")]
SCORED = ScoringInput(turns=TALK, sat=ITEMS[:2], dsat=ITEMS[2:])


NO = (False, "", 0)


def scored(*items: tuple[str, bool, str, int]) -> str:
    return ItemScores(
        items=[ItemScore(id=i, present=p, quote=q, score=s) for i, p, q, s in items]
    ).model_dump_json()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("S1", False, "", 0), ("D1", False, "", 0)], "there must be S1, S2, D1, each once"),
        ([("S1", False, "", 0)] * 2 + [("D1", False, "", 0)], "each once"),
        (
            [("S1", False, "", 3), ("S2", False, "", 0), ("D1", False, "", 0)],
            "S1: its score is 3; it must be 0 where it is not",
        ),
        (
            [("S1", True, "Thanks", 0), ("S2", False, "", 0), ("D1", False, "", 0)],
            "from 1 to 10 where it is shown",
        ),
        (
            [("S1", True, "Here", 2), ("S2", False, "", 0), ("D1", False, "", 0)],
            "S1: 'Here' does not stand in a turn of the user's",
        ),
    ],
)
def test_scores_name_every_item_once_with_the_users_words(items, message):
    with pytest.raises(InvalidAnswer) as refused:
        parse(SCORING, SCORED, scored(*items))
    assert message in str(refused.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(InvalidAnswer) as refused:
        parse(SCORING, SCORED, scored(("S1", True, "Here", 2), ("S2", False, "", 4), ("D1", *NO)))
    assert "S1: 'Here' does not" in str(refused.value) and "S2: its score" in str(refused.value)


def test_scores_as_numbers_by_hand():
    items = [ItemScore(id=i, present=p > 0, quote="", score=p) for i, p in (("D1", 4), ("S1", 9))]
    scores = {"a": ItemScores(items=[*items, ItemScore(id="S2", present=False, quote="", score=0)])}
    points = points_of(scores, ["b", "a"], ITEMS)
    assert points.tolist() == [[-1, -1, -1], [9, 0, 4]]
    assert satisfaction_of(points, ITEMS) == [None, 5] == [None, scores["a"].satisfaction]
    assert spur_rubrics.predict(points, ITEMS, 4.5) == [None, "sat"]


def test_balanced_accuracy_is_a_half_for_guessing_however_uneven_the_labels():
    truth = ["sat"] * 9 + ["dsat"]
    assert balanced_accuracy(["sat"] * 10, truth) == 0.5
    assert balanced_accuracy(["sat"] * 3 + ["dsat"] * 6 + [None], truth) is None
    assert balanced_accuracy(["sat"] * 3 + ["dsat"] * 6 + ["dsat"], truth) == (1 / 3 + 1) / 2


@given(st.lists(st.integers(0, 10), min_size=20, max_size=20))
def test_r_is_the_difference_of_both_sums_and_within_100(points):
    ids = [f"S{i}" for i in range(1, 11)] + [f"D{i}" for i in range(1, 11)]
    found = ItemScores(
        items=[
            ItemScore(id=id, present=p > 0, quote="", score=p)
            for id, p in zip(ids, points, strict=True)
        ]
    )
    assert found.satisfaction == sum(points[:10]) - sum(points[10:])
    assert -100 <= found.satisfaction <= 100


def test_minibatches_carry_the_rubric_and_the_last_one_may_be_small(tmp_path):
    seen = []

    class Remembers(Cues):
        def summarise(self, input):
            seen.append((len(input.patterns), [item.name for item in input.previous]))
            return super().summarise(input)

    said = [f"thing {i} is good" for i in range(7)]
    talks = [turns("ask", "answer", text) for text in said]
    cues = Remembers([*talks, turns("ask", "answer", "bad")], [True] * 7 + [False])
    patterns = [Pattern(pattern="says so", quote=text) for text in said]
    with Workdir(tmp_path / "run") as workdir, Journal() as journal:
        asked = Asking(Rules(), journal, Settings(), workdir=workdir)
        options = {"satisfied": True, "limit": 3, "batch": 3, "cues": cues}
        items = asked.in_step({"sat": spur_rubrics.summarise(patterns, **options)})["sat"]
    assert [count for count, _ in seen] == [3, 3, 1]
    assert seen[0][1] == [] and all(previous for _, previous in seen[1:])
    assert 1 <= len(items) <= 3
    assert len({e for item in items for e in item.examples}) == 7  # nothing is lost on the way


def test_a_rubric_has_names_that_differ_and_is_no_larger_than_asked():
    given = SummaryInput(satisfied=True, patterns=[], limit=1)
    item = RubricItem(name="a", description="").model_dump_json()
    for answer, message in (
        (f'{{"items": [{item}, {item}]}}', "there are 2; there may be 1 to 1"),
        ('{"items": []}', "there are 0; there may be 1 to 1"),
    ):
        with pytest.raises(InvalidAnswer) as refused:
            parse(SUMMARY, given, answer)
        assert message in str(refused.value)
    two = given.model_copy(update={"limit": 2})
    with pytest.raises(InvalidAnswer, match="'a' is there twice"):
        parse(SUMMARY, two, f'{{"items": [{item}, {item}]}}')


@pytest.mark.parametrize(
    ("scored", "threshold"),
    [
        ([(5, "sat"), (-5, "dsat")], 0.0),
        ([(5, "sat"), (3, "dsat"), (1, "dsat")], 4.0),
        ([(-1, "sat"), (-4, "sat"), (-9, "dsat")], -6.5),
        ([(2, "sat"), (2, "sat")], 0.0),
        ([(2, "dsat"), (2, "dsat")], 2.5),
        ([], 0.0),
    ],
)
def test_the_threshold_with_most_right_and_the_nearest_to_0(scored, threshold):
    assert spur_rubrics.tuned_threshold(scored) == threshold


def test_items_against_labels_by_hand():
    # 8 of 10 satisfied users show it, 2 of 10 others: chi-square = 20 (8*8 - 2*2)^2 / 10^4 = 7.2.
    satisfied = np.array([True] * 10 + [False] * 10)
    shown = np.array([[True] * 8 + [False] * 2 + [True] * 2 + [False] * 8, [True] * 20]).T
    first, all_show = item_tests(shown, satisfied)
    assert first.chi_square == pytest.approx(7.2) and first.shown == 10
    assert (first.sat, first.dsat) == (0.8, 0.2)
    # One degree of freedom: p is twice the normal tail at sqrt(7.2), and there are two items.
    assert first.p == pytest.approx(2 * 0.0072904, rel=1e-3)
    assert (all_show.chi_square, all_show.p) == (0.0, 1.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_auc_by_hand():
    said = np.array([[0.9], [0.8], [0.3], [0.3]])
    truth = np.array([[True], [False], [True], [False]])
    # Of four pairs: 0.9 above both, 0.3 below 0.8 and level with 0.3.
    assert _auc(said, truth)[0] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert np.isnan(_auc(said, np.ones((4, 1), bool))[0])


def test_cues_tell_requests_from_reactions_and_words_of_both_sides():
    talks, satisfied = [], []
    for i in range(30):
        topic = f"topic{i}"
        good = i % 2 == 0
        said = "That works!" if good else "Not what I asked."
        again = "" if good else f" Make a plan for {topic}."
        talks.append(turns(f"Make a plan for {topic}.", "Yes, that works!", f"{said}{again}"))
        satisfied.append(good)
    cues = Cues(talks, satisfied)
    found = [(r.quote, r.key) for r in cues.reactions(talks[1])]
    assert found == [
        ("Not what I asked.", "not what i asked"),
        ("Make a plan for topic1.", REPEATS),
    ]
    # A new request is none, and words of the assistant are nobody's.
    other = turns("Make a plan for topic1.", "That works!", "Make a plan for topic2.")
    assert cues.reactions(other) == []
    sat = cues.extract(ExtractionInput(turns=talks[0], satisfied=True)).patterns
    assert [p.quote for p in sat] == ["That works!"]
    assert cues.extract(ExtractionInput(turns=talks[0], satisfied=False)).patterns == []
    assert (
        cues.extract(ExtractionInput(turns=turns("only a request"), satisfied=True)).patterns == []
    )


def test_hand_features_are_finite_for_any_talk():
    assert hand_features(TALK).shape == (len(FEATURES),)
    for odd in (turns(""), turns("a"), [Turn(number=1, role="assistant", content="x")]):
        assert np.isfinite(hand_features(odd)).all()
