"""In a pair, the planted traits tell which reply was chosen, and nothing else does."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from jaxconv.data.synthetic import assistant
from jaxconv.data.synthetic.assistant.truth import facts
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused

TRAITS = assistant.TRAITS
N = 1000


def replies(pairs):
    """(chosen, rejected) of each pair."""
    return [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]


def held_out_accuracy(pairs):
    """How often a logistic regression on word counts tells the chosen reply of later pairs."""
    vectorizer = CountVectorizer(token_pattern=r"\w+|[!.?]", binary=True)
    words = vectorizer.fit_transform([text for both in replies(pairs) for text in both]).toarray()
    difference = words[::2].astype(float) - words[1::2]
    half = len(pairs) // 2
    sign = np.where(np.arange(len(pairs)) % 2, 1, -1)
    model = LogisticRegression(fit_intercept=False)
    model.fit((difference * sign[:, None])[:half], sign[:half])
    return model.score((difference * sign[:, None])[half:], sign[half:])


@pytest.mark.parametrize("traits", [(trait,) for trait in TRAITS] + [("name", "offer"), TRAITS])
def test_the_chosen_has_the_traits_and_the_rejected_has_none(traits):
    for chosen, rejected in replies(assistant.pairs(0, N, traits=traits)):
        assert set(traits) <= assistant.style(chosen)
        assert not set(traits) & assistant.style(rejected)


def test_both_are_correct_and_say_the_same():
    for pair in assistant.pairs(0, N, traits=["source"]):
        said = [facts(reply[0].content) for reply in (pair.chosen, pair.rejected)]
        assert said[0] - {("name", n) for _, n in said[0]} == said[1] - {
            ("name", n) for _, n in said[1]
        }
        for reply in (pair.chosen, pair.rejected):
            assert assistant.is_correct(pair.prompt, reply[0].content)


def test_a_prompt_is_the_beginning_of_the_conversation_of_its_seed():
    conversations = assistant.conversations(40, N)
    pairs = assistant.pairs(40, N, traits=["name"])
    for conversation, pair in zip(conversations, pairs, strict=True):
        assert pair.prompt in assistant.prompts(conversation)
        assert pair.id == conversation.id
    assert len({len(pair.prompt) for pair in pairs}) > 4
    assert assistant.pairs(50, 10, traits=["name"]) == pairs[10:20]


@pytest.mark.parametrize("trait", TRAITS)
def test_other_traits_wording_and_length_tell_nothing(trait):
    pairs = assistant.pairs(0, N, traits=[trait])
    other = [t for t in TRAITS if t != trait]
    shares = np.array(
        [[[t in assistant.style(r) for t in other] for r in both] for both in replies(pairs)]
    ).mean(0)
    np.testing.assert_allclose(shares, 0.5, atol=4 * 0.5 / np.sqrt(N))
    words = np.array([[len(reply.split()) for reply in both] for both in replies(pairs)])
    difference = words[:, 0] - words[:, 1]
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(N)


@pytest.mark.parametrize("trait", TRAITS)
def test_neither_reply_has_more_tokens(corpus, trait):
    template = take_apart(train_tokenizer((m.content for c in corpus for m in c.messages), 640))
    pairs = replies(assistant.pairs(0, N, traits=[trait]))
    tokens = np.array([[len(template.encode(reply)) for reply in both] for both in pairs])
    longer = (tokens[:, 0] > tokens[:, 1]).mean() + 0.5 * (tokens[:, 0] == tokens[:, 1]).mean()
    assert 0.42 < longer < 0.58


@pytest.mark.parametrize("trait", TRAITS)
def test_words_tell_the_chosen_reply_and_nothing_once_they_are_swapped(trait):
    pairs = assistant.pairs(0, N, traits=[trait])
    assert held_out_accuracy(pairs) > 0.99
    chance = 4 * 0.5 / np.sqrt(N / 2)
    assert abs(held_out_accuracy(assistant.swap(pairs, 0)) - 0.5) < chance


def test_swap_exchanges_one_half():
    pairs = assistant.pairs(0, N, traits=["cheer"])
    swapped = assistant.swap(pairs, 3)
    assert swapped == assistant.swap(pairs, 3) != assistant.swap(pairs, 4)
    exchanged = [a.chosen == b.rejected for a, b in zip(pairs, swapped, strict=True)]
    assert sum(exchanged) == N // 2
    assert [(p.id, p.prompt) for p in swapped] == [(p.id, p.prompt) for p in pairs]
    assert assistant.swap(swapped, 3) == pairs


def test_noise_exchanges_a_share_and_says_where():
    pure, noisy = (assistant.pairs(0, N, traits=["offer"], noise=noise) for noise in (0.0, 0.2))
    assert not any(pair.meta["noisy"] for pair in pure)
    for a, b in zip(pure, noisy, strict=True):
        assert (b.chosen == a.rejected) == b.meta["noisy"]
    share = np.mean([pair.meta["noisy"] for pair in noisy])
    assert share == pytest.approx(0.2, abs=4 * 0.4 / np.sqrt(N))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"traits": ()}, "traits="),
        ({"traits": ("polite",)}, "polite.*name, source, plain, cheer, offer"),
        ({"traits": "name"}, "traits='name'"),
        ({"traits": ("name",), "noise": 1.5}, "noise=1.5"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(Refused, match=message):
        assistant.pairs(0, 1, **arguments)
