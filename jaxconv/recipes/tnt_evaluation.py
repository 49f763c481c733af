"""What a taxonomy and its classifiers are worth, by judgements and by agreement."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.evals.agreement import agreement
from jaxconv.evals.clustering import clustering_agreement
from jaxconv.evals.report import cell
from jaxconv.evals.statistics import Estimate, bootstrap_mean, proportion
from jaxconv.llm.conversations import Turn
from jaxconv.recipes import tnt_rules
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.tnt_documents import Documents, gold_keys
from jaxconv.recipes.tnt_known import Found, against_known, primary_name
from jaxconv.recipes.tnt_tasks import (
    CHOICE,
    OTHER,
    OTHER_ID,
    RELEVANCE,
    ChoiceInput,
    Label,
    NumberedLabel,
    RelevanceInput,
)

if TYPE_CHECKING:
    from jaxconv.recipes.tnt_classifiers import Light
    from jaxconv.recipes.tnt_llm import Mined


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
        against_known(found, config, talks, mined, gold, finer)
    _languages(found, config, talks, mined)
    return found


# ---------------------------------------------------------------- judgements


def _judged(found: Found, config, asked: Asking, talks: Documents, mined: "Mined") -> None:
    """Forced choices between the assigned and a random other label, in both orders, and relevance;
    and both again with another label, as often as documents have it, in the place of the assigned
    one, against a third: then a judge who does not care which labels are frequent or sound well is
    at a half."""
    if len(mined.labels) < 2:
        found.notes.append("No label_accuracy and no relevance: there is one label.")
        return
    by_id = {label.id: label for label in mined.labels}
    rng = np.random.default_rng((config.seed, 4))
    test = [
        i
        for i in rng.permutation(talks.test).tolist()
        if mined.assigned.get(talks.ids[i]) and mined.assigned[talks.ids[i]].primary.id in by_id
    ][: config.judge.documents]
    if len(test) < 2:
        found.notes.append(
            f"No label_accuracy and no relevance: {len(test)} of the documents to test on have a "
            "label of the taxonomy, and an interval needs 2."
        )
        return
    given = [by_id[mined.assigned[talks.ids[i]].primary.id] for i in test]

    def another(than: Sequence[NumberedLabel], of: Sequence[NumberedLabel]) -> NumberedLabel | None:
        ids = {label.id for label in than}
        left = [label for label in of if label.id not in ids]
        return left[rng.integers(len(left))] if left else None

    pairs, controls = {}, {}
    for i, own in zip(test, given, strict=True):
        pairs[talks.ids[i]] = talks.turns[i], own, another([own], mined.labels)
        moved = another([own], given)  # as often as documents have it
        third = moved and another([own, moved], mined.labels)
        if third:
            controls[talks.ids[i]] = talks.turns[i], moved, third
    if not controls:
        found.notes.append(
            "No label_accuracy/moved and no relevance/moved: they need three labels, and documents "
            "with different ones."
        )
    points, found.flips = _chosen(asked, config, pairs)
    _mean(found.results, "label_accuracy", points, config)
    points, _ = _chosen(asked, config, controls)
    _mean(found.baselines, "label_accuracy/moved", points, config)
    for into, name, asked_of in (
        (found.results, "relevance", pairs),
        (found.baselines, "relevance/moved", controls),
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
    if light.applicable is None:
        return
    place = {id: i for i, id in enumerate(talks.ids)}
    said = light.applicable.predict(mined.embeddings[[place[id] for id in ids]])
    exact = sum(
        set(labels) == {x.name for x in mined.assigned[id].applicable}
        for id, labels in zip(ids, said, strict=True)
    )
    found.results["exact/classifier_assigned"] = proportion(exact, len(ids))


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
        found.languages.append([language, *(cell(x, with_n=True) for x in (covered, same, nmi))])
