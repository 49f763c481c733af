"""What a taxonomy and its classifiers are worth: by judgements, by agreement, and against known
classes, which nothing but this file sees."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.evals.agreement import agreement
from jaxconv.evals.clustering import clustering_agreement, majority_classes
from jaxconv.evals.statistics import Estimate, bootstrap_mean, proportion
from jaxconv.llm.conversations import Turn
from jaxconv.recipes import tnt_rules
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.tnt_documents import Documents, gold_keys
from jaxconv.recipes.tnt_tasks import (
    CHOICE,
    OTHER,
    OTHER_ID,
    RELEVANCE,
    Assignment,
    ChoiceInput,
    Label,
    NumberedLabel,
    RelevanceInput,
)
from jaxconv.train.classifiers import fit_classifier
from jaxconv.train.clusters import fit_clusters

if TYPE_CHECKING:
    from jaxconv.recipes.tnt_classifiers import Light
    from jaxconv.recipes.tnt_llm import Mined

_LEAST = 2  # documents of a known class that a classifier learns


@dataclass
class Found:
    """Attributes:
    results, baselines: as in a report.
    flips: share of the forced choices that changed with the order; None where none was made.
    columns: accuracy and kappa by labeller, for a table.
    languages: rows of a table.
    classified: what the classifier says of each test document, by id.
    """

    results: dict[str, Estimate] = field(default_factory=dict)
    baselines: dict[str, Estimate] = field(default_factory=dict)
    flips: Estimate | None = None
    columns: list[list[str]] = field(default_factory=list)
    languages: list[list[str]] = field(default_factory=list)
    classified: dict[str, str] = field(default_factory=dict)


def evaluated(config, asked: Asking, talks: Documents, mined: "Mined", light: "Light") -> Found:
    """All numbers of the report."""
    found = Found()
    labelled = [id for id in talks.ids if id in mined.assigned]
    found.results["labelled"] = proportion(len(labelled), len(talks))
    if not labelled:
        return found
    other = sum(mined.assigned[id].primary.id == OTHER_ID for id in labelled)
    found.results["coverage"] = proportion(len(labelled) - other, len(labelled))
    _judged(found, config, asked, talks, mined)
    if light.primary is not None:
        test = list(talks.test)
        said = light.primary.predict(mined.embeddings[test])
        found.classified = {talks.ids[i]: label for i, label in zip(test, said, strict=True)}
        _by_classifier(found, config, talks, mined, light)
    gold, finer = gold_keys(config)
    if gold:
        _against_known(found, config, talks, mined, gold, finer)
    _languages(found, config, talks, mined)
    return found


def primary_name(assigned: Mapping[str, Assignment], id: str) -> str | None:
    """None where there is no valid answer."""
    return assigned[id].primary.name if id in assigned else None


# ---------------------------------------------------------------- judgements


def _judged(found: Found, config, asked: Asking, talks: Documents, mined: "Mined") -> None:
    """Forced choices between the assigned and a random other label, in both orders, and relevance;
    and both again with a random label in the place of the assigned one."""
    if len(mined.labels) < 3:
        return
    by_id = {label.id: label for label in mined.labels}
    rng = np.random.default_rng((config.seed, 4))
    test = [
        i
        for i in rng.permutation(talks.test).tolist()
        if mined.assigned.get(talks.ids[i]) and mined.assigned[talks.ids[i]].primary.id in by_id
    ][: config.judge.documents]
    if len(test) < 2:
        return
    pairs, controls = {}, {}
    for i in test:
        own = by_id[mined.assigned[talks.ids[i]].primary.id]
        others = [label for label in mined.labels if label.id != own.id]
        one, two = rng.choice(len(others), 2, replace=False)
        pairs[talks.ids[i]] = talks.turns[i], own, others[one]
        controls[talks.ids[i]] = talks.turns[i], others[two], others[one]
    points, found.flips = _chosen(asked, config, pairs)
    _mean(found.results, "label_accuracy", points, config)
    points, _ = _chosen(asked, config, controls)
    _mean(found.baselines, "label_accuracy/random", points, config)
    for into, name, asked_of in (
        (found.results, "relevance", pairs),
        (found.baselines, "relevance/random", controls),
    ):
        task = dataclasses.replace(RELEVANCE, rules=tnt_rules.relevant)
        inputs = {
            id: RelevanceInput(
                turns=list(turns), use_case=config.taxonomy.use_case, label=_plain(label)
            )
            for id, (turns, label, _) in asked_of.items()
        }
        said = [r.value.relevant for r in asked.ask(task, inputs).values() if r.ok]
        if said:
            into[name] = proportion(sum(said), len(said))


def _chosen(
    asked: Asking,
    config,
    pairs: Mapping[str, tuple[Sequence[Turn], NumberedLabel, NumberedLabel]],
) -> tuple[list[float], Estimate | None]:
    """(1 where the first label wins in both orders, a half where they disagree, else 0; the share
    of disagreements)."""
    task = dataclasses.replace(CHOICE, rules=tnt_rules.choose)

    def ask(swapped: bool):
        inputs = {}
        for id, (turns, one, two) in pairs.items():
            first, second = (two, one) if swapped else (one, two)
            inputs[id] = ChoiceInput(
                turns=list(turns),
                use_case=config.taxonomy.use_case,
                first=_plain(first),
                second=_plain(second),
            )
        return asked.ask(task, inputs)

    straight, swapped = ask(False), ask(True)
    points, flips = [], 0
    for id in pairs:
        if straight[id].ok and swapped[id].ok:
            wins = (straight[id].value.better == "first") + (swapped[id].value.better == "second")
            points.append(wins / 2)
            flips += wins == 1
    return points, proportion(flips, len(points)) if points else None


def _plain(label: NumberedLabel) -> Label:
    return Label(name=label.name, description=label.description)


def _mean(into: dict[str, Estimate], name: str, values: Sequence[float], config) -> None:
    if len(values) > 1:
        into[name] = bootstrap_mean(values, seed=config.seed, unit="rate")


# ---------------------------------------------------------------- classifiers


def _by_classifier(found: Found, config, talks: Documents, mined: "Mined", light: "Light") -> None:
    """How far the classifiers say of test documents what was assigned to them."""
    ids = [
        talks.ids[i]
        for i in talks.test
        if primary_name(mined.assigned, talks.ids[i]) not in (None, OTHER)
    ]
    if not ids:
        return
    same = agreement(
        [found.classified[id] for id in ids],
        [mined.assigned[id].primary.name for id in ids],
        seed=config.seed,
    )
    found.results["kappa/classifier_assigned"] = same.kappa
    found.results["accuracy/classifier_assigned"] = same.accuracy
    found.baselines["accuracy/majority_assigned"] = same.majority
    place = {id: i for i, id in enumerate(talks.ids)}
    said = light.applicable.predict(mined.embeddings[[place[id] for id in ids]])
    exact = sum(
        set(labels) == {x.name for x in mined.assigned[id].applicable}
        for id, labels in zip(ids, said, strict=True)
    )
    found.results["exact/classifier_assigned"] = proportion(exact, len(ids))


# ---------------------------------------------------------------- known classes


def _against_known(
    found: Found, config, talks: Documents, mined: "Mined", gold: str, finer: str
) -> None:
    known = talks.known(gold)
    train = [i for i in talks.train if known[i] is not None]
    test = [i for i in talks.test if known[i] is not None]
    names = [primary_name(mined.assigned, id) for id in talks.ids]
    own = [i for i in train if names[i] is not None]
    if not own:  # classes are known of test documents alone, or no row was labelled
        return
    truth = [known[i] for i in own]
    _groups(found.results, "", [names[i] for i in own], truth)
    if finer:
        _second(found, talks, mined, talks.known(finer))
    count = min(config.taxonomy.max_labels, len(own))
    clusters = fit_clusters(mined.embeddings[own], count, seed=config.seed)
    grouped = [str(k) for k in clusters.assign(mined.embeddings)]
    _groups(found.baselines, "/kmeans_ctfidf", [grouped[i] for i in own], truth)
    rng = np.random.default_rng((config.seed, 5))
    drawn = [mined.labels[k].name for k in rng.integers(0, len(mined.labels), len(own))]
    _groups(found.baselines, "/random", drawn, truth)
    if not test or not own:
        return
    right = [known[i] for i in test]

    def accuracy(said: Sequence[str | None], groups: Sequence[str]) -> Estimate:
        """Each label stands for the class that is most frequent in it among what was learned."""
        meaning = majority_classes(groups, truth)
        hits = sum(
            label is not None and meaning.get(label) == r
            for label, r in zip(said, right, strict=True)
        )
        return proportion(hits, len(right))

    assigned = [names[i] for i in own]
    found.results["assigned_accuracy"] = accuracy([names[i] for i in test], assigned)
    x_ND = mined.embeddings
    if found.classified:
        said = [found.classified[talks.ids[i]] for i in test]
        found.results["classifier_accuracy"] = accuracy(said, assigned)
        meaning = majority_classes(assigned, truth)
        _columns(found, config, [names[i] for i in test], said, right, meaning)
    by_clusters = _taught(x_ND, own, [grouped[i] for i in own], test, config)
    if by_clusters is not None:
        found.baselines["classifier_accuracy/kmeans_ctfidf"] = accuracy(
            by_clusters, [grouped[i] for i in own]
        )
    by_known = _taught(x_ND, own, truth, test, config)
    if by_known is not None:
        hits = sum(a == b for a, b in zip(by_known, right, strict=True))
        found.baselines["classifier_accuracy/gold"] = proportion(hits, len(right))
    most = max(set(truth), key=lambda name: (truth.count(name), name))
    found.baselines["classifier_accuracy/majority"] = proportion(right.count(most), len(right))


def _groups(
    into: dict[str, Estimate], suffix: str, groups: Sequence[str], truth: Sequence[str]
) -> None:
    if len(groups) > 1:
        same = clustering_agreement(groups, truth)
        into |= {f"{x}{suffix}": getattr(same, x) for x in ("nmi", "ari", "purity")}


def _second(found: Found, talks: Documents, mined: "Mined", finer: Sequence[str | None]) -> None:
    """The second level against the finer classes, of documents that have a label of it."""
    apart = set(talks.test)
    both = [
        (f"{mined.assigned[id].primary.name}/{mined.inside[id].primary.name}", finer[i])
        for i, id in enumerate(talks.ids)
        if i not in apart and id in mined.inside and finer[i] is not None
    ]
    if len(both) > 1:
        _groups(found.results, "/second_level", *map(list, zip(*both, strict=True)))


def _taught(
    x_ND: np.ndarray, own: Sequence[int], labels: Sequence[str], test: Sequence[int], config
) -> list[str] | None:
    """What a classifier of these labels says of test documents."""
    often = {name for name in set(labels) if labels.count(name) >= _LEAST}
    if len(often) < 2:
        return None
    kept = [(i, label) for i, label in zip(own, labels, strict=True) if label in often]
    rows, names = map(list, zip(*kept, strict=True))
    fitted = fit_classifier(x_ND[rows], names, seed=config.seed)
    return fitted.classifier.predict(x_ND[list(test)])


def _columns(
    found: Found,
    config,
    assigned: Sequence[str | None],
    classified: Sequence[str],
    human: Sequence[str],
    meaning: Mapping[str, str],
) -> None:
    """Kappa of each two of the labellers on test documents, labels by the class they stand for."""
    labellers = {
        "assigned": [None if x is None else meaning.get(x, OTHER) for x in assigned],
        "classifier": [meaning.get(x, OTHER) for x in classified],
        "human": list(human),
    }
    for one in labellers:
        row = [one]
        for two in labellers:
            pairs = [
                (a, b)
                for a, b in zip(labellers[one], labellers[two], strict=True)
                if a is not None and b is not None
            ]
            if one == two or not pairs:
                row.append("")
                continue
            kappa = agreement(*map(list, zip(*pairs, strict=True)), seed=config.seed).kappa
            row.append(f"{kappa.value:.3f} [{kappa.ci95[0]:.3f}, {kappa.ci95[1]:.3f}]")
            if one != "human" and two == "human":
                found.results[f"kappa/{one}_human"] = kappa
        found.columns.append(row)


# ---------------------------------------------------------------- languages


def _languages(found: Found, config, talks: Documents, mined: "Mined") -> None:
    languages = talks.known(config.data.language)
    gold, _ = gold_keys(config)
    known = talks.known(gold) if gold else [None] * len(talks)
    for language in sorted({x for x in languages if x is not None}):
        own = [
            i
            for i in range(len(talks))
            if languages[i] == language and talks.ids[i] in mined.assigned
        ]
        if len(own) < 2:
            continue
        names = [mined.assigned[talks.ids[i]].primary.name for i in own]
        covered = proportion(sum(name != OTHER for name in names), len(own))
        said = [
            (found.classified[talks.ids[i]], name)
            for i, name in zip(own, names, strict=True)
            if talks.ids[i] in found.classified and name != OTHER
        ]
        same = proportion(sum(a == b for a, b in said), len(said)) if said else None
        with_known = [
            (n, known[i]) for i, n in zip(own, names, strict=True) if known[i] is not None
        ]
        nmi = None
        if len(with_known) > 1:
            nmi = clustering_agreement(*map(list, zip(*with_known, strict=True))).nmi
        found.languages.append([language, str(len(own)), *map(_cell, (covered, same, nmi))])


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    low, high = estimate.ci95
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"
