"""The three steps of SPUR: reasons of labelled conversations, rubrics from them, scores by rubrics
(Lin et al. 2024, arXiv 2403.12388, section 3)."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxconv.llm.conversations import Turn
from jaxconv.recipes.asking import Asking, Chain, NoAnswer, once
from jaxconv.recipes.spur_analysis import satisfaction_of
from jaxconv.recipes.spur_rules import Cues
from jaxconv.recipes.spur_talks import Talks
from jaxconv.recipes.spur_tasks import (
    DSAT,
    EXTRACTION,
    MAX_PATTERNS,
    SAT,
    SCORING,
    SUMMARY,
    ExtractionInput,
    ItemScores,
    NumberedItem,
    Pattern,
    Patterns,
    RubricItem,
    ScoringInput,
    SummaryInput,
)

# ---------------------------------------------------------------- 1. supervised extraction


def extract(
    asked: Asking,
    turns: Mapping[str, Sequence[Turn]],
    satisfied: Mapping[str, bool],
    cues: Cues,
    keep: str = "",
) -> dict[str, tuple[bool, Pattern]]:
    """Reasons for the labels of conversations, by "<id>/<number>", with the label."""
    inputs = {id: ExtractionInput(turns=own, satisfied=satisfied[id]) for id, own in turns.items()}
    # A dry run takes as many reasons for granted as a model may give.
    rules = _any_reasons if asked.dry and asked.backend.is_model else cues.extract
    results = asked.ask(dataclasses.replace(EXTRACTION, rules=rules), inputs, keep=keep)
    return {
        f"{id}/{number}": (satisfied[id], pattern)
        for id, result in results.items()
        if result.ok
        for number, pattern in enumerate(result.value.patterns)
    }


def _any_reasons(input: ExtractionInput) -> Patterns:
    said = next(t.content.strip() for t in input.turns if t.role == "user" and t.content.strip())
    reason = Pattern(pattern="The user says what shows how content a user is.", quote=said[:60])
    return Patterns(patterns=[reason] * MAX_PATTERNS)


# ---------------------------------------------------------------- 2. rubric summarisation


def summarise(
    patterns: Sequence[Pattern], *, satisfied: bool, limit: int, batch: int, cues: Cues
) -> Chain[list[RubricItem]]:
    """The rubric of one polarity, from minibatches of its patterns; the last one is the result.

    Raises:
        NoAnswer: there is no pattern, or no valid answer for a minibatch: nothing is left out in
            silence.
    """
    if not patterns:
        raise NoAnswer(
            f"no reason for {SAT if satisfied else DSAT!r} was found in any training conversation; "
            "a rubric needs one (more conversations of both labels: config.data, config.spur.train)"
        )
    task = dataclasses.replace(SUMMARY, rules=cues.summarise)
    items: list[RubricItem] = []
    for number, begin in enumerate(range(0, len(patterns), batch)):
        given = SummaryInput(
            satisfied=satisfied,
            patterns=list(patterns[begin : begin + batch]),
            previous=items,
            limit=limit,
        )
        items = (yield from once(task, f"minibatch {number}", given)).items
    return items


@dataclass(frozen=True)
class Rubrics:
    """What a training part taught.

    Attributes:
        sat, dsat: items S1, S2, … and D1, D2, …
        patterns: what they were made from, with its label, by "<conversation>/<number>".
        cues: what the rules learned from the same conversations.
    """

    sat: list[NumberedItem]
    dsat: list[NumberedItem]
    patterns: Mapping[str, tuple[bool, Pattern]]
    cues: Cues

    @property
    def items(self) -> list[NumberedItem]:
        return [*self.sat, *self.dsat]


@dataclass(frozen=True)
class Part:
    """Conversations to learn from: indices, and the labels that they are said to have."""

    train: Sequence[int]
    labels: Sequence[str]


def learn(
    config, asked: Asking, talks: Talks, parts: Mapping[str, Part]
) -> dict[str, Rubrics | NoAnswer]:
    """Both rubrics of each part, by its name, or why there are none."""
    cues, patterns = {}, {}
    for name, part in parts.items():
        own = {talks.ids[i]: talks.turns[i] for i in part.train}
        satisfied = {
            talks.ids[i]: label == SAT for i, label in zip(part.train, part.labels, strict=True)
        }
        cues[name] = Cues(list(own.values()), list(satisfied.values()))
        patterns[name] = extract(asked, own, satisfied, cues[name], keep=f"extract_{name}")
    found = asked.in_step(
        {
            f"{name}, {polarity}": summarise(
                [p for is_sat, p in patterns[name].values() if is_sat == (polarity == SAT)],
                satisfied=polarity == SAT,
                limit=config.spur.rubric_items,
                batch=config.spur.batch,
                cues=cues[name],
            )
            for name, polarity in itertools.product(parts, (SAT, DSAT))
        }
    )
    learned: dict[str, Rubrics | NoAnswer] = {}
    for name in parts:
        own = [found[f"{name}, {polarity}"] for polarity in (SAT, DSAT)]
        missing = next((items for items in own if isinstance(items, NoAnswer)), None)
        if missing is not None:
            learned[name] = NoAnswer(f"{name}: {missing}")
            continue
        numbered = (
            [NumberedItem(id=f"{letter}{i}", **x.model_dump()) for i, x in enumerate(items, 1)]
            for letter, items in zip("SD", own, strict=True)
        )
        learned[name] = Rubrics(*numbered, patterns[name], cues[name])
    return learned


# ---------------------------------------------------------------- 3. scoring


def score(
    asked: Asking, turns: Mapping[str, Sequence[Turn]], rubrics: Rubrics, keep: str = ""
) -> dict[str, ItemScores]:
    """Scores of every item for every conversation; one without a valid answer is not there."""
    task = dataclasses.replace(SCORING, rules=rubrics.cues.score)
    inputs = (
        (id, ScoringInput(turns=own, sat=rubrics.sat, dsat=rubrics.dsat))
        for id, own in turns.items()
    )
    return {id: r.value for id, r in asked.ask(task, dict(inputs), keep=keep).items() if r.ok}


def tuned_threshold(scored: Sequence[tuple[int, str]]) -> float:
    """The threshold on R with the best accuracy for (R, label); the nearest to 0 of several."""
    found = sorted({r for r, _ in scored})
    between = [(a + b) / 2 for a, b in itertools.pairwise(found)]
    candidates = [0.0, *between, *([found[0] - 0.5, found[-1] + 0.5] if found else [])]

    def right(threshold: float) -> int:
        return sum((r > threshold) == (label == SAT) for r, label in scored)

    return max(candidates, key=lambda t: (right(t), -abs(t), t))


def predict(
    points_NI: np.ndarray, items: Sequence[NumberedItem], threshold: float
) -> list[str | None]:
    """SAT where R is above the threshold, else DSAT; None without scores: that is no class."""
    return [
        None if r is None else SAT if r > threshold else DSAT
        for r in satisfaction_of(points_NI, items)
    ]
