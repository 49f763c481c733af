"""The report of SPUR and its files: what the rubrics are, and why a user counts as satisfied."""

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxconv.errors import Failed
from jaxconv.evals.report import Report, escape, table
from jaxconv.models.text_classifier import TextClassifier, save_text_classifier
from jaxconv.recipes import spur_numbers
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.spur_analysis import (
    Distilled,
    ItemTest,
    distil,
    item_tests,
    satisfied_of,
)
from jaxconv.recipes.spur_talks import Talks
from jaxconv.recipes.spur_tasks import ItemScore, ItemScores
from jaxconv.train import atomic
from jaxconv.train.workdir import Workdir

if TYPE_CHECKING:
    from jaxconv.recipes.spur import Study, Trial

_SHOWN = 4  # conversations that are told in full
_TURNS, _CHARACTERS = 12, 600  # of each of them, and of a turn


def report_of(config, asked: Asking, talks: Talks, study: "Study", workdir: Workdir) -> Report:
    """Writes the artifacts and fills the report."""
    report = Report()
    spur_numbers.methods(report, config, asked, talks, study)
    spur_numbers.languages(report, config, talks, study)
    spur_numbers.transfer(report, config, talks, study)
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
            f"Shuffled labels: {len(study.shuffled)} times rubrics are learned from labels that "
            "are dealt anew, one half of each side; who shows nothing is of either by a coin. The "
            "interval of balanced_accuracy/shuffled_labels is over these and over conversations, "
            "and must cover 0.5, what guessing gets. Compare balanced_accuracy/spur_threshold_0."
        )
    elif config.control.shuffles:
        report.notes.append(
            f"No control with shuffled labels: {len(study.shuffled)} of {config.control.shuffles} "
            "repetitions came to a result, and an interval needs 2 with both labels."
        )
    if report.results["scored"].value < 1:
        report.notes.append(
            "A conversation without a valid answer is in no class and in no score; the share that "
            "has one in every split is 'scored'."
        )
