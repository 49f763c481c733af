"""What SPUR's study comes to in numbers with intervals."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.data.synthetic import satisfaction
from jaxconv.evals.classification import weighted_scores
from jaxconv.evals.report import Report, cell, escape, table
from jaxconv.evals.statistics import Estimate, bootstrap_mean, proportion, with_repetitions
from jaxconv.llm.conversations import Turn
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.spur_analysis import balanced_accuracy
from jaxconv.recipes.spur_baselines import ASKED
from jaxconv.recipes.spur_talks import Talks, domain_groups
from jaxconv.recipes.spur_tasks import SAT

if TYPE_CHECKING:
    from jaxconv.recipes.spur import Study

_OURS = ("spur", "spur_threshold_0", "rubric_scores", "embedding_and_rubric")
_LEAST = 20  # conversations of a language that get a row


def methods(report: Report, config, asked: Asking, talks: Talks, study: "Study") -> None:
    """Scores of all methods, what SPUR gains on others, and the controls."""
    names = list(study.trials[0].predicted)
    rows = []
    for name in names:
        splits = [trial.predicted[name] for trial in study.trials]
        splits = [labels for labels in splits if any(labels)]
        if not splits:
            continue
        found = weighted_scores(splits, talks.truth, seed=config.seed)
        into = report.results if name in _OURS else report.baselines
        for metric in ("f1", "accuracy"):
            into[f"{metric}/{name}"] = getattr(found, metric)
        if name == "spur_threshold_0":
            into[f"balanced_accuracy/{name}"] = found.balanced
        who = asked.who if name in (*ASKED, *_OURS) else "no model"
        cells = (cell(getattr(found, m)) for m in ("precision", "recall", "f1", "accuracy"))
        rows.append([name, who, *cells, f"{found.f1.n:,}"])
    thresholds = ", ".join(f"{trial.threshold:g}" for trial in study.trials)
    report.sections["Methods"] = (
        f"Weighted scores on test parts, means over {len(study.trials)} splits; intervals are over "
        "conversations and over what is learned in each split. spur calls a user satisfied where R "
        "is above a threshold that is tuned on "
        f"the dev part ({thresholds}), spur_threshold_0 where it is above 0. few_shot has "
        f"{config.spur.shots} examples of each label. A method leaves out what it has no valid "
        "answer for.\n\n"
        + table(
            ["method", "answers of", "precision", "recall", "F1", "accuracy", "conversations"], rows
        )
    )
    tested = sorted({i for trial in study.trials for i in trial.split.test})
    known_SN = np.stack([(trial.points >= 0).all(axis=1) for trial in study.trials])
    scored = int(known_SN.all(axis=0)[tested].sum())
    report.results["scored"] = proportion(scored, len(tested))
    _against_baselines(report, talks, study, seed=config.seed)
    _silent(report, study, tested)
    control = _by_chance(talks, study, seed=config.seed)
    if control is not None:
        report.baselines["balanced_accuracy/shuffled_labels"] = control
    if not config.data.path:
        leans = [satisfaction.word_list(_said(talks.turns[i])) for i in tested]
        right = [
            0.5 if not lean else float((lean > 0) == (talks.truth[i] == SAT))
            for i, lean in zip(tested, leans, strict=True)
        ]
        report.baselines["accuracy/all_words"] = bootstrap_mean(
            right, seed=config.seed, unit="rate"
        )
        ceiling = satisfaction.ceiling(config.data.noise)
        report.baselines["accuracy/ceiling"] = Estimate(ceiling, None, len(tested), "rate")


def _said(turns: Sequence[Turn]) -> list[str]:
    return [turn.content for turn in turns if turn.role == "user"]


def _against_baselines(report: Report, talks: Talks, study: "Study", *, seed: int) -> None:
    """How much more often right SPUR is than others about the same conversations."""
    for name in ("embedding", *ASKED):
        values, owners, means = [], [], []
        for trial in study.trials:
            both = zip(trial.predicted["spur"], trial.predicted[name], talks.truth, strict=True)
            differences = {
                i: (own == truth) - float(other == truth)
                for i, (own, other, truth) in enumerate(both)
                if own is not None and other is not None
            }
            if differences:
                values += differences.values()
                owners += differences
                means.append(np.mean(list(differences.values())))
        if len(set(owners)) > 1:
            gain = bootstrap_mean(values, clusters=owners, seed=seed, unit="rate")
            report.results[f"gain/accuracy_over_{name}"] = with_repetitions(
                gain, means, within=(-1.0, 1.0)
            )


def _silent(report: Report, study: "Study", tested: Sequence[int]) -> None:
    """The share of users who show no item of a rubric, and so have an R of 0."""
    shown = [trial.points[tested] for trial in study.trials]
    silent = [(points == 0).all(axis=1) for points in shown]
    known = [(points >= 0).all(axis=1) for points in shown]
    values, owners = [], []
    for quiet_N, known_N in zip(silent, known, strict=True):
        values += quiet_N[known_N].tolist()
        owners += np.asarray(tested)[known_N].tolist()
    if len(set(owners)) > 1:
        report.results["shows_nothing"] = bootstrap_mean(
            values, clusters=owners, seed=0, unit="rate"
        )


def _by_chance(talks: Talks, study: "Study", *, seed: int) -> Estimate | None:
    """Balanced accuracy with shuffled labels; n is the number of repetitions."""
    values = [balanced_accuracy(labels, talks.truth) for labels in study.shuffled]
    kept = [own for value, own in zip(values, study.shuffled, strict=True) if value is not None]
    if len(kept) < 2:
        return None
    found = weighted_scores(kept, talks.truth, seed=seed).balanced
    return dataclasses.replace(found, n=len(kept))


def languages(report: Report, config, talks: Talks, study: "Study") -> None:
    """A row for each language with conversations enough."""
    found = [str(meta.get(config.data.language) or "") for meta in talks.meta]
    rows = []
    for language in sorted({x for x in found if x}):
        own = [i for i, x in enumerate(found) if x == language]
        splits = [[trial.predicted["spur"][i] for i in own] for trial in study.trials]
        splits = [labels for labels in splits if any(labels)]
        if not splits:
            continue
        scores = weighted_scores(splits, [talks.truth[i] for i in own], seed=config.seed)
        if scores.f1.n >= _LEAST:
            rows.append([language, f"{scores.f1.n:,}", cell(scores.f1), cell(scores.accuracy)])
    if rows:
        report.sections["By language"] = "Of spur, threshold tuned.\n\n" + table(
            ["language", "conversations", "F1", "accuracy"], rows
        )


def transfer(report: Report, config, talks: Talks, study: "Study") -> None:
    """Rubrics of one group of domains on conversations of the other."""
    rows = []
    for (learned, tested), labels in study.transfer.items():
        if not any(labels):
            continue
        found = weighted_scores([labels], talks.truth, seed=config.seed)
        report.results[f"f1/transfer/{learned}_to_{tested}"] = found.f1
        rows.append([learned, tested, cell(found.f1), cell(found.accuracy), str(found.f1.n)])
    if not rows:
        return
    lost = []
    for name in sorted({tested for _, tested in study.transfer}):
        rubrics = {learned: labels for (learned, t), labels in study.transfer.items() if t == name}
        own = rubrics.pop(name, [None] * len(talks))
        for other in rubrics.values():
            lost += [
                (a == truth) - float(b == truth)
                for a, b, truth in zip(own, other, talks.truth, strict=True)
                if a is not None and b is not None
            ]
    if len(lost) > 1:
        report.results["transfer/accuracy_lost"] = bootstrap_mean(
            lost, seed=config.seed, unit="rate"
        )
    groups = domain_groups(config, talks)
    said = "; ".join(f"{name}: {', '.join(sorted(own))}" for name, own in groups.items())
    report.sections["Rubrics in other domains"] = (
        f"Domains in two groups ({escape(said)}), threshold 0, the first split; "
        "transfer/accuracy_lost is what a rubric of the other group is less often right about the "
        "same conversations than one of their own.\n\n"
        + table(["learned on", "tested on", "F1", "accuracy", "conversations"], rows)
    )
