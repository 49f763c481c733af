"""What is drawn: conversations of some shape and size, and held-out ones of other facts."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from jaxconv.data.synthetic import assistant
from jaxconv.data.synthetic.assistant.generator import (
    EXCHANGES,
    KINDS,
    is_held_out,
    is_held_out_event,
)
from jaxconv.data.synthetic.assistant.language import ANSWERS, COUNTS, ITEMS, PLACES
from jaxconv.data.synthetic.assistant.truth import read
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer

STATED = re.compile(rf"({'|'.join(ITEMS)}) \((\d) in the ({'|'.join(PLACES)})\)")


@pytest.fixture(scope="module")
def held_out():
    return assistant.conversations(0, 500, held_out=True)


def test_a_seed_is_a_conversation_whatever_the_range(corpus):
    assert assistant.conversations(0, 100) == corpus[:100]
    assert assistant.conversations(60, 40) == corpus[60:100]
    assert len({c.id for c in corpus}) == len({c.messages for c in corpus}) == len(corpus)


def test_the_shape_of_conversations(corpus):
    exchanges = Counter()
    for c in corpus:
        roles = [message.role for message in c.messages if message.role != "system"]
        assert roles == ["user", "assistant"] * len(c.meta["kinds"])
        assert all(message.role != "system" for message in c.messages[1:])
        assert [c.messages[: len(p)] for p in assistant.prompts(c)] == assistant.prompts(c)
        exchanges[len(c.meta["kinds"])] += 1
    for n, share in EXCHANGES.items():
        assert exchanges[n] / len(corpus) == pytest.approx(share, abs=0.04)
    assert 0.55 < np.mean([c.messages[0].role == "system" for c in corpus]) < 0.65
    assert {kind for c in corpus for kind in c.meta["kinds"]} == set(KINDS) == set(ANSWERS)


@pytest.mark.parametrize(("vocab_size", "longest"), [(512, 256), (640, 200)])
def test_a_small_tokenizer_does(corpus, vocab_size, longest):
    texts = [message.content for c in corpus for message in c.messages]
    words = {word for text in texts for word in re.findall(r"[a-z]+|\d", text.casefold())}
    assert 140 <= len(words) <= 250
    template = take_apart(train_tokenizer(texts, vocab_size))
    lengths = [len(template.render_view(c.messages)[0]) for c in corpus]
    assert min(lengths) >= 30 and max(lengths) <= longest
    assert np.percentile(lengths, 95) > 2.5 * np.percentile(lengths, 5)  # there is much to pack
    spoken = [len(template.encode(m.content)) for c in corpus for m in c.messages[-1:]]
    assert min(spoken) >= 10 and max(spoken) <= 40


def test_training_never_says_or_implies_a_held_out_fact(corpus, exchanges):
    for c in corpus:
        for message in c.messages:
            for item, count, place in STATED.findall(message.content):
                assert not is_held_out(item, int(count), place)
    for prompt, _, kind in exchanges:
        answer, _ = read(prompt)
        said = prompt[-1].content
        if kind == "when":
            assert not is_held_out_event(answer.event, answer.number)
            continue
        facts = [(answer.number, answer.place)]
        if kind == "check":
            facts.append((int(re.findall(r"\d", said)[-1]), answer.place))
        if kind == "place":
            facts.append((answer.number, re.findall(r"\w+", said)[-1]))
        for count, place in facts:
            assert not is_held_out(answer.item, count, place), said


def test_held_out_conversations_begin_with_held_out_facts_only(corpus, held_out):
    assert not {c.id for c in held_out} & {c.id for c in corpus}
    stated = [fact for c in held_out for m in c.messages for fact in STATED.findall(m.content)]
    assert len(stated) >= len(held_out)
    assert all(is_held_out(item, int(count), place) for item, count, place in stated)


def test_held_out_facts_are_of_the_same_words_and_pairs_of_words():
    facts = {True: set(), False: set()}
    for item, count, place in product(ITEMS, COUNTS, PLACES):
        facts[is_held_out(item, count, place)].add((item, count, place))
    assert len(facts[True]) / len(facts[False]) == pytest.approx(1 / 4, rel=0.05)
    for left, right in ((0, 1), (0, 2), (1, 2)):
        pairs = [{(fact[left], fact[right]) for fact in facts[which]} for which in (True, False)]
        assert pairs[0] == pairs[1]
