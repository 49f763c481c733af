"""SPUR: why users are satisfied or not, as rubrics that estimate it (Lin et al. 2024,
arXiv 2403.12388).

1. Supervised extraction: at most three reasons for the label of each training conversation, each
   with words of the user.
2. Rubric summarisation: the reasons of a polarity, a minibatch at a time together with the rubric
   of the minibatches before, become at most ten items.
3. Scoring: every item of both rubrics from 0 to 10; their difference estimates satisfaction.

All of it in several splits, whose training parts share nothing; beside it the baselines, what the
rubrics add to embeddings, small classifiers that take the place of the model, and the same with
shuffled labels.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.errors import Refused
from jaxconv.evals.report import Report
from jaxconv.llm import section
from jaxconv.llm.conversations import Turn
from jaxconv.models.text_encoder import TextEncoder, load_text_encoder
from jaxconv.recipes import spur_baselines, spur_report
from jaxconv.recipes.asking import Asking, NoAnswer, add_quarantine, asking, dry_asking
from jaxconv.recipes.spur_rules import Cues
from jaxconv.recipes.spur_talks import LEAST, Split, Talks, domain_groups, labelled, splits_of
from jaxconv.recipes.spur_tasks import (
    DSAT,
    EXTRACTION,
    MAX_ITEMS,
    SAT,
    SCORING,
    SUMMARY,
    ExtractionInput,
    ItemScores,
    NumberedItem,
    Pattern,
    RubricItem,
    ScoringInput,
    SummaryInput,
)
from jaxconv.train import checks
from jaxconv.train.workdir import Workdir

MAY_CHANGE = section.MAY_CHANGE


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    section.check(config)
    checks.one_of(config, {"data.format": ("auto", *FORMATS)})
    checks.at_least(
        config,
        {"data.examples": 50}
        | dict.fromkeys(("spur.splits", "spur.rubric_items", "spur.batch", "spur.shots"), 1),
    )
    checks.positive(config, ("spur.train",))
    checks.fractions(config, ("spur.train", "spur.dev"))
    if config.spur.rubric_items > MAX_ITEMS:
        raise Refused(
            f"config.spur.rubric_items={config.spur.rubric_items}; it may be at most {MAX_ITEMS}, "
            "so that R lies between -100 and 100"
        )
    if not 0 <= config.data.noise <= 0.5:
        raise Refused(f"config.data.noise={config.data.noise}; it may be from 0 to 0.5")
    s = config.spur
    if s.splits * s.train > 1:
        raise Refused(
            f"config.spur.splits={s.splits} with config.spur.train={s.train}: training parts share "
            "nothing, so their product may be at most 1"
        )
    if s.train + s.dev >= 1:
        raise Refused(
            f"config.spur.train={s.train} and config.spur.dev={s.dev} leave nothing to test on; "
            "their sum must be below 1"
        )


def run(config, workdir: Workdir, *, retry_failed: bool = False) -> Report:
    """Learns rubrics, scores with them and reports; `retry_failed` asks again for rows that were
    given up."""
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl")
    with asking(config, workdir, retry_failed=retry_failed) as asked:
        talks = labelled(config, quarantine)
        study = studied(config, asked, talks)
        report = spur_report.report_of(config, asked, talks, study, workdir)
        asked.report(report)
    add_quarantine(report, quarantine, workdir)
    return report


def dry_run(config, path: Path) -> list[str]:
    """`--dry_run`: what a run in the workdir at `path` would take, a line a task."""
    with dry_asking(config, path) as (asked, folder):
        studied(config, asked, labelled(config, Quarantine(folder / "quarantine.jsonl")))
        return asked.foretold()


# ---------------------------------------------------------------- 1. supervised extraction


def extract(
    asked: Asking,
    turns: Mapping[str, Sequence[Turn]],
    satisfied: Mapping[str, bool],
    cues: Cues,
    keep: str = "",
) -> dict[str, tuple[bool, Pattern]]:
    """Reasons for the labels of conversations, by "<id>/<number>", with the label."""
    inputs = {id: ExtractionInput(turns=own, satisfied=satisfied[id]) for id, own in turns.items()}
    results = asked.ask(dataclasses.replace(EXTRACTION, rules=cues.extract), inputs, keep=keep)
    return {
        f"{id}/{number}": (satisfied[id], pattern)
        for id, result in results.items()
        if result.ok
        for number, pattern in enumerate(result.value.patterns)
    }


# ---------------------------------------------------------------- 2. rubric summarisation


def summarise(
    asked: Asking,
    patterns: Sequence[Pattern],
    *,
    satisfied: bool,
    limit: int,
    batch: int,
    cues: Cues,
) -> list[RubricItem]:
    """The rubric of one polarity, from minibatches of its patterns; the last one is the result.

    Raises:
        Failed: there is no valid answer for a minibatch: nothing is left out in silence.
    """
    task = dataclasses.replace(SUMMARY, rules=cues.summarise)
    items: list[RubricItem] = []
    for number, begin in enumerate(range(0, len(patterns), batch)):
        given = SummaryInput(
            satisfied=satisfied,
            patterns=list(patterns[begin : begin + batch]),
            previous=items,
            limit=limit,
        )
        polarity = SAT if satisfied else DSAT
        items = asked.ask_once(task, f"{polarity}, minibatch {number}", given).items
    return items


@dataclass(frozen=True)
class Rubrics:
    """What a training part taught.

    Attributes:
        sat, dsat: items S1, S2, … and D1, D2, …
        patterns: what they were made from, with its label, by "<conversation>/<number>".
        cues: what the rules learned from the same conversations.
    """

    sat: list[NumberedItem]
    dsat: list[NumberedItem]
    patterns: Mapping[str, tuple[bool, Pattern]]
    cues: Cues

    @property
    def items(self) -> list[NumberedItem]:
        return [*self.sat, *self.dsat]


def learn(
    config, asked: Asking, talks: Talks, train: Sequence[int], truth: Sequence[str], name: str
) -> Rubrics:
    """Both rubrics, from some conversations and the labels that they are said to have; `name` tells
    them from others."""
    own = {talks.ids[i]: talks.turns[i] for i in train}
    satisfied = {talks.ids[i]: label == SAT for i, label in zip(train, truth, strict=True)}
    cues = Cues(list(own.values()), list(satisfied.values()))
    patterns = extract(asked, own, satisfied, cues, keep=f"extract_{name}")

    def rubric(is_sat: bool) -> list[NumberedItem]:
        items = summarise(
            asked,
            [pattern for label, pattern in patterns.values() if label == is_sat],
            satisfied=is_sat,
            limit=config.spur.rubric_items,
            batch=config.spur.batch,
            cues=cues,
        )
        letter = "S" if is_sat else "D"
        return [NumberedItem(id=f"{letter}{i}", **x.model_dump()) for i, x in enumerate(items, 1)]

    return Rubrics(rubric(True), rubric(False), patterns, cues)


# ---------------------------------------------------------------- 3. scoring


def score(
    asked: Asking, turns: Mapping[str, Sequence[Turn]], rubrics: Rubrics, keep: str = ""
) -> dict[str, ItemScores]:
    """Scores of every item for every conversation; one without a valid answer is not there."""
    task = dataclasses.replace(SCORING, rules=rubrics.cues.score)
    inputs = (
        (id, ScoringInput(turns=own, sat=rubrics.sat, dsat=rubrics.dsat))
        for id, own in turns.items()
    )
    return {id: r.value for id, r in asked.ask(task, dict(inputs), keep=keep).items() if r.ok}


def tuned_threshold(scored: Sequence[tuple[int, str]]) -> float:
    """The threshold on R with the best accuracy for (R, label); the nearest to 0 of several."""
    found = sorted({r for r, _ in scored})
    between = [(a + b) / 2 for a, b in itertools.pairwise(found)]
    candidates = [0.0, *between, *([found[0] - 0.5, found[-1] + 0.5] if found else [])]

    def right(threshold: float) -> int:
        return sum((r > threshold) == (label == SAT) for r, label in scored)

    return max(candidates, key=lambda t: (right(t), -abs(t), t))


def predict(scores: Mapping[str, ItemScores], ids: Sequence[str], threshold: float):
    """SAT where R is above the threshold, else DSAT; None without scores: that is no class."""
    return [
        None if id not in scores else SAT if scores[id].satisfaction > threshold else DSAT
        for id in ids
    ]


# ---------------------------------------------------------------- all splits


@dataclass(frozen=True)
class Trial:
    """One split.

    Attributes:
        split: which conversations are what.
        rubrics: that were learned.
        scores: of all conversations, by id, but for those without a valid answer.
        threshold: tuned on the dev part.
        predicted: by method, a label for each conversation; None outside the test part, and where
            there is no valid answer.
    """

    split: Split
    rubrics: Rubrics
    scores: Mapping[str, ItemScores]
    threshold: float
    predicted: Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class Study:
    """All that is reported.

    Attributes:
        trials: one a split.
        shuffled: accuracy of each split with shuffled labels; empty where it was not asked for.
        transfer: (learned on, tested on) -> predictions, by domain groups; empty without domains.
        embeddings: float32 [conversations, width], of what the users say.
        encoder: that made them.
        notes: on what was left out.
    """

    trials: Sequence[Trial]
    shuffled: Sequence[float]
    transfer: Mapping[tuple[str, str], Sequence[str | None]]
    embeddings: np.ndarray
    encoder: TextEncoder
    notes: Sequence[str]


def studied(config, asked: Asking, talks: Talks) -> Study:
    encoder = checks.naming(
        "config.encoder.path: ",
        lambda: load_text_encoder(config.encoder.path, dim=config.encoder.dim or None),
    )
    texts = ["\n".join(t.content for t in own if t.role == "user") for own in talks.turns]
    embeddings = encoder.encode(texts)
    everything = dict(zip(talks.ids, talks.turns, strict=True))
    splits = splits_of(config, talks)
    trials, shuffled, notes = [], [], []
    for i, split in enumerate(splits):
        truth = [talks.truth[k] for k in split.train]
        rubrics = learn(config, asked, talks, split.train, truth, f"split_{i}")
        scores = score(asked, everything, rubrics, keep=f"score_split_{i}")
        dev = [talks.ids[k] for k in split.dev]
        threshold = tuned_threshold(
            [
                (scores[id].satisfaction, talks.truth[k])
                for id, k in zip(dev, split.dev, strict=True)
                if id in scores
            ]
        )
        trial = Trial(split, rubrics, scores, threshold, {})
        predicted = {
            "spur": _only(split.test, predict(scores, talks.ids, threshold)),
            "spur_threshold_0": _only(split.test, predict(scores, talks.ids, 0.0)),
        }
        predicted |= {
            name: _only(split.test, labels)
            for name, labels in spur_baselines.predictions(
                config, asked, talks, trial, embeddings, seed=config.seed + i
            ).items()
        }
        trials.append(dataclasses.replace(trial, predicted=predicted))
        if config.control.shuffled:
            with _beside("shuffled labels", notes):
                shuffled += _with_shuffled_labels(config, asked, talks, split, seed=i)
    transfer = {}
    with _beside("rubrics in other domains", notes):
        transfer = _transferred(config, asked, talks, splits[0])
    return Study(trials, shuffled, transfer, embeddings, encoder, notes)


@contextlib.contextmanager
def _beside(what: str, notes: list[str]) -> Iterator[None]:
    """What is beside the point may lack an answer: then it is left out, and the report says so."""
    try:
        yield
    except NoAnswer as error:
        notes.append(f"Left out, {what}: {error}.")


def _only(indices: Sequence[int], labels: Sequence[str | None]) -> list[str | None]:
    kept = set(indices)
    return [label if i in kept else None for i, label in enumerate(labels)]


def _with_shuffled_labels(
    config, asked: Asking, talks: Talks, split: Split, *, seed: int
) -> list[float]:
    """Accuracy at threshold 0 of rubrics that were learned from labels of other conversations;
    nothing where no conversation got a valid answer."""
    truth = [talks.truth[k] for k in split.train]
    np.random.default_rng((config.seed, seed)).shuffle(truth)
    rubrics = learn(config, asked, talks, split.train, truth, f"shuffled_{seed}")
    test = {talks.ids[k]: talks.turns[k] for k in split.test}
    scores = score(asked, test, rubrics, keep=f"score_shuffled_{seed}")
    right = [
        label == talks.truth[k]
        for k, label in zip(split.test, predict(scores, list(test), 0.0), strict=True)
        if label is not None
    ]
    return [float(np.mean(right))] if right else []


def _transferred(
    config, asked: Asking, talks: Talks, split: Split
) -> dict[tuple[str, str], Sequence[str | None]]:
    """Rubrics of one group of domains, on conversations of the same and of the other group."""
    groups = domain_groups(config, talks)
    inside = {
        name: {i for i, meta in enumerate(talks.meta) if str(meta.get(config.data.domain)) in own}
        for name, own in groups.items()
    }
    found = {}
    for name in inside:
        train = [i for i in split.train if i in inside[name]]
        if any(sum(talks.truth[i] == x for i in train) < LEAST for x in (SAT, DSAT)):
            return {}
        truth = [talks.truth[i] for i in train]
        rubrics = learn(config, asked, talks, train, truth, f"{name}_domains")
        test = {talks.ids[i]: talks.turns[i] for i in split.test}
        scores = score(asked, test, rubrics, keep=f"score_{name}_domains")
        labels = predict(scores, talks.ids, 0.0)
        for other, members in inside.items():
            found[name, other] = _only([i for i in split.test if i in members], labels)
    return found
