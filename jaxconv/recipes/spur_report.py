"""What SPUR's study comes to: numbers with intervals, tables, and files that say why."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxconv.data.synthetic import satisfaction
from jaxconv.errors import Failed
from jaxconv.evals.classification import weighted_scores
from jaxconv.evals.report import Report, escape, table
from jaxconv.evals.statistics import Estimate, bootstrap_mean, proportion, with_repetitions
from jaxconv.llm.conversations import Turn
from jaxconv.models.text_classifier import TextClassifier, save_text_classifier
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.spur_analysis import (
    Distilled,
    ItemTest,
    balanced_accuracy,
    distil,
    item_tests,
    satisfied_of,
)
from jaxconv.recipes.spur_baselines import ASKED
from jaxconv.recipes.spur_talks import LEAST, Talks, domain_groups
from jaxconv.recipes.spur_tasks import SAT, ItemScore, ItemScores
from jaxconv.train import atomic
from jaxconv.train.workdir import Workdir

if TYPE_CHECKING:
    from jaxconv.recipes.spur import Study, Trial

_OURS = ("spur", "spur_threshold_0", "rubric_scores", "embedding_and_rubric")
_SHOWN = 4  # conversations that are told in full
_TURNS, _CHARACTERS = 12, 600  # of each of them, and of a turn
_LEAST = 20  # conversations of a language that get a row


def report_of(config, asked: Asking, talks: Talks, study: "Study", workdir: Workdir) -> Report:
    """Writes the artifacts and fills the report."""
    report = Report()
    _methods(report, config, asked, talks, study)
    _languages(report, config, talks, study)
    _transfer(report, config, talks, study)
    trial = study.trials[0]
    tests = _tests(talks, trial)
    distilled = _distilled(report, trial, study, seed=config.seed)
    if distilled.mean_auc is not None:
        report.results["distilled/auc"] = distilled.mean_auc
    folder = workdir.artifacts / "item_classifier"
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier attempt had
    if distilled.classifier is not None:
        save_text_classifier(TextClassifier(study.encoder, distilled.classifier), folder)
        report.artifacts["item_classifier"] = "artifacts/item_classifier"
    _items(report, trial, tests, distilled)
    _rubrics_file(report, talks, study, tests, distilled, workdir)
    _scores_file(report, talks, trial, study.scores, workdir)
    _why(report, talks, trial, study.scores)
    _notes(report, config, asked, talks, study)
    return report


def _methods(report: Report, config, asked: Asking, talks: Talks, study: "Study") -> None:
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
        cells = (_cell(getattr(found, m)) for m in ("precision", "recall", "f1", "accuracy"))
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
            report.results[f"gain/accuracy_over_{name}"] = with_repetitions(gain, means)


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


def _languages(report: Report, config, talks: Talks, study: "Study") -> None:
    found = [str(meta.get(config.data.language) or "") for meta in talks.meta]
    rows = []
    for language in sorted({x for x in found if x}):
        own = [i for i, x in enumerate(found) if x == language]
        if len(own) < _LEAST:
            continue
        splits = [[trial.predicted["spur"][i] for i in own] for trial in study.trials]
        splits = [labels for labels in splits if any(labels)]
        if splits:
            scores = weighted_scores(splits, [talks.truth[i] for i in own], seed=config.seed)
            rows.append([language, str(len(own)), _cell(scores.f1), _cell(scores.accuracy)])
    if rows:
        report.sections["By language"] = "Of spur, threshold tuned.\n\n" + table(
            ["language", "conversations", "F1", "accuracy"], rows
        )


def _transfer(report: Report, config, talks: Talks, study: "Study") -> None:
    rows = []
    for (learned, tested), labels in study.transfer.items():
        if not any(labels):
            continue
        found = weighted_scores([labels], talks.truth, seed=config.seed)
        report.results[f"f1/transfer/{learned}_to_{tested}"] = found.f1
        rows.append([learned, tested, _cell(found.f1), _cell(found.accuracy), str(found.f1.n)])
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


def _tests(talks: Talks, trial: "Trial") -> list[ItemTest]:
    known_N = (trial.points >= 0).all(axis=1)
    test = [i for i in trial.split.test if known_N[i]]
    return item_tests(trial.points[test] > 0, satisfied_of([talks.truth[i] for i in test]))


def _distilled(report: Report, trial: "Trial", study: "Study", *, seed: int) -> Distilled:
    try:
        return distil(trial.points, trial.rubrics.items, study.embeddings, seed=seed)
    except Failed as failed:  # beside the point, and the rest is paid for
        report.notes.append(f"No item_classifier: {failed}.")
        return Distilled(None, {}, None)


def _in_order(trial: "Trial", scores: ItemScores) -> list[ItemScore]:
    own = {item.id: item for item in scores.items}
    return [own[item.id] for item in trial.rubrics.items]


def _items(report: Report, trial: "Trial", tests: Sequence[ItemTest], distilled: Distilled) -> None:
    rows = []
    for item, test in zip(trial.rubrics.items, tests, strict=True):
        auc = distilled.auc.get(item.id)
        rows.append(
            [
                item.id,
                item.name,
                ", ".join(item.examples[:3]),
                f"{test.sat:.1%}",
                f"{test.dsat:.1%}",
                f"{test.chi_square:.1f}",
                f"{test.p:.2g}",
                "" if auc is None else f"{auc:.2f}",
            ]
        )
    known = int((trial.points[trial.split.test] >= 0).all(axis=1).sum())
    half = f", {distilled.mean_auc.n} conversations" if distilled.mean_auc else ""
    report.sections["Rubric of the first split"] = (
        f"Shares of users of the test part ({known} conversations) who show an item. The AUC is "
        "that of a classifier of embeddings which was fitted on one half of all conversations, on "
        f"the other half{half}; it is empty where an item is shown too seldom.\n\n"
        + table(
            ["id", "item", "such as", "of sat", "of dsat", "chi-square", "p (Holm)", "AUC"], rows
        )
    )


def _rubrics_file(
    report: Report,
    talks: Talks,
    study: "Study",
    tests: Sequence[ItemTest],
    distilled: Distilled,
    workdir: Workdir,
) -> None:
    content = []
    for number, trial in enumerate(study.trials):
        entry = {
            "split": number,
            "threshold": trial.threshold,
            "items": [item.model_dump() for item in trial.rubrics.items],
            "patterns": {
                key: {"satisfied": satisfied, **pattern.model_dump()}
                for key, (satisfied, pattern) in sorted(trial.rubrics.patterns.items())
            },
        }
        if not number:
            for item, test in zip(entry["items"], tests, strict=True):
                item |= {"chi_square": test.chi_square, "p": test.p, "shown": test.shown}
                item["auc"] = distilled.auc.get(item["id"])
        content.append(entry)
    atomic.write_json(workdir.artifacts / "rubrics.json", content)
    report.artifacts["rubrics"] = "artifacts/rubrics.json"


def _scores_file(
    report: Report,
    talks: Talks,
    trial: "Trial",
    scores: Mapping[str, ItemScores],
    workdir: Workdir,
) -> None:
    """The breakdown of every conversation of the first split, a line each."""
    names = {item.id: item.name for item in trial.rubrics.items}
    part = {i: name for name in ("train", "dev", "test") for i in getattr(trial.split, name)}
    lines = []
    for i, id in sorted(((i, talks.ids[i]) for i in part), key=lambda pair: pair[1]):
        row = {"id": id, "part": part[i], "label": talks.truth[i]}
        if id in scores:
            r = scores[id].satisfaction
            row |= {
                "satisfaction": r,
                "predicted": "sat" if r > trial.threshold else "dsat",
                "items": [
                    {"id": x.id, "name": names[x.id], "quote": x.quote, "score": x.score}
                    for x in _in_order(trial, scores[id])
                    if x.present
                ],
            }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    atomic.write_text(workdir.artifacts / "scores.jsonl", "".join(lines))
    report.artifacts["scores"] = "artifacts/scores.jsonl"


def _why(report: Report, talks: Talks, trial: "Trial", scores: Mapping[str, ItemScores]) -> None:
    """A few conversations of the test part with what was heard in them."""
    ids = [talks.ids[i] for i in trial.split.test if talks.ids[i] in scores]
    telling = sorted(ids, key=lambda id: (-sum(x.present for x in scores[id].items), id))
    names = {item.id: item.name for item in trial.rubrics.items}
    truth = dict(zip(talks.ids, talks.truth, strict=True))
    turns = dict(zip(talks.ids, talks.turns, strict=True))
    parts = []
    for id in telling[:_SHOWN]:
        found = scores[id]
        rows = [
            [x.id, names[x.id], x.quote, f"{'+' if x.id.startswith('S') else '-'}{x.score}"]
            for x in _in_order(trial, scores[id])
            if x.present
        ]
        said = "\n".join(
            f"- **{escape(t.role)}**: {escape(_cut(t.content))}" for t in turns[id][:_TURNS]
        )
        more = len(turns[id]) - _TURNS
        parts.append(
            f"### {escape(id)}: {found.satisfaction:+d}, known as {truth[id]}\n\n{said}\n"
            + (f"- and {more} turns more\n" if more > 0 else "")
            + "\n"
            + table(["item", "", "words of the user", "points"], rows)
        )
    report.sections["Why"] = "\n".join(parts)


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} […]"


def _notes(report: Report, config, asked: Asking, talks: Talks, study: "Study") -> None:
    for why, count in sorted(talks.left_out.items()):
        report.notes.append(f"Conversations that were left out: {count} {why}.")
    if not config.data.path:
        report.notes.append(
            f"Embedded conversations, a cause of the other side in {config.data.noise:.0%}; the "
            "ceiling, which is computed, is who knows every cause and the odds; all_words is who "
            "has a list of every way to put one."
        )
    report.notes.append(f"Rubrics and scores of {asked.who}; {study.encoder.about}.")
    report.notes += study.notes
    if "balanced_accuracy/shuffled_labels" in report.baselines:
        report.notes.append(
            f"Shuffled labels: {len(study.shuffled)} times rubrics are learned from labels of "
            "others; the interval of balanced_accuracy/shuffled_labels is over these and over "
            "conversations, and must cover 0.5, what guessing gets. Compare "
            "balanced_accuracy/spur_threshold_0."
        )
    elif config.control.shuffles:
        report.notes.append(
            f"No control with shuffled labels: {len(study.shuffled)} of {config.control.shuffles} "
            "repetitions came to a result, and an interval needs 2 with both labels."
        )
    if not study.transfer and config.data.domain:
        report.notes.append(
            f"No transfer between domains: config.data.domain={config.data.domain!r} gives no two "
            f"groups with {LEAST} training conversations of each label."
        )
    if report.results["scored"].value < 1:
        report.notes.append(
            "A conversation without a valid answer is in no class and in no score; the share that "
            "has one in every split is 'scored'."
        )


def _cell(estimate: Estimate) -> str:
    low, high = estimate.ci95
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"
