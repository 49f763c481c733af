"""The report and the files of a taxonomy."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxconv.evals.report import Report, table
from jaxconv.models.text_classifier import TextClassifier, save_text_classifier
from jaxconv.recipes import tnt_page, tnt_rules
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.tnt_documents import Documents
from jaxconv.recipes.tnt_tasks import OTHER, OTHER_ID, Assignment, NumberedLabel
from jaxconv.train import atomic
from jaxconv.train.classifiers import Fitted
from jaxconv.train.workdir import Workdir

if TYPE_CHECKING:
    from jaxconv.recipes.tnt_classifiers import Light, Tried
    from jaxconv.recipes.tnt_known import Found
    from jaxconv.recipes.tnt_llm import Mined
    from jaxconv.recipes.tnt_tables import Step

_EXAMPLES = 5  # of a label
_EDITS = 3  # of a step
_MEANING = """\
- labelled: documents with a valid answer; coverage: of these, with a label that is not Other.
- label_accuracy: how often the label that was given is chosen before a random other one, in both
  orders of the two (an answer that changes with the order counts as half); relevance: how often the
  label is said to fit. /moved is the same with another label, that some other document has, in
  its place, against a third. Of documents to test on.
- …/classifier_assigned: the classifier against the labels that were given, of documents to test on
  whose label is not Other; exact: with all labels that apply the same.
- nmi, ari, purity: labels against known classes, of the documents that the taxonomy was made from
  and others to learn from; …/second_level: labels of both levels against the finer classes.
- assigned_accuracy, classifier_accuracy: of documents to test on, when every label stands for the
  known class that is most frequent in it. kmeans_ctfidf: clusters of the same embeddings;
  kmeans_smoothed: of what the rules cluster, which is averaged with neighbours; gold: a classifier
  that is taught the known classes.
"""
_LONGEST = 300  # characters of an example


def report_of(
    config,
    asked: Asking,
    talks: Documents,
    mined: "Mined",
    light: "Light",
    found: "Found",
    workdir: Workdir,
) -> Report:
    """Writes the artifacts and fills the report."""
    report = Report(results=found.results, baselines=found.baselines)
    content = taxonomy_content(config, talks, mined, asked.who)
    atomic.write_json(workdir.artifacts / "taxonomy.json", content)
    atomic.write_text(workdir.path / "taxonomy.html", tnt_page.page(content))
    _labels_file(talks, mined, found, workdir)
    report.artifacts |= {
        "taxonomy": "artifacts/taxonomy.json",
        "page": "taxonomy.html",
        "labels": "artifacts/labels.jsonl",
    }
    for name, head in (("classifier", light.primary), ("classifier_all", light.applicable)):
        folder = workdir.artifacts / name
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier attempt had
        if head is not None:
            save_text_classifier(TextClassifier(mined.encoder, head), folder)
            report.artifacts[name] = f"artifacts/{name}"
    _sections(report, content, light, found)
    _notes(report, config, asked, talks, mined, light, found)
    return report


def taxonomy_content(config, talks: Documents, mined: "Mined", who: str) -> dict[str, Any]:
    """All that a reader of the taxonomy needs, as JSON."""

    def level(
        labels: Sequence[NumberedLabel], assigned: dict[str, Assignment]
    ) -> list[dict[str, Any]]:
        primary = Counter(x.primary.id for x in assigned.values())
        applies = Counter(label.id for x in assigned.values() for label in x.applicable)
        turns = dict(zip(talks.ids, talks.texts, strict=True))
        other = NumberedLabel(id=OTHER_ID, name=OTHER, description="No label applied.")
        rows = []
        for label in (*labels, *([other] if primary[OTHER_ID] else [])):
            ids = sorted(id for id, x in assigned.items() if x.primary.id == label.id)
            rows.append(
                {
                    "id": label.id,
                    "name": label.name,
                    "description": label.description,
                    "primary": primary[label.id],
                    "applicable": applies[label.id],
                    "examples": [
                        {"id": id, "text": turns[id][:_LONGEST]} for id in _spread(ids, _EXAMPLES)
                    ],
                }
            )
        return rows

    first = level(mined.labels, dict(mined.assigned))
    for row in first:
        if row["id"] in mined.second:
            own = {
                id: x
                for id, x in mined.inside.items()
                if mined.assigned[id].primary.id == row["id"]
            }
            row["inside"] = level(mined.second[row["id"]], own)
    return {
        "use_case": config.taxonomy.use_case,
        "answers_of": who,
        "documents": len(talks),
        "labels": first,
        "steps": [_step(step) for step in mined.steps],
    }


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly."""
    return [ids[i * len(ids) // count] for i in range(min(count, len(ids)))] if ids else []


def _step(step: "Step") -> dict[str, Any]:
    return {
        "place": step.place,
        "chain": step.chain,
        "number": step.number,
        "kind": step.kind,
        "rating": step.rating,
        "explanation": step.explanation,
        "edits": list(step.edits),
        "chosen": step.chosen,
        "labels": [label.name for label in step.labels],
    }


def _labels_file(talks: Documents, mined: "Mined", found: "Found", workdir: Workdir) -> None:
    rows = []
    for id in sorted(talks.ids):
        row: dict[str, Any] = {"id": id}
        if id in mined.assigned:
            given = mined.assigned[id]
            row |= {
                "primary": given.primary.model_dump(),
                "applicable": [label.model_dump() for label in given.applicable],
            }
        if id in mined.inside:
            row["inside"] = mined.inside[id].primary.model_dump()
        if id in found.classified:
            row["classifier"] = found.classified[id]
        rows.append(row)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic.write_text(workdir.artifacts / "labels.jsonl", "".join(lines))


def _measured(fitted: Fitted | None, failed: str) -> list[str]:
    if fitted is None:
        return [failed, "", ""]
    nats = max(fitted.nll, 0.0)  # rounding may leave a little less than nothing
    return [f"{nats:.3f}", f"{fitted.accuracy:.3f}", f"{fitted.kept_apart:,}"]


def _taken(tried: "Tried", light: "Light") -> str:
    own = tried.fitted is not None and tried.fitted.classifier is light.primary
    return "taken" if own else ""


def _shown(label: dict[str, Any]) -> list[str]:
    return [label["name"], label["description"], f"{label['primary']:,}"]


def _sections(report: Report, content: dict[str, Any], light: "Light", found: "Found") -> None:
    report.sections["What the numbers are"] = _MEANING
    rows = []
    for label in content["labels"]:
        rows.append([str(label["id"]), *_shown(label)])
        for inner in label.get("inside", ()):
            rows.append([f"{label['id']}.{inner['id']}", *_shown(inner)])
    report.sections["Taxonomy"] = table(["id", "label", "description", "primary of"], rows)
    if found.columns:
        report.sections["Labellers"] = (
            "Cohen's kappa on test documents, with how many; every label stands for the known "
            "class that is most frequent in it among training documents. Known classes are what "
            "people gave where they did, and what was planted in the embedded world.\n\n"
            + table(["", "assigned", "classifier", "known"], found.columns)
        )
    if found.languages:
        report.sections["By language"] = table(
            ["language", "coverage", "classifier as assigned", "NMI"], found.languages
        )
    if light.tried:
        rows = [
            [one.method, one.setting, *_measured(one.fitted, one.failed), _taken(one, light)]
            for one in light.tried
        ]
        report.sections["Classifiers"] = (
            "On the part of the training documents that is kept apart and calibrates.\n\n"
            + table(
                [
                    *("method", "inverse penalty or width", "nats a document", "accuracy"),
                    *("documents", ""),
                ],
                rows,
            )
        )
    steps = [
        [
            step["place"],
            f"{step['chain']}.{step['number']}",
            step["kind"],
            "" if step["rating"] is None else str(step["rating"]),
            str(len(step["labels"])),
            "; ".join([*step["edits"][:_EDITS], *["…"][: len(step["edits"]) > _EDITS]]),
            {None: "", True: "better", False: "not better"}[step["chosen"]],
        ]
        for step in content["steps"]
    ]
    report.sections["Trajectory"] = table(
        ["inside", "step", "", "rating", "labels", "edits", "compared"], steps
    )


def _notes(
    report: Report,
    config,
    asked: Asking,
    talks: Documents,
    mined: "Mined",
    light: "Light",
    found: "Found",
) -> None:
    report.notes.append(
        f"Taxonomy, assignment and judgements of {asked.who}; {mined.encoder.about}."
    )
    report.notes.append(
        f"Labels: {len(mined.labels)}, made from {mined.made_from} of {len(talks.train)} documents "
        f"to learn from; {len(talks.test)} to test on. Browse them in taxonomy.html."
    )
    if talks.empty:
        report.notes.append(
            f"Documents that were left out because their user says nothing: {talks.empty}."
        )
    if nameless := sum(tnt_rules.is_placeholder(label.name) for label in mined.labels):
        report.notes.append(
            f"{nameless} of {len(mined.labels)} labels have no name: their documents have no "
            "phrase of their own, or none in Latin letters; rules translate nothing."
        )
    report.notes += [*mined.notes, *found.notes]
    if asked.by_rules:
        report.notes.append(
            "label_accuracy and relevance are judged by words in common, which is no judgement of "
            "meaning."
        )
    if found.flips is not None:
        report.notes.append(f"Forced choices changed with the order: {found.flips}.")
    if light.left_out:
        shown = ", ".join(light.left_out[:5])
        report.notes.append(
            f"{len(light.left_out)} labels have too few documents for the classifiers: {shown}."
        )
    if light.failed:
        report.notes.append(f"No classifier of all labels that apply: {light.failed}.")
    if light.primary is None:
        report.notes.append(
            "No classifier: fewer than two labels have enough documents, or none converged."
        )
