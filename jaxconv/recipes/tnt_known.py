"""How far a taxonomy and its classifiers agree with known classes, which nothing else sees."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.evals.agreement import agreement
from jaxconv.evals.clustering import clustering_agreement, majority_classes
from jaxconv.evals.report import cell
from jaxconv.evals.statistics import Estimate, proportion
from jaxconv.recipes.tnt_classifiers import best_of, each
from jaxconv.recipes.tnt_documents import Documents
from jaxconv.recipes.tnt_mixture import distinct
from jaxconv.recipes.tnt_tasks import Assignment
from jaxconv.train.clusters import fit_clusters

if TYPE_CHECKING:
    from jaxconv.recipes.tnt_llm import Mined


@dataclass
class Found:
    """What the evaluation finds, filled step by step.

    Attributes:
        results, baselines: as in a report.
        flips: share of the forced choices that changed with the order; None where none was made.
        columns: kappa of each two labellers, for a table.
        languages: rows of a table.
        classified: what the classifier says of each test document, by id.
        notes: what was left out, and why.
    """

    results: dict[str, Estimate] = field(default_factory=dict)
    baselines: dict[str, Estimate] = field(default_factory=dict)
    flips: Estimate | None = None
    columns: list[list[str]] = field(default_factory=list)
    languages: list[list[str]] = field(default_factory=list)
    classified: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def primary_name(assigned: Mapping[str, Assignment], id: str) -> str | None:
    """None where there is no valid answer."""
    return assigned[id].primary.name if id in assigned else None


def against_known(
    found: Found, config, talks: Documents, mined: "Mined", gold: str, finer: str
) -> None:
    """Adds agreement with the classes under the key `gold` of meta, and of the second level with
    those under `finer`, beside clusters of k-means, random labels, and classifiers of each.

    Groups are compared on documents to learn from; on those to test on where classes are known of
    these alone.
    """
    known = talks.known(gold)
    names = [primary_name(mined.assigned, id) for id in talks.ids]

    def both(indices: Sequence[int]) -> list[int]:
        return [i for i in indices if known[i] is not None and names[i] is not None]

    learned = both(talks.train)
    compared = learned or both(talks.test)
    if len(compared) < 2:
        found.notes.append(f"{gold!r} is known of no two documents that have a label.")
        return
    truth = [known[i] for i in compared]
    if len(set(truth)) < 2:
        found.notes.append(f"{gold!r} is {truth[0]!r} everywhere; there is nothing to compare.")
        return
    _groups(found.results, "", [names[i] for i in compared], truth)
    if finer:
        _second(found, talks, mined, talks.known(finer))
    grouped = _clusters(config, talks, mined)
    for name, own in grouped.items():
        _groups(found.baselines, f"/{name}", [own[i] for i in compared], truth)
    rng = np.random.default_rng((config.seed, 5))
    drawn = [mined.labels[k].name for k in rng.integers(0, len(mined.labels), len(compared))]
    _groups(found.baselines, "/random", drawn, truth)
    if learned:
        _classified(found, config, talks, mined, known, names, learned, grouped)
    else:
        found.notes.append(
            f"{gold!r} is known of documents to test on alone: groups are compared there, and no "
            "class can be learned for classifier_accuracy."
        )


def _clusters(config, talks: Documents, mined: "Mined") -> dict[str, list[str]]:
    """Clusters of all documents by k-means on those to learn from: of their embeddings, and of what
    the rules cluster."""
    train = talks.train
    found = {}
    for name, x_ND in (
        ("kmeans_ctfidf", mined.embeddings),
        ("kmeans_smoothed", mined.rules.averaged),
    ):
        count = min(config.taxonomy.max_labels, distinct(x_ND[train]))
        clusters = fit_clusters(x_ND[train], count, seed=config.seed)
        found[name] = [str(k) for k in clusters.assign(x_ND)]
    return found


def _groups(
    into: dict[str, Estimate], suffix: str, groups: Sequence[str], truth: Sequence[str]
) -> None:
    same = clustering_agreement(groups, truth)
    into |= {f"{x}{suffix}": getattr(same, x) for x in ("nmi", "ari", "purity")}


def _second(found: Found, talks: Documents, mined: "Mined", finer: Sequence[str | None]) -> None:
    """The second level against the finer classes, of documents that have a label of it."""
    both = [
        (f"{mined.assigned[id].primary.name}/{mined.inside[id].primary.name}", finer[i])
        for i, id in ((i, talks.ids[i]) for i in talks.train)
        if id in mined.inside and finer[i] is not None
    ]
    if len(both) > 1:
        _groups(found.results, "/second_level", *map(list, zip(*both, strict=True)))


def _classified(
    found: Found,
    config,
    talks: Documents,
    mined: "Mined",
    known: Sequence[str | None],
    names: Sequence[str | None],
    learned: Sequence[int],
    grouped: Mapping[str, Sequence[str]],
) -> None:
    """Accuracy on documents to test on: every label, or cluster, stands for the class that is most
    frequent in it among those that were learned from."""
    test = [i for i in talks.test if known[i] is not None]
    if not test:
        return
    truth, right = [known[i] for i in learned], [known[i] for i in test]

    def accuracy(said: Sequence[str | None], groups: Sequence[str]) -> Estimate:
        meaning = majority_classes(groups, truth)
        hits = sum(
            label is not None and meaning.get(label) == r
            for label, r in zip(said, right, strict=True)
        )
        return proportion(hits, len(right))

    def taught(labels: Sequence[str], name: str) -> list[str] | None:
        """What the best classifier of these labels says of the documents to test on."""
        tried = each(config, mined.embeddings[list(learned)], labels)
        best = best_of(tried)
        if best is None:
            why = tried[0].failed if tried else "fewer than two of them have enough documents"
            found.notes.append(f"No classifier_accuracy/{name}: {why}.")
            return None
        return best.fitted.classifier.predict(mined.embeddings[test])

    assigned = [names[i] for i in learned]
    found.results["assigned_accuracy"] = accuracy([names[i] for i in test], assigned)
    if found.classified:
        said = [found.classified[talks.ids[i]] for i in test]
        found.results["classifier_accuracy"] = accuracy(said, assigned)
        meaning = majority_classes(assigned, truth)
        _columns(found, config, [names[i] for i in test], said, right, meaning)
    into = found.baselines
    for name, clusters in grouped.items():
        own = [clusters[i] for i in learned]
        by_clusters = taught(own, name)
        if by_clusters is not None:
            into[f"classifier_accuracy/{name}"] = accuracy(by_clusters, own)
    by_known = taught(truth, "gold")
    if by_known is not None:
        hits = sum(a == b for a, b in zip(by_known, right, strict=True))
        into["classifier_accuracy/gold"] = proportion(hits, len(right))
    most = max(set(truth), key=lambda name: (truth.count(name), name))
    into["classifier_accuracy/majority"] = proportion(right.count(most), len(right))


def _columns(
    found: Found,
    config,
    assigned: Sequence[str | None],
    classified: Sequence[str],
    right: Sequence[str],
    meaning: Mapping[str, str],
) -> None:
    """Kappa of each two of the labellers on test documents, labels by the class they stand for."""

    def class_of(label: str) -> str:
        return meaning.get(label, f"{label} (stands for no class)")

    labellers = {
        "assigned": [None if x is None else class_of(x) for x in assigned],
        "classifier": [class_of(x) for x in classified],
        "known": list(right),
    }
    kappas: dict[frozenset[str], Estimate] = {}
    for one, two in itertools.combinations(labellers, 2):
        pairs = [
            (a, b)
            for a, b in zip(labellers[one], labellers[two], strict=True)
            if a is not None and b is not None
        ]
        if pairs:
            kappa = agreement(*map(list, zip(*pairs, strict=True)), seed=config.seed).kappa
            kappas[frozenset((one, two))] = kappa
            if two == "known":
                found.results[f"kappa/{one}_known"] = kappa
    for one in labellers:
        found_kappas = (kappas.get(frozenset((one, two))) for two in labellers)
        found.columns.append([one, *(cell(k, with_n=True) for k in found_kappas)])
