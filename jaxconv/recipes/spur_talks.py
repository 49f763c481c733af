"""Conversations whose users' satisfaction is known, and how they are divided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxconv.data.conversation import Conversation, PreferencePair
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers.rated import dialogue_label
from jaxconv.data.sources import open_source
from jaxconv.data.synthetic import satisfaction
from jaxconv.errors import Refused
from jaxconv.llm.conversations import Turn, input_of
from jaxconv.recipes.spur_tasks import DSAT, SAT
from jaxconv.train import checks

LEAST = 2
"""Conversations of each label that a training part has, at least."""


@dataclass(frozen=True)
class Talks:
    """Conversations whose users' satisfaction is known.

    Attributes:
        ids: of each.
        turns: of each.
        truth: SAT or DSAT.
        meta: of each.
        left_out: how many were not taken, by why.
    """

    ids: Sequence[str]
    turns: Sequence[Sequence[Turn]]
    truth: Sequence[str]
    meta: Sequence[Mapping]
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ids)


def labelled(config, quarantine: Quarantine) -> Talks:
    """Those at the config's path that are labelled "sat" or "dsat", or the embedded ones.

    Raises:
        Refused: there are none, or two have one id.
    """
    source: Sequence[Conversation]
    if config.data.path:
        source = checks.naming(
            "config.data.path: ",
            lambda: open_source(config.data.path, config.data.format, quarantine),
        )
        if isinstance(source[0], PreferencePair):
            raise Refused(
                f"config.data.path={config.data.path!r} holds preference pairs; it must hold "
                "conversations"
            )
    else:
        source = satisfaction.conversations(
            config.seed << 32, config.data.examples, noise=config.data.noise, held_out=True
        )
    is_rated = getattr(source, "format", "") == "rated"
    taken, truth, left_out = [], [], {}
    for talk in source:
        label = talk.meta.get(config.data.label)
        if is_rated:
            label = dialogue_label(talk.meta["overall"], talk.meta["ratings"], config.data.neutral)
        if label not in (SAT, DSAT):
            why = f"label {label!r}" if label is not None else "without a label"
        elif not any(m.role == "user" and m.content.strip() for m in talk.messages):
            why = "without a word of the user's"
        else:
            taken.append(talk)
            truth.append(label)
            continue
        left_out[why] = left_out.get(why, 0) + 1
    if not taken:
        raise Refused(
            f"config.data.label={config.data.label!r}: no conversation has {SAT!r} or {DSAT!r} "
            f"there in its meta ({', '.join(f'{n} {why}' for why, n in left_out.items())})"
        )
    ids = [talk.id for talk in taken]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise Refused(f"two conversations have the id {twice!r}; every id may come once")
    return Talks(
        ids,
        [input_of(talk).turns for talk in taken],
        truth,
        [talk.meta for talk in taken],
        left_out,
    )


@dataclass(frozen=True)
class Split:
    """Indices of conversations to learn from, to tune a threshold with, and to test on."""

    train: list[int]
    dev: list[int]
    test: list[int]


def splits_of(config, talks: Talks) -> list[Split]:
    """Splits whose training parts share nothing.

    Raises:
        Refused: a training part lacks one of the labels.
    """
    s, n = config.spur, len(talks)
    order = np.random.default_rng(config.seed).permutation(n).tolist()
    size, dev = max(round(s.train * n), 1), round(s.dev * n)
    found = []
    for i in range(s.splits):
        train = order[i * size : (i + 1) * size]
        rest = [*order[(i + 1) * size :], *order[: i * size]]
        for label in (SAT, DSAT):
            there = sum(talks.truth[k] == label for k in train)
            if there < LEAST:
                raise Refused(
                    f"config.spur.train={s.train} of {n} conversations: training part {i} has "
                    f"{there} of {label!r}; it must have at least {LEAST}"
                )
        found.append(Split(train, rest[:dev], rest[dev:]))
    return found


def domain_groups(config, talks: Talks) -> dict[str, set[str]]:
    """The domains in two groups, those with an odd place in the alphabet in the second."""
    found = sorted(
        {str(meta[config.data.domain]) for meta in talks.meta if config.data.domain in meta}
    )
    if len(found) < 2:
        return {}
    return {"first": set(found[::2]), "second": set(found[1::2])}
