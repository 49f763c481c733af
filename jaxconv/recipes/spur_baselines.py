"""What SPUR is compared with, in the same splits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.recipes.asking import Asking
from jaxconv.recipes.spur_features import by_known_words, by_nearest_example, hand_features
from jaxconv.recipes.spur_talks import Talks
from jaxconv.recipes.spur_tasks import (
    CLASSIFICATION,
    DSAT,
    MAX_SCORE,
    SAT,
    ClassificationInput,
    Example,
    ItemScores,
    NumberedItem,
)

if TYPE_CHECKING:
    from jaxconv.recipes.spur import Trial

ZERO_SHOT, FEW_SHOT = "zero_shot", "few_shot"
ASKED = (ZERO_SHOT, FEW_SHOT)
"""Those that a model answers where one is asked."""


_INVERSE_PENALTY, _STEPS = 1.0, 2000  # of logistic regressions


def predictions(
    config, asked: Asking, talks: Talks, trial: "Trial", embeddings: np.ndarray, *, seed: int
) -> dict[str, list[str | None]]:
    """By method, a label for each conversation; None where there is no valid answer."""
    train, truth = trial.split.train, np.array(talks.truth)
    hand_NF = np.stack([hand_features(turns) for turns in talks.turns])
    hand_NF = (hand_NF - hand_NF[train].mean(0)) / (hand_NF[train].std(0) + 1e-9)
    rubric_NI = item_scores(trial.scores, talks.ids, trial.rubrics.items) / MAX_SCORE
    known = ~np.isnan(rubric_NI).any(axis=1)
    rubric_NI = np.nan_to_num(rubric_NI)
    fitted = [i for i in train if known[i]]

    def logistic(x_NF: np.ndarray, own: Sequence[int]) -> list[str]:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_STEPS)
        return model.fit(x_NF[own], truth[own]).predict(x_NF).tolist()

    labels = [talks.truth[i] for i in train]
    with_rubric = np.concatenate([embeddings, rubric_NI], axis=1)
    found: dict[str, list[str | None]] = {
        "majority": [max((SAT, DSAT), key=labels.count)] * len(talks),
        "hand_features": logistic(hand_NF, train),
        "embedding": logistic(embeddings, train),
    }
    for name, x_NF in (
        ("rubric_scores", rubric_NI),
        ("embedding_and_rubric", with_rubric),
    ):
        said = logistic(x_NF, fitted) if len(set(truth[fitted])) > 1 else [None] * len(talks)
        found[name] = [label if known[i] else None for i, label in enumerate(said)]
    return found | _asked(config, asked, talks, trial, seed)


def item_scores(
    scores: Mapping[str, ItemScores], ids: Sequence[str], items: Sequence[NumberedItem]
) -> np.ndarray:
    """float64 [ids, items], from 0 to 10; NaN in the row of a conversation without scores."""
    out = np.full((len(ids), len(items)), np.nan)
    place = {item.id: i for i, item in enumerate(items)}
    for row, id in enumerate(ids):
        for item in scores[id].items if id in scores else ():
            out[row, place[item.id]] = item.score
    return out


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
