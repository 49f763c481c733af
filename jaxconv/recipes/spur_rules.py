"""SPUR without a language model: cues learned from the training conversations.

What users say before the first answer cannot be a reaction to one, so the pairs of words in these
openings tell requests from reactions. Reactions are counted, and so is that a user comes back to
what was asked before; each gets the log-odds between satisfied and dissatisfied users
(`evals/log_odds.py`). Those of the largest z are the patterns, groups of alike ones the items of a
rubric, and a conversation shows an item where the user says one of its examples, or nearly.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxconv.evals.log_odds import log_odds
from jaxconv.llm.conversations import Turn
from jaxconv.recipes.spur_tasks import (
    MAX_EXAMPLES,
    MAX_PATTERNS,
    MAX_SCORE,
    ExtractionInput,
    ItemScore,
    ItemScores,
    Pattern,
    Patterns,
    Rubric,
    RubricItem,
    ScoringInput,
    SummaryInput,
)

REPEATS = "comes back to what was asked before"
_SENTENCE = re.compile(r"[^.!?…:;\n]+[.!?…:;]*")
_WORD = re.compile(r"\w+")
_PRIOR = 0.5  # occurrences of each reaction that the prior weighs, on average
_REQUEST = 0.5  # more of its pairs of words stand in openings, then a sentence is a request
_RARE = 0.05  # share of openings that a word is in, at most, to say what a request is about
_ALIKE = 0.6  # so near to an example a sentence shows its item
_TELLING = 0.5  # z of a pattern, at least, or half of the largest one where that is less


@dataclass(frozen=True)
class Reaction:
    """A sentence of a user that may tell how an answer was taken.

    Attributes:
        quote: its words, as they stand in the turn.
        key: what is counted: its words in lower case, or `REPEATS`.
    """

    quote: str
    key: str


class Cues:
    """What labelled conversations teach.

    Args:
        talks: turns of each.
        satisfied: whether its user was.
    """

    def __init__(self, talks: Sequence[Sequence[Turn]], satisfied: Sequence[bool]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        openings = [[t.content for t in before_answers(turns)] for turns in talks]
        self._pairs = {p for said in openings for text in said for p in pairs(text)}
        heard = Counter(w for said in openings for w in {w for text in said for w in words(text)})
        self._frequent = {w for w, n in heard.items() if n > _RARE * len(talks)}
        found = [{r.key for r in self.reactions(turns)} for turns in talks]
        self._odds, self._z = _log_odds(found, satisfied)
        self._letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
        # Of a side that most users are on, nothing tells much.
        largest = {sign: max((sign * z for z in self._z.values()), default=0.0) for sign in (1, -1)}
        self._telling = {sign: min(_TELLING, z / 2) for sign, z in largest.items()}
        self._letters.fit([key for key in self._z if key != REPEATS] or ["nothing"])
        self._matrices: dict[tuple[str, ...], Any] = {}

    def reactions(self, turns: Sequence[Turn]) -> list[Reaction]:
        """Sentences of a user after the first answer that are no request, and requests that are
        about what was asked before."""
        before = before_answers(turns)
        asked = {w for turn in before for w in words(turn.content)}
        found = []
        for turn in [t for t in turns if t.role == "user"][len(before) :]:
            for sentence in split(turn.content):
                own = pairs(sentence)
                if own and sum(p in self._pairs for p in own) > _REQUEST * len(own):
                    rare = [w for w in words(sentence) if w not in self._frequent]
                    if rare and sum(w in asked for w in rare) > len(rare) / 2:
                        found.append(Reaction(sentence, REPEATS))
                else:
                    found.append(Reaction(sentence, " ".join(words(sentence))))
            asked |= set(words(turn.content))
        return found

    # ------------------------------------------------------------ the three tasks

    def extract(self, input: ExtractionInput) -> Patterns:
        """The most telling reactions of the polarity."""
        sign = 1 if input.satisfied else -1
        best: dict[str, tuple[float, Reaction]] = {}
        for reaction in self.reactions(input.turns):
            z = sign * self._z.get(reaction.key, 0.0)
            if z >= self._telling[sign] and z > best.get(reaction.key, (0.0,))[0]:
                best[reaction.key] = z, reaction
        chosen = sorted(best.values(), key=lambda found: (-found[0], found[1].quote))
        return Patterns(
            patterns=[
                Pattern(pattern=_pattern(reaction.key), quote=reaction.quote)
                for _, reaction in chosen[:MAX_PATTERNS]
            ]
        )

    def summarise(self, input: SummaryInput) -> Rubric:
        """Groups of alike quotes, of this minibatch and of the rubric before."""
        sign = 1 if input.satisfied else -1
        repeats = any(item.name == REPEATS for item in input.previous)
        weights: dict[str, float] = {}
        for item in input.previous:
            weights |= {example: sign * self._z.get(example, 0.0) for example in item.examples}
        for pattern in input.patterns:
            if pattern.pattern == _pattern(REPEATS):
                repeats = True
            else:
                key = " ".join(words(pattern.quote))
                weights[key] = sign * self._z.get(key, 0.0)
        items = []
        if repeats and sign * self._z.get(REPEATS, 0.0) > 0:
            items.append(RubricItem(name=REPEATS, description=f"The user {REPEATS}."))
        quotes = sorted(weights, key=lambda quote: (-weights[quote], quote))
        limit = input.limit - len(items)
        for group in self._groups(quotes[: limit * MAX_EXAMPLES], limit):
            said = ", ".join(f"“{quote}”" for quote in group[:2])
            items.append(
                RubricItem(
                    name=_unused(group, items),
                    description=f"The user says something like {said}.",
                    examples=group[:MAX_EXAMPLES],
                )
            )
        if not items:  # nothing tells; a rubric has an item all the same
            items.append(RubricItem(name="nothing", description="No words that tell were found."))
        return Rubric(items=items)

    def _groups(self, quotes: list[str], count: int) -> list[list[str]]:
        """`quotes`, most telling first, in groups of alike ones; no group is larger than a rubric
        shows."""
        if not quotes or count < 1:
            return []
        from sklearn.cluster import AgglomerativeClustering

        if len(quotes) <= count:
            return [[quote] for quote in quotes]
        rows = self._letters.transform(quotes).toarray()
        found = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(rows)
        groups: dict[int, list[str]] = {}
        for quote, group in zip(quotes, found, strict=True):
            groups.setdefault(int(group), []).append(quote)
        return list(groups.values())

    def score(self, input: ScoringInput) -> ItemScores:
        """Every reaction shows the item whose example it is, or is most like."""
        items = (*input.sat, *input.dsat)
        owners = {" ".join(words(e)): item.id for item in items for e in item.examples}
        for item in items:
            if item.name == REPEATS:
                owners[REPEATS] = item.id
        shown: dict[str, tuple[int, str]] = {}
        for reaction in self.reactions(input.turns):
            key, near = reaction.key, 1.0
            if key not in owners:
                key, near = self._nearest(key, tuple(owners)) if key != REPEATS else (key, 0.0)
            if near >= _ALIKE:
                score = MAX_SCORE * near * np.tanh(abs(self._odds.get(key, 0.0)) / 2)
                score = int(np.clip(round(float(score)), 1, MAX_SCORE))
                if score > shown.get(owners[key], (0,))[0]:
                    shown[owners[key]] = score, reaction.quote
        return ItemScores(
            items=[
                ItemScore(id=id, present=id in shown, quote=quote, score=score)
                for id in input.ids
                for score, quote in (shown.get(id, (0, "")),)
            ]
        )

    def _nearest(self, key: str, examples: tuple[str, ...]) -> tuple[str, float]:
        """(the example that is written most like it, how alike: a cosine)."""
        if not examples:
            return "", 0.0
        if examples not in self._matrices:
            self._matrices[examples] = self._letters.transform(examples), {}
        matrix, found = self._matrices[examples]
        if key not in found:
            near = (self._letters.transform([key]) @ matrix.T).toarray()[0]
            found[key] = int(near.argmax()), float(near.max())
        best, near = found[key]
        return examples[best], near


def _unused(group: Sequence[str], items: Sequence[RubricItem]) -> str:
    """A name that no item has: the most telling quote that is none, or that with a number."""
    taken = {item.name.casefold() for item in items}
    names = itertools.chain(group, (f"{n}: {group[0]}" for n in itertools.count(2)))
    return next(name[:80] for name in names if name[:80].casefold() not in taken)


def _log_odds(
    found: Sequence[set[str]], satisfied: Sequence[bool]
) -> tuple[dict[str, float], dict[str, float]]:
    """(log-odds, z) of each reaction, positive where it is of satisfied users. It counts once for
    a conversation."""
    names = sorted(set().union(*found))
    if not names:
        return {}, {}
    place = {name: i for i, name in enumerate(names)}
    # The last place is for having no reaction to speak of: a conversation each.
    counts_2W = np.zeros((2, len(names) + 1))
    for keys, is_satisfied in zip(found, satisfied, strict=True):
        counts_2W[0 if is_satisfied else 1, [*(place[key] for key in keys), -1]] += 1
    odds, z = log_odds(*counts_2W, counts_2W.sum(0), strength=_PRIOR * len(names))
    return (
        dict(zip(names, odds[:-1].tolist(), strict=True)),
        dict(zip(names, z[:-1].tolist(), strict=True)),
    )


def _pattern(key: str) -> str:
    return f"The user {REPEATS}." if key == REPEATS else f"The user says “{key}”."


def before_answers(turns: Sequence[Turn]) -> list[Turn]:
    """The user's turns before the first answer."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    return [turn for turn in turns[:first] if turn.role == "user"]


def split(text: str) -> list[str]:
    """Sentences, each as it stands in the text."""
    return [s.strip() for s in _SENTENCE.findall(text) if _WORD.search(s)]


@functools.lru_cache(maxsize=1 << 16)
def words(text: str) -> tuple[str, ...]:
    """In lower case."""
    return tuple(_WORD.findall(text.lower()))


def pairs(text: str) -> set[tuple[str, str]]:
    """Words beside each other, inside sentences."""
    return {pair for s in split(text) for pair in itertools.pairwise(words(s))}
