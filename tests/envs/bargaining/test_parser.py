"""What people may also say, and what nobody can mean."""

import pytest

from jaxconv.envs.bargaining.language import Act
from jaxconv.envs.bargaining.parser import MAX_CHARACTERS, clean, tells_number, understand
from jaxconv.envs.bargaining.scenario import ISSUES, ITEMS, Setting

TWO = Setting("division", ("Ann", "Bob"), ITEMS, (2, 1, 3))
FOUR = Setting("division", ("Ann", "Bob", "Cal", "Dan"), ITEMS, (4, 2, 3))
TERMS = Setting("terms", ("Ann", "Bob"), ISSUES[:2], ())


@pytest.mark.parametrize(
    ("text", "mine"),
    [
        ("I take 2 books and a hat.", (2, 1, 0)),
        ("i'll take both books, the hat and all of the balls", (2, 1, 3)),
        ("I’d like all books!", (2, 0, 0)),
        ("Bob gets one hat.", (2, 0, 3)),
        ("Ann takes one ball, Bob gets the rest.", (0, 0, 1)),
        ("I keep two books, you get the rest.", (2, 0, 0)),
        ("You get one hat and I take two books and three balls.", (2, 0, 3)),
        ("So how about I get no books, three balls?", (0, 0, 3)),
        ("Bob, I want everything.", (2, 1, 3)),
        ("I take nothing, Bob.", (0, 0, 0)),
    ],
)
def test_tolerant_offers_from_ann(text, mine):
    rest = tuple(whole - part for whole, part in zip(TWO.counts, mine, strict=True))
    heard = understand(TWO, 0, text)
    assert (heard.reason, heard.acts) == (None, (Act("propose", (mine, rest)),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t.", "empty"),
        ("Blub.", "unknown"),
        ("I take three books.", "impossible"),
        ("I take two books, you get one book.", "impossible"),
        ("I take one book and one book.", "unknown"),
        ("I take two books, you get one hat.", "incomplete"),
        ("I take the rest, you get the rest.", "conflict"),
        ("I take one book. I take two books.", "conflict"),
        ("Deal. I take one book.", "conflict"),
        ("Deal. No.", "conflict"),
        ("Thank you. Thank you.", "conflict"),
        ("Cal gets one book.", "topic"),
        ("I care most about the price.", "topic"),
        ("I propose low price and low fee.", "topic"),
        ("Hello. Thank you. No deal yet. I take one book.", "long"),
        ("I take one book. Blub.", "unknown"),
        ("I take eleven books.", "unknown"),
        ("My limit is fifty points.", "unknown"),
        ("one book", "unknown"),
    ],
)
def test_what_does_nothing_and_why(text, reason):
    assert understand(TWO, 0, text).reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I propose low price.", "incomplete"),
        ("I propose low price and high price.", "unknown"),
        ("I propose low price, high fee and low bonus.", "topic"),
        ("I take one book.", "topic"),
        ("I propose low price and huge fee.", "unknown"),
    ],
)
def test_terms_that_do_nothing(text, reason):
    assert understand(TERMS, 0, text).reason == reason


def test_several_agents_need_names():
    offer = ((1, 0, 0), (0, 2, 0), (3, 0, 3), (0, 0, 0))
    heard = understand(FOUR, 0, "I take one book, Bob gets two hats and Cal gets the rest.")
    assert heard.acts == (Act("propose", offer),)
    assert understand(FOUR, 0, "You get two hats, Cal gets the rest.").reason == "unknown"
    assert understand(FOUR, 0, "I take one book.").reason == "incomplete"
    assert understand(FOUR, 0, "I take one book, Bob gets one hat.").reason == "incomplete"
    all_but_dan = "I take one book, Bob gets two hats, Cal gets three balls."
    assert understand(FOUR, 0, all_but_dan).acts[0].detail[3] == (3, 0, 0)


def test_understood_sentences_of_an_invalid_utterance_are_kept():
    heard = understand(TWO, 0, "You are a fool. Blub.")
    assert heard.reason == "unknown" and heard.acts == (Act("rude"),)


def test_clean():
    assert clean("a\n\tb\x00\x1b  c\u2028d\x85") == "a b c d"
    assert len(clean("word " * 100)) <= MAX_CHARACTERS
    assert clean("caf\u00e9 \ud800") == "café ?"
    once = clean("x" * (MAX_CHARACTERS - 1) + "  y")
    assert clean(once) == once


def test_numbers_are_found_in_garbled_text():
    assert tells_number("my limit four", 4)
    assert tells_number("Never under 4, pal", 4)
    assert not tells_number("my limit fourteen", 4)
    assert not tells_number("four books please", 4)
    assert not tells_number("my limit is five", 4)
