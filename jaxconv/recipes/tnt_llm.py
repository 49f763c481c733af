"""TnT-LLM: a taxonomy of conversations, and light classifiers that sort any number of them into it
(Wan et al. 2024, arXiv 2403.12173).

1. Every document of a sample is summarised for the use case.
2. Several chains: a table of labels from a first minibatch, updated with each of the others (a
   rating is the loss, suggested edits the gradient, the new table the step), and reviewed.
3. Model selection on documents kept apart: every few updates the table is compared with the best so
   far, in shuffled orders; at the end the best tables of the chains are.
4. The same inside each label gives a second level.
5. Every document gets its primary label and all that apply, by id and name; `Other` exists here
   alone.
6. Classifiers on embeddings learn these labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxconv.data.quarantine import Quarantine
from jaxconv.errors import Failed, Refused
from jaxconv.evals.report import Report
from jaxconv.llm import section
from jaxconv.models.hashed_ngrams import HashedNgrams
from jaxconv.models.text_encoder import TextEncoder, load_text_encoder
from jaxconv.recipes import tnt_classifiers, tnt_evaluation, tnt_report, tnt_rules, tnt_tasks
from jaxconv.recipes.asking import Asking, add_quarantine, asking, dry_asking
from jaxconv.recipes.tnt_documents import FORMAT_NAMES, Documents, documents
from jaxconv.recipes.tnt_mixture import latent
from jaxconv.recipes.tnt_tables import Place, Step, TableMaker
from jaxconv.recipes.tnt_tasks import (
    ASSIGNMENT,
    OTHER,
    OTHER_ID,
    SUMMARY,
    Assignment,
    AssignmentInput,
    Named,
    NumberedLabel,
    SummaryInput,
    numbered,
)
from jaxconv.train import checks
from jaxconv.train.workdir import Workdir

MAY_CHANGE = section.MAY_CHANGE
_DOCUMENTS = 20  # that tables are made from, at least


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    section.check(config)
    checks.one_of(
        config, {"data.format": FORMAT_NAMES, "classifier.method": tnt_classifiers.METHODS}
    )
    counts = (
        *("taxonomy.summary_words", "taxonomy.batch", "taxonomy.epochs", "taxonomy.chains"),
        *("taxonomy.name_words", "taxonomy.description_words", "taxonomy.explanation_words"),
        *("select.every", "select.documents", "select.orders", "select.patience"),
    )
    checks.at_least(
        config,
        dict.fromkeys(counts, 1)
        | {"taxonomy.max_labels": 2, "taxonomy.second_labels": 0, "taxonomy.documents": 0}
        | {"taxonomy.second_least": 2, "judge.documents": 2, "data.examples": 20},
    )
    if 0 < config.taxonomy.documents < _DOCUMENTS:
        raise Refused(
            f"config.taxonomy.documents={config.taxonomy.documents}; it may be 0 (all), or at "
            f"least {_DOCUMENTS}"
        )
    checks.below_one(config, ("data.test",))
    checks.fractions(config, ("data.stray",))
    if not config.taxonomy.use_case.strip():
        raise Refused("config.taxonomy.use_case=''; it must say what the taxonomy is for")
    if config.data.test_path and not config.data.path:
        raise Refused(
            f"config.data.test_path={config.data.test_path!r} without config.data.path; give both "
            "or none"
        )


def made_of(config) -> dict[str, str]:
    """Prompts and files: with others a finished run goes on, and asks what depends on them."""
    return section.made_of(tnt_tasks.TASKS, config.data.path, config.data.test_path)


def run(config, workdir: Workdir, *, retry_failed: bool = False) -> Report:
    """Makes the taxonomy, sorts everything into it, trains the classifiers and reports;
    `retry_failed` asks again for rows that were given up."""
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl")
    with asking(config, workdir, retry_failed=retry_failed) as asked:
        talks = documents(config, quarantine)
        mined = mine(config, asked, talks)
        light = tnt_classifiers.trained(config, talks, mined)
        found = tnt_evaluation.evaluated(config, asked, talks, mined, light)
        report = tnt_report.report_of(config, asked, talks, mined, light, found, workdir)
        asked.report(report)
    add_quarantine(report, quarantine, workdir)
    return report


def dry_run(config, path: Path) -> list[str]:
    """`--dry_run`: what a run in the workdir at `path` would take, a line a task."""
    with dry_asking(config, path) as (asked, folder):
        talks = documents(config, Quarantine(folder / "quarantine.jsonl"))
        mined = mine(config, asked, talks)
        light = tnt_classifiers.trained(config, talks, mined)
        tnt_evaluation.evaluated(config, asked, talks, mined, light)
        return asked.foretold()


# ---------------------------------------------------------------- what is made


@dataclass(frozen=True)
class Mined:
    """Attributes:
    labels: the first level.
    second: labels inside a label, by its id; not there where it has too few documents.
    steps: how they came about.
    notes: on chains that ended without a table.
    made_from: documents that the first level was made from.
    assigned: primary and applicable labels of each document, by its id; a document without a
        valid answer is not there.
    inside: the same of the second level.
    embeddings: float32 [documents, D], in the order of the documents.
    encoder: that made them.
    rules: that answer where no model does, and what they know of the embeddings.
    """

    labels: Sequence[NumberedLabel]
    second: Mapping[int, Sequence[NumberedLabel]]
    steps: Sequence[Step]
    notes: Sequence[str]
    made_from: int
    assigned: Mapping[str, Assignment]
    inside: Mapping[str, Assignment]
    embeddings: np.ndarray
    encoder: TextEncoder
    rules: tnt_rules.TopicRules


def mine(config, asked: Asking, talks: Documents) -> Mined:
    """Phase 1, and the labels of phase 2."""
    encoder = checks.naming(
        "config.encoder: ",
        lambda: load_text_encoder(config.encoder.path, dim=config.encoder.dim or None),
    )
    texts = talks.texts
    embeddings = encoder.encode(texts)
    sample, apart = _samples(config, talks)
    summaries = summarise(config, asked, talks, [*sample, *apart])
    by_words = isinstance(encoder, HashedNgrams)
    rules = tnt_rules.TopicRules(
        texts,
        latent(texts, talks.train, seed=config.seed) if by_words else embeddings,
        talks.train,
        {summary: texts[i] for i, summary in summaries.items()},
        seed=config.seed,
    )
    maker = TableMaker(config, asked, rules)

    def place(members: Sequence[int], most: int, chains: int) -> Place:
        inside = set(members)
        own, held = (
            [i for i in part if i in summaries and i in inside] for part in (sample, apart)
        )
        return Place([summaries[i] for i in own], [summaries[i] for i in held], most, chains)

    t, everything = config.taxonomy, range(len(talks))
    found = maker.tables({"": place(everything, t.max_labels, t.chains)})
    if not found:
        raise Failed(f"no chain came to a table. {' '.join(maker.notes)}")
    labels = numbered(found[""])
    assigned = assign(config, asked, talks, labels, everything, rules, keep="assign")
    members: dict[int, list[int]] = {label.id: [] for label in labels}
    for i in everything:
        if (primary := _primary(assigned, talks.ids[i])) != OTHER_ID:
            members[primary].append(i)
    places = {}
    for label in labels if t.second_labels > 1 else ():
        own = place(members[label.id], t.second_labels, 1)
        if len(own.summaries) >= t.second_least:
            places[label.name] = own
    divided = maker.tables(places)
    second, inside = {}, {}
    for label in labels:
        if label.name in divided:
            second[label.id] = numbered(divided[label.name])
            own = members[label.id]
            kept = f"assign_inside_{label.id}"
            inside |= assign(config, asked, talks, second[label.id], own, rules, keep=kept)
    return Mined(
        labels,
        second,
        maker.steps,
        maker.notes,
        sum(i in summaries for i in sample),
        assigned,
        inside,
        embeddings,
        encoder,
        rules,
    )


def _primary(assigned: Mapping[str, Assignment], id: str) -> int:
    return assigned[id].primary.id if id in assigned else OTHER_ID


def _samples(config, talks: Documents) -> tuple[list[int], list[int]]:
    """Indices of documents that tables are made from, and of those that compare them."""
    order = np.random.default_rng((config.seed, 1)).permutation(talks.train).tolist()
    most = config.taxonomy.documents or len(order)
    # A small corpus keeps a fifth of itself apart, and makes its tables from the rest.
    apart = min(config.select.documents, max(len(order) // 5, 1))
    return order[apart : apart + most], order[:apart]


# ---------------------------------------------------------------- 1. summaries


def summarise(config, asked: Asking, talks: Documents, indices: Sequence[int]) -> dict[int, str]:
    """A summary of each of these documents; one without a valid answer is not there. Where the
    config skips them, a summary is what the user says."""
    if not config.taxonomy.summarise:
        return {i: tnt_rules.user_text(talks.turns[i]) for i in indices}
    task = dataclasses.replace(SUMMARY, rules=tnt_rules.summarise)
    inputs = {
        talks.ids[i]: SummaryInput(
            turns=talks.turns[i],
            use_case=config.taxonomy.use_case,
            words=config.taxonomy.summary_words,
        )
        for i in indices
    }
    results = asked.ask(task, inputs, keep="summarise")
    return {i: r.value.summary for i in indices if (r := results[talks.ids[i]]).ok}


# ---------------------------------------------------------------- 5. assignment


def assign(
    config,
    asked: Asking,
    talks: Documents,
    labels: Sequence[NumberedLabel],
    indices: Sequence[int],
    rules: tnt_rules.TopicRules,
    keep: str = "",
) -> dict[str, Assignment]:
    """Primary and applicable labels of these documents, by id; one without a valid answer is not
    there: no label is invented for it."""
    task = dataclasses.replace(ASSIGNMENT, rules=rules.assign)
    inputs = {
        talks.ids[i]: AssignmentInput(
            turns=talks.turns[i], use_case=config.taxonomy.use_case, labels=list(labels)
        )
        for i in indices
    }
    names = {OTHER_ID: OTHER} | {label.id: label.name for label in labels}

    def named(found: Assignment) -> Assignment:
        """With the names as the table has them, however they were spelt, and none twice."""
        ids = dict.fromkeys(label.id for label in found.applicable)
        return Assignment(
            primary=Named(id=found.primary.id, name=names[found.primary.id]),
            applicable=[Named(id=id, name=names[id]) for id in ids],
        )

    results = asked.ask(task, inputs, keep=keep)
    return {id: named(r.value) for id, r in results.items() if r.ok}
