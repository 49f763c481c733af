"""Who speaks, what stands, when it is over."""

import pytest

from jaxconv.envs.bargaining.rules import Table, replay
from jaxconv.envs.bargaining.scenario import ITEMS, Private, Scenario, Setting

NAMES = ("Ann", "Bob", "Cal")


def scenario(players=2, utterances=8, first=0):
    setting = Setting("division", NAMES[:players], ITEMS, (2, 1, 3))
    private = Private((2, 3, 1), (), 4, "calm", "baker")
    return Scenario(setting, (private,) * players, utterances, first)


def test_two_make_a_deal():
    table = replay(scenario(), ["I take two books.", "You get two books and one hat.", "Deal."])
    assert table.end == "deal" and table.deal == ((2, 1, 0), (0, 0, 3))
    assert [turn.seat for turn in table.turns] == [0, 1, 0]


def test_first_mover_and_round_robin():
    table = replay(scenario(3, first=2), ["Hello.", "Thank you.", "No deal yet."])
    assert [turn.seat for turn in table.turns] == [2, 0, 1] and table.seat == 2
    assert table.turns[2].reason == "no offer"


def test_all_others_must_accept_the_same_offer():
    said = ["I take two books, Bob gets one hat, Cal gets the rest.", "Deal."]
    table = replay(scenario(3), [*said, "Cal gets one hat, Bob gets the rest."])
    assert table.end is None and not table.accepted
    table.speak("Deal.")
    assert table.end is None
    table.speak("I accept.")
    assert table.end == "deal" and table.deal == ((0, 0, 0), (2, 0, 3), (0, 1, 0))


def test_a_rejection_takes_ones_acceptance_back_and_leaves_the_offer():
    table = replay(scenario(3), ["Bob gets one hat, Cal gets the rest.", "Deal."])
    for text in ("No.", "Hello.", "No.", "Deal."):  # Cal, Ann, Bob, Cal
        table.speak(text)
    assert table.end is None and table.accepted == {2}


def test_nothing_to_accept_and_own_offer():
    table = replay(scenario(), ["Deal."])
    assert table.turns[0].reason == "no offer"
    table = replay(scenario(), ["I take one book.", "Hello.", "Deal."])
    assert table.turns[2].reason == "own offer" and table.end is None


def test_invalid_words_leave_the_offer():
    table = replay(scenario(), ["I take one book.", "Blub.", "Hello.", "Deal."])
    assert table.end == "deal" and table.deal[0] == (1, 0, 0)


def test_leaving_and_the_limit():
    assert replay(scenario(3), ["I walk away."]).end == "left"
    assert replay(scenario(utterances=2), ["Hello.", "Hello."]).end == "limit"
    last = replay(scenario(utterances=2), ["I take one book.", "Deal."])
    assert last.end == "deal"
    with pytest.raises(ValueError, match="ended"):
        replay(scenario(utterances=1), ["Hello.", "Hello."])


def test_a_table_begins_empty():
    table = Table(scenario(first=1))
    assert table.seat == 1 and table.deal is None and table.end is None
