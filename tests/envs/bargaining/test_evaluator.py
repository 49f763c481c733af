"""Every dimension by hand."""

import pytest

from jaxconv.envs.bargaining.evaluator import evaluate
from jaxconv.envs.bargaining.scenario import ITEMS, Private, Scenario, Setting
from jaxconv.envs.dimensions import DIMENSIONS, complete_weights, normalised, overall
from jaxconv.errors import Refused

# Ann: two books are worth 8, a hat 1, a ball 1. Bob: a book 1, the hat 5, the ball 3.
ANN = Private((4, 1, 1), (), 4, "calm", "baker")
BOB = Private((1, 5, 3), (), 3, "calm", "nurse")
SETTING = Setting("division", ("Ann", "Bob"), ITEMS, (2, 1, 1))


def scores(*said, ann=ANN, bob=BOB, utterances=20):
    return evaluate(Scenario(SETTING, (ann, bob), utterances, 0), said)


def trait(private, name):
    return Private(private.values, private.wants, private.limit, name, private.occupation)


def test_a_plain_good_deal():
    # Ann gets two books: 8 points, limit 4. Bob gets hat and ball: 8 points, limit 3.
    result = scores("I take two books.", "Deal.")
    assert result["Ann"] == {
        "believability": 10.0,
        "relationship": 4.0,
        "knowledge": 3.0,
        "secret": 0.0,
        "social_rules": 0.0,
        "financial_and_material_benefits": pytest.approx(5 * 4 / 6),
        "goal": 8.0,
    }
    assert result["Bob"] == result["Ann"] | {
        "financial_and_material_benefits": pytest.approx(5 * 5 / 7)
    }


def test_goal_and_money_below_the_limit():
    # Ann takes nothing but a ball: 1 point. Bob gets 7.
    result = scores("I take one ball.", "Deal.")
    assert result["Ann"]["goal"] == 0.0
    assert result["Ann"]["financial_and_material_benefits"] == -5 * 3 / 4
    assert result["Ann"]["believability"] == 8.0  # offered what is below its own limit
    assert result["Bob"]["goal"] == 7.0
    # Bob accepts 1 point, two below his limit.
    result = scores("I take one hat, one ball and one book.", "Deal.")
    assert result["Bob"]["goal"] == 0.0
    assert result["Bob"]["financial_and_material_benefits"] == pytest.approx(-5 * 2 / 3)
    assert result["Bob"]["believability"] == 8.0


def test_no_deal_is_worth_nothing():
    result = scores("I take two books.", "I walk away.", bob=trait(BOB, "frank"))
    for agent in ("Ann", "Bob"):
        assert result[agent]["goal"] == 0 == result[agent]["financial_and_material_benefits"]
    assert result["Ann"]["relationship"] == -2.0
    assert result["Bob"]["relationship"] == -3.0


def test_relationship_fairness_courtesy_openness():
    # Ann 9, Bob 3: she is 6 ahead.
    result = scores("I take two books and one hat.", "Thank you. Deal.")
    assert result["Ann"]["relationship"] == pytest.approx(4 - 0.7 * 6)
    assert result["Bob"]["relationship"] == 4.5
    result = scores("Hello. I care most about the books. I take two books.", "Deal.")
    assert result["Ann"]["relationship"] == 5.0
    result = scores("You are a fool. I take two books.", "Deal.")
    assert result["Ann"]["relationship"] == 2.0


def test_courtesy_pays_once():
    once = scores("Hello. I take two books.", "Deal.")
    twice = scores("Hello.", "Hello.", "Thank you. I take two books.", "Deal.")
    assert twice["Ann"]["relationship"] == once["Ann"]["relationship"] == 4.5
    assert twice["Ann"]["believability"] < once["Ann"]["believability"]


def test_knowledge_is_what_others_truly_showed():
    said = ["What matters most to you?", "I care most about the hat. I do not need the books."]
    result = scores(*said, "I take two books.", "Deal.")
    assert result["Ann"]["knowledge"] == 10.0
    assert result["Bob"]["knowledge"] == 3.0
    lied = scores(said[0], "I care most about the ball.", "I take two books.", "No.", utterances=4)
    assert lied["Ann"]["knowledge"] == 0.0
    assert lied["Bob"]["social_rules"] == -3.0
    garbled = scores(said[0], "I care most about the hat. Blub.", utterances=2)
    assert garbled["Ann"]["knowledge"] == 0.0


def test_knowledge_is_the_mean_over_the_others():
    setting = Setting("division", ("Ann", "Bob", "Cal"), ITEMS, (2, 1, 1))
    scenario = Scenario(setting, (ANN, BOB, BOB), 3, 0)
    result = evaluate(scenario, ["Hello.", "I care most about the hat.", "Hello."])
    assert [result[a]["knowledge"] for a in setting.agents] == [2.5, 0.0, 2.5]


def test_secret_and_lies_about_the_limit():
    leak = scores("I cannot go below four points. I take two books.", "Deal.")
    assert leak["Ann"]["secret"] == -10.0 and leak["Ann"]["social_rules"] == 0.0
    bluff = scores("I cannot go below six points. I take two books.", "Deal.")
    assert bluff["Ann"]["secret"] == 0.0 and bluff["Ann"]["social_rules"] == -3.0
    garbled = scores("my limit be 4 ok", utterances=1)
    assert garbled["Ann"]["secret"] == -10.0
    others = scores("I need at least three points.", utterances=1)  # the number of Bob
    assert others["Ann"]["secret"] == 0.0


def test_social_rules():
    assert scores("Blub.", utterances=1)["Ann"]["social_rules"] == -2.0
    assert scores("You are a fool. Blub.", utterances=1)["Ann"]["social_rules"] == -5.0
    said = ["You are a fool."] * 4
    mixed = [line for text in said for line in (text, "Hello.")]
    assert scores(*mixed, utterances=8)["Ann"]["social_rules"] == -10.0  # clipped from -12


def test_a_question_wants_an_answer_once():
    ask = "What do you need?"
    ignored = scores(ask, "Hello.", ask, "Thank you.", utterances=4)
    assert ignored["Bob"]["social_rules"] == -1.0
    answered = scores(ask, "I need the hat most.", ask, "Hello.", utterances=4)
    assert answered["Bob"]["social_rules"] == 0.0
    closed = scores(f"I take two books. {ask}", "Deal.")
    assert closed["Bob"]["social_rules"] == 0.0


def test_believability_repetition_and_idling():
    said = ["I take two books.", "Hello.", "I take two books.", "Thank you.", "I keep two books."]
    result = scores(*said, utterances=5)
    # Ann: word for word -2; the same offer in other words -1. Bob: two turns of courtesy alone.
    assert result["Ann"]["believability"] == 7.0
    assert result["Bob"]["believability"] == 8.0


def test_believability_rising_demands_and_refusing_ones_own_terms():
    result = scores("I take one book.", "Hello.", "I take two books.", "No.", utterances=4)
    assert result["Ann"]["believability"] == 8.0
    result = scores("I take two books.", "You get two books and one hat.", "No.", utterances=3)
    assert result["Ann"]["believability"] == 8.0
    result = scores("I take two books.", "You get two books and one hat.", "Deal.")
    assert result["Ann"]["believability"] == 10.0


def test_believability_invalid_turns():
    assert scores("Blub.", "Hello.", "Blab.", utterances=3)["Ann"]["believability"] == 4.0


def test_questions_are_news_twice_and_only_while_unanswered():
    asks = ["What do you need?", "What do you want most?", "What is important to you?"]
    said = [asks[0], "No.", asks[1], "No.", asks[2], "No."]
    assert scores(*said, utterances=6)["Ann"]["believability"] == 9.0
    said = [asks[0], "I need the hat most.", asks[1]]
    assert scores(*said, utterances=3)["Ann"]["believability"] == 9.0


@pytest.mark.parametrize(
    ("name", "in_character", "out"),
    [
        ("polite", "Thank you. I take one book.", "I take one book."),
        ("curious", "I take one book. What do you need?", "I take one book."),
        ("frank", "I need the books most. I take one book.", "I need the hat most."),
        ("terse", "I take one book.", "I need the books most. I take one book and one hat."),
        ("calm", "No. I take one book.", "You are greedy. I take one book."),
    ],
)
def test_traits_show(name, in_character, out):
    ann = trait(ANN, name)
    first = "I take two books."
    offer = "I take one hat."
    lost = {
        text: scores(first, offer, text, ann=ann, utterances=3)["Ann"]["believability"]
        for text in (in_character, out)
    }
    assert lost[in_character] - lost[out] >= 2.0
    alone = scores(out, ann=ann, utterances=1)["Ann"]["believability"]
    assert alone == 10.0  # one turn shows nobody's character


def test_who_never_spoke_has_done_nothing_wrong():
    result = scores("I walk away.")
    assert result["Bob"]["believability"] == 10.0 and result["Bob"]["relationship"] == -2.0


def test_one_number_of_seven():
    low = {name: bounds[0] for name, bounds in DIMENSIONS.items()}
    high = {name: bounds[1] for name, bounds in DIMENSIONS.items()}
    weights = complete_weights({})
    assert normalised(low, weights) == 0.0 and normalised(high, weights) == 1.0
    assert overall(low) == pytest.approx(-30 / 7) and overall(high) == pytest.approx(40 / 7)
    only_goal = complete_weights(dict.fromkeys(DIMENSIONS, 0.0) | {"goal": 2.0})
    assert normalised(low | {"goal": 5.0}, only_goal) == 0.5


@pytest.mark.parametrize(
    "weights", [{"luck": 1.0}, {"goal": -1.0}, {"goal": float("nan")}, dict.fromkeys(DIMENSIONS, 0)]
)
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(Refused, match="weights"):
        complete_weights(weights)
