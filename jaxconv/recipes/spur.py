"""SPUR: why users are satisfied or not, as rubrics that estimate it (Lin et al. 2024,
arXiv 2403.12388).

1. Supervised extraction: at most three reasons for the label of each training conversation, each
   with words of the user.
2. Rubric summarisation: the reasons of a polarity, a minibatch at a time together with the rubric
   of the minibatches before, become at most ten items.
3. Scoring: every item of both rubrics from 0 to 10; their difference estimates satisfaction.

All of it in several splits, whose training parts share nothing; beside it the baselines, what the
rubrics add to embeddings, small classifiers that take the place of the model, and the same with
shuffled labels. Rubrics of all of these are made side by side, a minibatch of each at a time. The
steps are in `spur_rubrics.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.errors import Refused
from jaxconv.evals.report import Report
from jaxconv.llm import section
from jaxconv.models.text_encoder import TextEncoder, load_text_encoder
from jaxconv.recipes import spur_baselines, spur_report, spur_tasks
from jaxconv.recipes.asking import Asking, NoAnswer, add_quarantine, asking, dry_asking
from jaxconv.recipes.spur_analysis import points_of, satisfaction_of
from jaxconv.recipes.spur_baselines import Inputs
from jaxconv.recipes.spur_features import hand_features
from jaxconv.recipes.spur_rubrics import (
    Part,
    Rubrics,
    learn,
    predict,
    score,
    tuned_threshold,
)
from jaxconv.recipes.spur_talks import (
    LEAST,
    Split,
    Talks,
    domain_groups,
    domain_of,
    labelled,
    splits_of,
)
from jaxconv.recipes.spur_tasks import DSAT, MAX_ITEMS, SAT, ItemScores
from jaxconv.train import checks
from jaxconv.train.workdir import Workdir

MAY_CHANGE = section.MAY_CHANGE
_REPETITIONS = 3  # of a control, at least


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
    if config.control.shuffles not in (0, *range(_REPETITIONS, 1001)):
        raise Refused(
            f"config.control.shuffles={config.control.shuffles}; it may be 0, or from "
            f"{_REPETITIONS} to 1000: an interval needs some"
        )
    if not 0 <= config.data.noise <= 0.5:
        raise Refused(f"config.data.noise={config.data.noise}; it may be from 0 to 0.5")
    if config.data.test_path and not config.data.path:
        raise Refused(
            f"config.data.test_path={config.data.test_path!r} without config.data.path; give both "
            "or none"
        )
    if config.data.sat == config.data.dsat:
        raise Refused(
            f"config.data.sat={config.data.sat!r} and config.data.dsat={config.data.dsat!r}; they "
            "must differ"
        )
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


def made_of(config) -> dict[str, str]:
    """Prompts and files: with others a finished run goes on, and asks what depends on them."""
    return section.made_of(spur_tasks.TASKS, config.data.path, config.data.test_path)


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


# ---------------------------------------------------------------- all splits


@dataclass(frozen=True)
class Trial:
    """One split.

    Attributes:
        split: which conversations are what.
        rubrics: that were learned.
        points: int8 [conversations, items], scores; -1 in the row of one without a valid answer, or
            that is in no part of the split.
        threshold: tuned on the dev part.
        predicted: by method, a label for each conversation; None outside the test part, and where
            there is no valid answer.
    """

    split: Split
    rubrics: Rubrics
    points: np.ndarray
    threshold: float
    predicted: Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class Study:
    """All that is reported.

    Attributes:
        trials: one a split.
        scores: of the first split, with the words that show each item, by conversation.
        shuffled: what each repetition with shuffled labels predicts, as in `Trial.predicted`.
        transfer: (learned on, tested on) -> predictions, by domain groups; empty without domains.
        embeddings: float32 [conversations, width], of what the users say.
        encoder: that made them.
        notes: on what was left out.
    """

    trials: Sequence[Trial]
    scores: Mapping[str, ItemScores]
    shuffled: Sequence[Sequence[str | None]]
    transfer: Mapping[tuple[str, str], Sequence[str | None]]
    embeddings: np.ndarray
    encoder: TextEncoder
    notes: Sequence[str]


def studied(config, asked: Asking, talks: Talks) -> Study:
    """Learns, scores and predicts in every split, and what belongs beside it.

    Raises:
        NoAnswer: there is no rubric for a split; nothing has been scored then.
    """
    encoder = checks.naming(
        "config.encoder: ",
        lambda: load_text_encoder(config.encoder.path, dim=config.encoder.dim or None),
    )
    texts = ["\n".join(t.content for t in own if t.role == "user") for own in talks.turns]
    embeddings = encoder.encode(texts)
    splits = splits_of(config, talks)
    own = {
        f"split_{i}": Part(split.train, [talks.truth[k] for k in split.train])
        for i, split in enumerate(splits)
    }
    shuffled, moved = _shuffled_parts(config, talks, splits), _domain_parts(config, talks, splits)
    learned = learn(config, asked, talks, own | shuffled | moved)
    for name in own:
        if isinstance(learned[name], NoAnswer):
            raise learned[name]
    inputs = Inputs(embeddings, np.stack([hand_features(turns) for turns in talks.turns]))
    trials, first = [], {}
    for i, (name, split) in enumerate(zip(own, splits, strict=True)):
        scores = _scored(asked, talks, [*split.train, *split.dev, *split.test], learned[name], name)
        first = first or scores
        points = points_of(scores, talks.ids, learned[name].items)
        trials.append(_trial(config, asked, talks, split, learned[name], points, inputs, i))
    notes = [
        f"Left out, {learned[name]}." for name in learned if isinstance(learned[name], NoAnswer)
    ]
    chance = [
        _by_chance(
            *(asked, talks, splits[i % len(splits)].test, learned[name], name),
            coins=np.random.default_rng((config.seed, i, 1)),
        )
        for i, name in enumerate(shuffled)
        if not isinstance(learned[name], NoAnswer)
    ]
    if config.data.domain and not moved:
        notes.append(
            f"No transfer between domains: config.data.domain={config.data.domain!r} gives no two "
            f"groups with {LEAST} training conversations of each label."
        )
    transfer = _transferred(config, asked, talks, splits[0], {k: learned[k] for k in moved})
    return Study(trials, first, chance, transfer, embeddings, encoder, notes)


def _scored(
    asked: Asking, talks: Talks, indices: Sequence[int], rubrics: Rubrics, name: str
) -> dict[str, ItemScores]:
    turns = {talks.ids[i]: talks.turns[i] for i in sorted(indices)}
    return score(asked, turns, rubrics, keep=f"score_{name}")


def _trial(
    config,
    asked: Asking,
    talks: Talks,
    split: Split,
    rubrics: Rubrics,
    points_NI: np.ndarray,
    inputs: Inputs,
    number: int,
) -> Trial:
    r = satisfaction_of(points_NI, rubrics.items)
    threshold = tuned_threshold([(r[k], talks.truth[k]) for k in split.dev if r[k] is not None])
    trial = Trial(split, rubrics, points_NI, threshold, {})
    said = {
        "spur": predict(points_NI, rubrics.items, threshold),
        "spur_threshold_0": predict(points_NI, rubrics.items, 0.0),
        **spur_baselines.predictions(
            config, asked, talks, trial, inputs, seed=config.seed + number
        ),
    }
    tested = {name: _only(split.test, labels) for name, labels in said.items()}
    return dataclasses.replace(trial, predicted=tested)


def _predicted(
    asked: Asking, talks: Talks, indices: Sequence[int], rubrics: Rubrics, name: str
) -> list[str | None]:
    """At threshold 0; None elsewhere than at these indices."""
    scores = _scored(asked, talks, indices, rubrics, name)
    return predict(points_of(scores, talks.ids, rubrics.items), rubrics.items, 0.0)


def _by_chance(
    asked: Asking,
    talks: Talks,
    indices: Sequence[int],
    rubrics: Rubrics,
    name: str,
    *,
    coins: np.random.Generator,
) -> list[str | None]:
    """As `_predicted`, but who shows nothing, or as much of both, is SAT or DSAT by a coin: with
    labels that were dealt anew neither rubric is the one of those who show nothing."""
    scores = _scored(asked, talks, indices, rubrics, name)
    found = satisfaction_of(points_of(scores, talks.ids, rubrics.items), rubrics.items)
    return [
        None if r is None else (SAT, DSAT)[int(coin) if r == 0 else int(r < 0)]
        for r, coin in zip(found, coins.integers(0, 2, len(found)), strict=True)
    ]


def _only(indices: Sequence[int], labels: Sequence[str | None]) -> list[str | None]:
    kept = set(indices)
    return [label if i in kept else None for i, label in enumerate(labels)]


def _shuffled_parts(config, talks: Talks, splits: Sequence[Split]) -> dict[str, Part]:
    """Training parts with labels that are dealt anew, in turn of each split: of the conversations
    of each side one half gets either label. So nothing that is learned knows a side, not even which
    of them is the larger."""
    parts = {}
    for i in range(config.control.shuffles):
        train = splits[i % len(splits)].train
        rng = np.random.default_rng((config.seed, i))
        dealt = {}
        for label in (SAT, DSAT):
            own = rng.permutation([k for k in train if talks.truth[k] == label]).tolist()
            first = int(rng.integers(2))
            dealt |= {k: (SAT, DSAT)[(first + n) % 2] for n, k in enumerate(own)}
        parts[f"shuffled_{i}"] = Part(train, [dealt[k] for k in train])
    return parts


def _inside(config, talks: Talks) -> dict[str, set[int]]:
    """Conversations of each group of domains."""
    return {
        name: {i for i, meta in enumerate(talks.meta) if domain_of(config, meta) in own}
        for name, own in domain_groups(config, talks).items()
    }


def _domain_parts(config, talks: Talks, splits: Sequence[Split]) -> dict[str, Part]:
    """The first split's training part, by groups of domains."""
    parts = {}
    for name, members in _inside(config, talks).items():
        train = [i for i in splits[0].train if i in members]
        parts[f"{name}_domains"] = Part(train, [talks.truth[i] for i in train])
    if any(part.labels.count(x) < LEAST for part in parts.values() for x in (SAT, DSAT)):
        return {}
    return parts


def _transferred(
    config,
    asked: Asking,
    talks: Talks,
    split: Split,
    learned: Mapping[str, Rubrics | NoAnswer],
) -> dict[tuple[str, str], Sequence[str | None]]:
    """Rubrics of one group of domains, on conversations of the same and of the other group."""
    found, inside = {}, _inside(config, talks)
    for name in inside:
        rubrics = learned.get(f"{name}_domains")
        if not isinstance(rubrics, Rubrics):
            continue
        labels = _predicted(asked, talks, split.test, rubrics, f"{name}_domains")
        for other, members in inside.items():
            found[name, other] = _only([i for i in split.test if i in members], labels)
    return found
