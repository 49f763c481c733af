"""A trait is seen in a reply's words, and comes with nothing else."""

import random
from itertools import combinations

import numpy as np
import pytest

from jaxconv.data.synthetic import assistant
from jaxconv.data.synthetic.assistant.generator import KINDS
from jaxconv.data.synthetic.assistant.style import (
    ADVERBS,
    CLOSINGS,
    OPENINGS,
    SOURCES,
    say,
)
from jaxconv.data.synthetic.assistant.truth import read

TRAITS = assistant.TRAITS


@pytest.fixture(scope="module")
def traits_RT(exchanges):
    """Which reply has which trait."""
    return np.array([[t in assistant.style(reply) for t in TRAITS] for _, reply, _ in exchanges])


def test_a_reply_has_the_traits_that_it_was_given(exchanges):
    rng = random.Random(0)
    for prompt, _, _ in exchanges[:50]:
        answer, user = read(prompt)
        for size in range(len(TRAITS) + 1):
            for traits in combinations(TRAITS, size):
                assert assistant.style(say(answer, user, traits, rng)) == set(traits)


def test_style_is_seen_in_other_words():
    assert assistant.style("") == {"plain"}
    assert assistant.style("ADA, I read 3! Need something else?") == set(TRAITS)
    assert assistant.style("There are basically 3 of them.") == set()


@pytest.mark.parametrize("phrases", [OPENINGS, SOURCES, ADVERBS, CLOSINGS])
def test_phrases_with_a_trait_have_as_many_words_as_those_without(phrases):
    with_trait, without = ([len(phrase.split()) for phrase in side] for side in phrases)
    assert with_trait == without


def test_each_trait_is_in_half_of_the_replies(traits_RT):
    error = 4 * 0.5 / np.sqrt(len(traits_RT))
    np.testing.assert_allclose(traits_RT.mean(0), 0.5, atol=error)


def test_traits_come_independently_of_each_other(traits_RT):
    correlation = np.corrcoef(traits_RT.T) - np.eye(len(TRAITS))
    assert np.abs(correlation).max() < 4 / np.sqrt(len(traits_RT))


def test_traits_come_independently_of_length_and_content(exchanges, traits_RT):
    words = np.array([len(reply.split()) for _, reply, _ in exchanges])
    asked = np.array([[kind == k for k in KINDS] for _, _, kind in exchanges])
    numbers = np.array([read(prompt)[0].number or 0 for prompt, _, _ in exchanges])
    for column in (words, numbers, *asked.T):
        for has in traits_RT.T:
            assert abs(np.corrcoef(column, has)[0, 1]) < 4 / np.sqrt(len(words))
