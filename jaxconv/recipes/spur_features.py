"""What else tells a user's satisfaction: features counted by hand, words that anybody would look
for, and the nearest of a few examples. SPUR is compared with them."""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxconv.llm.conversations import Turn
from jaxconv.recipes.spur_rules import before_answers, words
from jaxconv.recipes.spur_tasks import DSAT, SAT, ClassificationInput, Classified

FEATURES = (
    "turns of the user",
    "words of a turn of the user",
    "words of a turn of the assistant",
    "words of the last turn of the user",
    "last turn shorter than the first",
    "question marks in turns after the first answer",
    "exclamation marks there",
    "words said again in the next turn",
    "words taken from the answer before",
    "the user has the last word",
)
_GLAD = frozenset(
    [
        "thanks",
        "thank",
        "great",
        "perfect",
        "good",
        "helpful",
        "works",
        "worked",
        "exactly",
        "love",
        "nice",
        "appreciate",
        "danke",
        "super",
        "toll",
        "gut",
        "perfekt",
        "genau",
        "klappt",
        "gracias",
        "genial",
        "perfecto",
        "bien",
        "funciona",
        "justo",
    ]
)
_CROSS = frozenset(
    [
        "wrong",
        "no",
        "not",
        "useless",
        "bad",
        "again",
        "confused",
        "incorrect",
        "error",
        "never",
        "nothing",
        "forget",
        "falsch",
        "nein",
        "nicht",
        "nutzlos",
        "schlecht",
        "nochmal",
        "verwirrt",
        "vergiss",
        "mal",
        "equivocado",
        "inútil",
        "otra",
        "nunca",
        "nada",
        "olvídalo",
    ]
)


def hand_features(turns: Sequence[Turn]) -> np.ndarray:
    """float64 [features], in the order of `FEATURES`."""
    user = [turn.content for turn in turns if turn.role == "user"]
    assistant = [turn.content for turn in turns if turn.role == "assistant"]
    if not user:
        return np.zeros(len(FEATURES))
    later = " ".join(user[len(before_answers(turns)) :])
    lengths = [len(words(text)) for text in user]
    again = [_shared(a, b) for a, b in itertools.pairwise(user)]
    taken = [
        _shared(one.content, two.content)
        for one, two in itertools.pairwise(turns)
        if one.role == "assistant" and two.role == "user"
    ]
    return np.array(
        [
            len(user),
            np.mean(lengths),
            np.mean([len(words(text)) for text in assistant]) if assistant else 0.0,
            lengths[-1],
            lengths[-1] < lengths[0],
            later.count("?"),
            later.count("!"),
            max(again, default=0.0),
            max(taken, default=0.0),
            turns[-1].role == "user",
        ],
        np.float64,
    )


def by_known_words(input: ClassificationInput) -> Classified:
    """The classical zero-shot baseline: a short list of words in three languages, counted in what
    the user says after the first answer. It knows nothing of this data."""
    said = _reaction(input.turns)
    glad, cross = (sum(word in known for word in said) for known in (_GLAD, _CROSS))
    return Classified(label=SAT if glad >= cross else DSAT)


def by_nearest_example(input: ClassificationInput) -> Classified:
    """The classical few-shot baseline: the label of the example that shares most words after the
    first answer; that of `by_known_words` where none shares any."""
    said = set(_reaction(input.turns))
    near = [
        (len(said & set(_reaction(example.turns))) / max(len(said), 1), example.label)
        for example in input.examples
    ]
    best = max(near, key=lambda found: found[0], default=(0.0, SAT))
    return Classified(label=best[1]) if best[0] > 0 else by_known_words(input)


def _reaction(turns: Sequence[Turn]) -> list[str]:
    user = [turn.content for turn in turns if turn.role == "user"][len(before_answers(turns)) :]
    return [word for text in user for word in words(text)]


def _shared(one: str, two: str) -> float:
    """Share of the second text's words that stand in the first."""
    first, second = set(words(one)), set(words(two))
    return len(first & second) / max(len(second), 1)
