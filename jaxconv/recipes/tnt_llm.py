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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxconv.data.quarantine import Quarantine
from jaxconv.errors import Failed, Refused
from jaxconv.evals.report import Report
from jaxconv.llm import section
from jaxconv.models.text_encoder import TextEncoder, load_text_encoder
from jaxconv.recipes import tnt_classifiers, tnt_evaluation, tnt_report, tnt_rules
from jaxconv.recipes.asking import Asking, add_quarantine, asking, dry_asking
from jaxconv.recipes.tnt_documents import FORMAT_NAMES, Documents, documents
from jaxconv.recipes.tnt_tasks import (
    ASSIGNMENT,
    GENERATION,
    OTHER_ID,
    REVIEW,
    SELECTION,
    SUMMARY,
    UPDATE,
    Assignment,
    AssignmentInput,
    Label,
    NumberedLabel,
    SelectionInput,
    SummaryInput,
    TableInput,
    numbered,
)
from jaxconv.train import checks
from jaxconv.train.workdir import Workdir

MAY_CHANGE = section.MAY_CHANGE


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    section.check(config)
    checks.one_of(
        config, {"data.format": FORMAT_NAMES, "classifier.method": tnt_classifiers.METHODS}
    )
    counts = (
        *("taxonomy.summary_words", "taxonomy.batch", "taxonomy.epochs", "taxonomy.chains"),
        *("taxonomy.name_words", "taxonomy.description_words", "taxonomy.explanation_words"),
        *("select.every", "select.documents", "select.repeats", "select.patience"),
    )
    checks.at_least(
        config,
        dict.fromkeys(counts, 1)
        | {"taxonomy.max_labels": 2, "taxonomy.second_labels": 0, "taxonomy.documents": 0}
        | {"taxonomy.second_least": 2, "judge.documents": 2, "data.examples": 20},
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
class Step:
    """A table on the way to the taxonomy.

    Attributes:
        place: "" for the first level, else the label that it is inside of.
        chain, number: which chain, and which table of it, from 0.
        kind: "generate", "update" or "review".
        rating, explanation, edits: of an update or a review, about the table before.
        labels: the table.
        chosen: whether it was the best so far when it was compared; None where it was not.
    """

    place: str
    chain: int
    number: int
    kind: str
    rating: int | None
    explanation: str
    edits: Sequence[str]
    labels: Sequence[Label]
    chosen: bool | None = None


@dataclass(frozen=True)
class Mined:
    """Attributes:
    labels: the first level.
    second: labels inside a label, by its id; not there where it has too few documents.
    steps: how they came about.
    assigned: primary and applicable labels of each document, by its id; a document without a
        valid answer is not there.
    inside: the same of the second level.
    embeddings: float32 [documents, D], in the order of the documents.
    encoder: that made them.
    """

    labels: Sequence[NumberedLabel]
    second: Mapping[int, Sequence[NumberedLabel]]
    steps: Sequence[Step]
    assigned: Mapping[str, Assignment]
    inside: Mapping[str, Assignment]
    embeddings: np.ndarray
    encoder: TextEncoder


def mine(config, asked: Asking, talks: Documents) -> Mined:
    """Phase 1, and the labels of phase 2."""
    encoder = checks.naming(
        "config.encoder.path: ",
        lambda: load_text_encoder(config.encoder.path, dim=config.encoder.dim or None),
    )
    texts = talks.texts
    embeddings = encoder.encode(texts)
    sample, apart = _samples(config, talks)
    summaries = summarise(config, asked, talks, [*sample, *apart])
    rules = tnt_rules.TopicRules(
        texts,
        embeddings,
        talks.train,
        {summary: texts[i] for i, summary in summaries.items()},
        seed=config.seed,
    )
    maker = _Maker(config, asked, rules)
    first = maker.table(
        [summaries[i] for i in sample if i in summaries],
        [summaries[i] for i in apart if i in summaries],
        most=config.taxonomy.max_labels,
    )
    labels = numbered(first)
    assigned = assign(config, asked, talks, labels, range(len(talks)), rules, keep="assign")
    second: dict[int, list[NumberedLabel]] = {}
    inside: dict[str, Assignment] = {}
    for label in labels if config.taxonomy.second_labels > 1 else ():
        members = [i for i, id in enumerate(talks.ids) if _primary(assigned, id) == label.id]
        inside_of = set(members)
        own = [summaries[i] for i in sample if i in summaries and i in inside_of]
        held = [summaries[i] for i in apart if i in summaries and i in inside_of]
        if len(own) < config.taxonomy.second_least:
            continue
        table = maker.table(own, held, most=config.taxonomy.second_labels, place=label.name)
        second[label.id] = numbered(table)
        kept = f"assign_inside_{label.id}"
        inside |= assign(config, asked, talks, second[label.id], members, rules, keep=kept)
    return Mined(labels, second, maker.steps, assigned, inside, embeddings, encoder)


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


# ---------------------------------------------------------------- 2. and 3. tables


@dataclass
class _Maker:
    """Makes tables, and remembers how."""

    config: object
    asked: Asking
    rules: tnt_rules.TopicRules
    steps: list[Step] = field(default_factory=list)

    def table(
        self, summaries: Sequence[str], apart: Sequence[str], *, most: int, place: str = ""
    ) -> list[Label]:
        """The best of several chains.

        Args:
            summaries: that tables are made from.
            apart: that compare tables; where there are none, some of `summaries` do.
            most: labels.
            place: the label that this is inside of.
        """
        if not summaries:
            raise Failed("no document has a summary; nothing can be sorted")
        apart = list(apart) or list(summaries[: self.config.select.documents])
        chains = 1 if place else self.config.taxonomy.chains
        found = [self._chain(i, summaries, apart, most, place) for i in range(chains)]
        return found[self._best(found, apart, f"{place} chains")]

    def _chain(
        self, chain: int, summaries: Sequence[str], apart: Sequence[str], most: int, place: str
    ) -> list[Label]:
        """Generate, update with each minibatch, review; the best table of the way."""
        select = self.config.select
        named = f"{place + ', ' if place else ''}chain {chain}"
        labels = best = None
        worse = number = 0
        for number, batch in enumerate(self._minibatches(chain, summaries)):
            given = self._input(most, documents=batch, labels=labels or [])
            if labels is None:
                labels = best = self._ask(GENERATION, self.rules.generate, given, f"{named}").labels
                self._note(place, chain, number, "generate", None, labels)
                continue
            update = self._ask(UPDATE, self.rules.update, given, f"{named}, update {number}")
            labels, chosen = update.labels, None
            if number % select.every == 0:
                picked = self._best([best, labels], apart, f"{named}, after {number}")
                chosen = picked == 1 or best == labels
                best, worse = (labels, 0) if chosen else (best, worse + 1)
            self._note(place, chain, number, "update", update, labels, chosen)
            if worse >= select.patience:
                break
        if labels != best and number % select.every:
            best = [best, labels][self._best([best, labels], apart, f"{named}, at the end")]
        given = self._input(most, labels=best)
        review = self._ask(REVIEW, self.rules.update, given, f"{named}, review")
        self._note(place, chain, number + 1, "review", review, review.labels)
        return review.labels

    def _minibatches(self, chain: int, summaries: Sequence[str]) -> list[list[str]]:
        t = self.config.taxonomy
        rng = np.random.default_rng((self.config.seed, 2, chain))
        found = []
        for _ in range(t.epochs):
            order = [summaries[i] for i in rng.permutation(len(summaries))]
            found += [order[i : i + t.batch] for i in range(0, len(order), t.batch)]
        return found

    def _best(self, candidates: list[list[Label]], apart: Sequence[str], name: str) -> int:
        """Which of them most answers choose, each in an order of its own; the first of several."""
        if all(labels == candidates[0] for labels in candidates):
            return 0
        rng = np.random.default_rng((self.config.seed, 3, len(apart)))
        documents = list(apart[: self.config.select.documents])
        orders, inputs = {}, {}
        for repeat in range(self.config.select.repeats):
            order = rng.permutation(len(candidates)).tolist()
            if repeat % 2 and len(candidates) == 2:
                order = list(reversed(orders[f"{name}, order {repeat - 1}"]))
            id = f"{name}, order {repeat}"
            orders[id] = order
            inputs[id] = SelectionInput(
                use_case=self.config.taxonomy.use_case,
                candidates=[candidates[i] for i in order],
                documents=documents,
            )
        task = dataclasses.replace(SELECTION, rules=self.rules.select)
        results = self.asked.ask(task, inputs)
        votes = Counter(orders[id][r.value.best - 1] for id, r in results.items() if r.ok)
        return max(range(len(candidates)), key=lambda i: (votes[i], -i))

    def _input(self, most: int, **more) -> TableInput:
        t = self.config.taxonomy
        return TableInput(
            use_case=t.use_case,
            max_labels=most,
            name_words=t.name_words,
            description_words=t.description_words,
            explanation_words=t.explanation_words,
            **more,
        )

    def _ask(self, task, rules, given: TableInput, id: str):
        return self.asked.ask_once(dataclasses.replace(task, rules=rules), id, given)

    def _note(self, place, chain, number, kind, update, labels, chosen=None) -> None:
        said = (
            (None, "", ()) if update is None else (update.rating, update.explanation, update.edits)
        )
        self.steps.append(Step(place, chain, number, kind, *said, labels, chosen))


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
    return {id: r.value for id, r in asked.ask(task, inputs, keep=keep).items() if r.ok}
