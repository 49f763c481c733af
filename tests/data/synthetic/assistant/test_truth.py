"""What is true is read from the words alone, and a reply is right in any words."""

import random
import re
from itertools import combinations, pairwise

import numpy as np
import pytest

from jaxconv.data.conversation import Message
from jaxconv.data.synthetic import assistant
from jaxconv.data.synthetic.assistant.generator import KINDS
from jaxconv.data.synthetic.assistant.language import COUNTS, EVENTS, ITEMS, NAMES, PLACES
from jaxconv.data.synthetic.assistant.style import say
from jaxconv.data.synthetic.assistant.truth import NEEDED, read
from jaxconv.errors import Refused

STATED = "I am Ada. I have cups (3 in the hall) and hats (5 in the shed)."
STYLES = [
    traits
    for size in range(len(assistant.TRAITS) + 1)
    for traits in combinations(assistant.TRAITS, size)
]


def talk(*said):
    """A prompt in which the user says one thing after the other."""
    messages = [Message("user", f"{STATED} {said[0]}")]
    for text in said[1:]:
        messages += [Message("assistant", "Okay."), Message("user", text)]
    return tuple(messages)


@pytest.mark.parametrize("held_out", [False, True])
def test_every_gold_reply_is_correct(held_out):
    for c in assistant.conversations(1 << 20, 1000, held_out=held_out):
        for prompt in assistant.prompts(c):
            reply = c.messages[len(prompt)].content
            assert assistant.is_correct(prompt, reply), (prompt[-1], reply)


def test_what_is_read_is_what_was_drawn(corpus):
    for c in corpus:
        drawn = [(kind, c.meta["user"]) for kind in c.meta["kinds"]]
        assert [(read(p)[0].kind, read(p)[1]) for p in assistant.prompts(c)] == drawn


def test_a_gold_reply_is_correct_in_every_style(exchanges):
    rng = random.Random(0)
    for prompt, _, _ in exchanges[:50]:
        answer, user = read(prompt)
        for traits in STYLES:
            assert assistant.is_correct(prompt, say(answer, user, traits, rng))


@pytest.mark.parametrize("values", [ITEMS, PLACES, EVENTS, NAMES, tuple(map(str, COUNTS))])
def test_a_reply_with_another_fact_is_refused(exchanges, values):
    """Whichever fact is exchanged for any other of its sort."""
    pattern = re.compile(rf"\b(?:{'|'.join(values)})\b")
    exchanged = 0
    for prompt, reply, _ in exchanges[:600]:
        if fact := pattern.search(reply):
            for other in set(values) - {fact[0]}:
                assert not assistant.is_correct(prompt, pattern.sub(other, reply))
                exchanged += 1
    assert exchanged > 100


def test_replies_to_other_questions_are_refused(exchanges):
    for kind in KINDS:
        same = [(prompt, reply) for prompt, reply, asked in exchanges if asked == kind]
        right = [assistant.is_correct(prompt, reply) for (prompt, _), (_, reply) in pairwise(same)]
        assert np.mean(right) < 0.05, kind


def test_a_blind_guess_is_right_one_time_in_eight_at_most(exchanges):
    rng = random.Random(0)
    values = {"number": COUNTS, "place": PLACES, "item": ITEMS}
    for kind, needed in NEEDED.items():
        asked = [prompt for prompt, _, other in exchanges if other == kind]
        right = [assistant.is_correct(p, str(rng.choice(values[needed]))) for p in asked]
        assert np.mean(right) < 1 / 8 + 3 * np.sqrt(1 / 8 * 7 / 8 / len(asked)), kind


@pytest.mark.parametrize(
    ("said", "right", "wrong"),
    [
        (("Count the cups.",), ["3", "Three cups, Ada.", "3 cups (hall)"], ["5", "Ben, 3", "3, 5"]),
        (("Where are the hats?",), ["In the shed.", "shed, 5 hats"], ["hall", "hats", "cups shed"]),
        (("What is in the hall?",), ["cups", "A cup!", "3 cups"], ["hats", "5 cups", "cups hats"]),
        (("Are there 4 cups?",), ["No, 3.", "3", "That is not so: 3"], ["Yes, 3.", "No.", "4"]),
        (("Are there 3 cups?",), ["Yes, 3.", "3"], ["No, 3.", "Yes."]),
        (("Are the hats in the car?",), ["No, shed."], ["Yes, shed.", "No, car."]),
        (("I took 2 of the hats.",), ["3 hats"], ["5 hats", "2 hats"]),
        (("I took 2 of the hats.", "Count the hats."), ["3"], ["5"]),
        (("I moved the cups to the car.", "Where are the cups?"), ["car"], ["hall"]),
        (("I moved the cups to the car.", "What is in the car?"), ["cups"], ["hats"]),
        (
            ("My bus is at 5. Count the cups.", "When is my bus?"),
            ["at 5"],
            ["at 3", "tea at 5 or 6"],
        ),
    ],
)
def test_what_is_right_in_any_words(said, right, wrong):
    for reply in right:
        assert assistant.is_correct(talk(*said), reply), reply
    for reply in ["", "Okay.", *wrong]:
        assert not assistant.is_correct(talk(*said), reply), reply


@pytest.mark.parametrize(
    "said", ["Tell me a joke.", "Where are the rugs?", "When is my bus?", "What is in the car?"]
)
def test_what_cannot_be_answered_is_refused(said):
    with pytest.raises(Refused, match=re.escape(said)):
        assistant.is_correct(talk("Count the cups.", said), "3")


@pytest.mark.parametrize("prompt", [(), (*talk("Count the cups."), Message("assistant", "3"))])
def test_somebody_must_have_asked(prompt):
    with pytest.raises(Refused, match="must be a user's"):
        assistant.is_correct(prompt, "3")
