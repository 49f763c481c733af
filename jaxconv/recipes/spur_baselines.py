"""What SPUR is compared with, in the same splits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.recipes.asking import Asking
from jaxconv.recipes.spur_features import by_known_words, by_nearest_example
from jaxconv.recipes.spur_talks import Split, Talks
from jaxconv.recipes.spur_tasks import (
    CLASSIFICATION,
    DSAT,
    MAX_SCORE,
    SAT,
    ClassificationInput,
    Example,
)

if TYPE_CHECKING:
    from jaxconv.recipes.spur import Trial

ZERO_SHOT, FEW_SHOT = "zero_shot", "few_shot"
ASKED = (ZERO_SHOT, FEW_SHOT)
"""Those that a model answers where one is asked."""


_INVERSE_PENALTIES, _STEPS = (0.1, 1.0, 10.0, 100.0), 5000  # of logistic regressions


@dataclass(frozen=True)
class Inputs:
    """What classifiers read.

    Attributes:
        embeddings: float32 [conversations, width].
        hand: float64 [conversations, features], as `hand_features` counts them.
    """

    embeddings: np.ndarray
    hand: np.ndarray


def predictions(
    config, asked: Asking, talks: Talks, trial: "Trial", inputs: Inputs, *, seed: int
) -> dict[str, list[str | None]]:
    """By method, a label for each conversation; None where there is no valid answer."""
    train, labels = trial.split.train, [talks.truth[i] for i in trial.split.train]
    known_NF = inputs.hand[train]
    hand_NF = (inputs.hand - known_NF.mean(0)) / (known_NF.std(0) + 1e-9)
    everybody = np.ones(len(talks), bool)
    scored = (trial.points >= 0).all(axis=1)
    rubric_NI = np.maximum(trial.points, 0) / MAX_SCORE
    with_rubric = np.concatenate([inputs.embeddings, rubric_NI], axis=1)
    return {
        "majority": [max((SAT, DSAT), key=labels.count)] * len(talks),
        "hand_features": _logistic(hand_NF, talks.truth, trial.split, everybody),
        "embedding": _logistic(inputs.embeddings, talks.truth, trial.split, everybody),
        "rubric_scores": _logistic(rubric_NI, talks.truth, trial.split, scored),
        "embedding_and_rubric": _logistic(with_rubric, talks.truth, trial.split, scored),
        **_asked(config, asked, talks, trial, seed),
    }


def _logistic(
    x_NF: np.ndarray, labels: Sequence[str], split: Split, known_N: np.ndarray
) -> list[str | None]:
    """What logistic regression says of what is known, with the penalty that is best on the dev
    part; None of everything where the training part has one label."""
    from sklearn.linear_model import LogisticRegression

    truth = np.array(labels)
    train, dev = ([i for i in part if known_N[i]] for part in (split.train, split.dev))
    if len(set(truth[train])) < 2:
        return [None] * len(truth)
    models = [
        LogisticRegression(C=c, max_iter=_STEPS).fit(x_NF[train], truth[train])
        for c in _INVERSE_PENALTIES
    ]
    best = max(models, key=lambda model: model.score(x_NF[dev], truth[dev]) if dev else 0.0)
    said = best.predict(x_NF).tolist()
    return [label if known else None for label, known in zip(said, known_N, strict=True)]


def _asked(
    config, asked: Asking, talks: Talks, trial: "Trial", seed: int
) -> dict[str, list[str | None]]:
    """Zero-shot, and with as many examples of each label from the training part."""
    rng = np.random.default_rng(seed)
    shots = []
    for label in (SAT, DSAT):
        own = [i for i in trial.split.train if talks.truth[i] == label]
        chosen = rng.permutation(own)[: config.spur.shots].tolist()
        shots += [Example(turns=list(talks.turns[i]), label=label) for i in chosen]
    test = [(talks.ids[i], talks.turns[i]) for i in trial.split.test]
    found = {}
    for name, examples, rules in (
        (ZERO_SHOT, [], by_known_words),
        (FEW_SHOT, shots, by_nearest_example),
    ):
        task = dataclasses.replace(CLASSIFICATION, name=f"spur/{name}", rules=rules)
        inputs = {id: ClassificationInput(turns=own, examples=examples) for id, own in test}
        results = asked.ask(task, inputs)
        said = {id: r.value.label for id, r in results.items() if r.ok}
        found[name] = [said.get(id) for id in talks.ids]
    return found
