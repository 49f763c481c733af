"""Phase 2 of TnT-LLM: light classifiers on embeddings that learn the assigned labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    counts = Counter(found.primary.id for _, found in rows)
    names = {label.id: label.name for label in mined.labels}
    learned = {id for id, count in counts.items() if count >= _LEAST}
    left_out = [names[id] for id in sorted(set(names) - learned)]
    rows = [(i, found) for i, found in rows if found.primary.id in learned]
    if len(learned) < 2:
        return Light(None, None, [], left_out)
    x_ND = mined.embeddings[[i for i, _ in rows]]
    primary = [names[found.primary.id] for _, found in rows]
    tried = _each(config, x_ND, primary)
    fitted = [one for one in tried if one.fitted is not None]
    if not fitted:
        return Light(None, None, tried, left_out)
    best = min(fitted, key=lambda one: one.fitted.nll)
    several = [
        tuple(sorted({names[x.id] for x in found.applicable if x.id in learned}))
        for _, found in rows
    ]
    penalty = float(best.setting) if best.method == "logistic" else _PENALTY
    try:
        many = fit_classifier(x_ND, several, seed=config.seed, inverse_penalty=penalty)
    except Failed as failed:  # what was labelled is paid for
        return Light(best.fitted.classifier, None, tried, left_out, str(failed))
    return Light(best.fitted.classifier, many.classifier, tried, left_out)


def _each(config, x_ND, labels: Sequence[str]) -> list[Tried]:
    settings = []
    if config.classifier.method in ("best", "logistic"):
        settings += [("logistic", f"{c:g}", {"inverse_penalty": c}) for c in INVERSE_PENALTIES]
    if config.classifier.method in ("best", "mlp"):
        settings += [("mlp", str(h), {"mlp": MLPSettings(hidden=h)}) for h in HIDDEN]
    found = []
    for method, setting, options in settings:
        try:
            one = fit_classifier(x_ND, labels, method=method, seed=config.seed, **options)
            found.append(Tried(method, setting, one))
        except Failed as failed:  # one of several; what was labelled is paid for
            found.append(Tried(method, setting, None, str(failed)))
    return found
