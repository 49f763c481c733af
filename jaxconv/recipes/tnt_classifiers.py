"""Phase 2 of TnT-LLM: light classifiers on embeddings that learn the assigned labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.errors import Failed
from jaxconv.models.classifier import Classifier
from jaxconv.recipes.tnt_documents import Documents
from jaxconv.recipes.tnt_tasks import OTHER_ID
from jaxconv.train.classifiers import Fitted, MLPSettings, fit_classifier

if TYPE_CHECKING:
    from jaxconv.recipes.tnt_llm import Mined

METHODS = ("best", "logistic", "mlp")
INVERSE_PENALTIES = (100.0, 10.0, 1.0, 0.1)
"""Of the logistic regression: the paper's l2 penalties 0.01, 0.1, 1 and 10."""
HIDDEN = (32, 64, 128, 256)
_PENALTY = 10.0  # of the head of all labels, where an MLP is the best of the primary one
_LEAST = 5  # documents of a label that is learned


@dataclass(frozen=True)
class Tried:
    """Attributes:
    method, setting: "logistic" and the inverse of its penalty, or "mlp" and its width.
    fitted: None where it does not converge.
    failed: why.
    """

    method: str
    setting: str
    fitted: Fitted | None
    failed: str = ""


@dataclass(frozen=True)
class Light:
    """Attributes:
    primary: of the primary label; None where fewer than two labels have enough documents.
    applicable: of all labels that apply; None where none has enough documents, or where `failed`
        says why.
    tried: each that was fitted, with its loss on a part that it was not fitted on.
    left_out: names of labels with too few documents to be learned.
    """

    primary: Classifier | None
    applicable: Classifier | None
    tried: Sequence[Tried]
    left_out: Sequence[str]
    failed: str = ""


def trained(config, talks: Documents, mined: "Mined") -> Light:
    """The classifiers with the least loss on what is kept apart of the training documents."""
    rows = [
        (i, mined.assigned[talks.ids[i]])
        for i in talks.train
        if talks.ids[i] in mined.assigned and mined.assigned[talks.ids[i]].primary.id != OTHER_ID
    ]
    names = {label.id: label.name for label in mined.labels}
    primary = [names[found.primary.id] for _, found in rows]
    tried = each(config, mined.embeddings[[i for i, _ in rows]], primary)
    learned = often(primary)
    left_out = [name for name in names.values() if name not in learned]
    best = best_of(tried)
    if best is None:
        return Light(None, None, tried, left_out)
    kept = [(i, found) for i, found in rows if names[found.primary.id] in learned]
    several = [
        tuple(sorted({names[x.id] for x in found.applicable if names.get(x.id) in learned}))
        for _, found in kept
    ]
    penalty = float(best.setting) if best.method == "logistic" else _PENALTY
    try:
        many = fit_classifier(
            mined.embeddings[[i for i, _ in kept]],
            several,
            seed=config.seed,
            inverse_penalty=penalty,
        )
    except Failed as failed:  # what was labelled is paid for
        return Light(best.fitted.classifier, None, tried, left_out, str(failed))
    return Light(best.fitted.classifier, many.classifier, tried, left_out)


def often(labels: Sequence[str]) -> set[str]:
    """Labels that have enough documents to be learned."""
    return {name for name, count in Counter(labels).items() if count >= _LEAST}


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """The one with the least loss on what it was not fitted on."""
    fitted = [one for one in tried if one.fitted is not None]
    return min(fitted, key=lambda one: one.fitted.nll, default=None)


def each(config, x_ND: np.ndarray, labels: Sequence[str]) -> list[Tried]:
    """Classifiers of the labels that are there often enough, by every method and setting that the
    config asks for; none where there are fewer than two such labels."""
    learned = often(labels)
    if len(learned) < 2:
        return []
    rows = [i for i, label in enumerate(labels) if label in learned]
    kept = [labels[i] for i in rows]
    settings = []
    if config.classifier.method in ("best", "logistic"):
        settings += [("logistic", f"{c:g}", {"inverse_penalty": c}) for c in INVERSE_PENALTIES]
    if config.classifier.method in ("best", "mlp"):
        settings += [("mlp", str(h), {"mlp": MLPSettings(hidden=h)}) for h in HIDDEN]
    found = []
    for method, setting, options in settings:
        try:
            one = fit_classifier(x_ND[rows], kept, method=method, seed=config.seed, **options)
            found.append(Tried(method, setting, one))
        except Failed as failed:  # one of several; what was labelled is paid for
            found.append(Tried(method, setting, None, str(failed)))
    return found
