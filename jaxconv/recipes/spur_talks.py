"""Conversations whose users' satisfaction is known, and how they are divided."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        apart: indices of those that are tested on alone; where there are none, every split tests on
            what it does not learn from.
    """

    ids: Sequence[str]
    turns: Sequence[Sequence[Turn]]
    truth: Sequence[str]
    meta: Sequence[Mapping]
    left_out: Mapping[str, int]
    apart: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)


def labelled(config, quarantine: Quarantine) -> Talks:
    """Those at the config's path that are labelled as satisfied or not, or the embedded ones.

    Raises:
        Refused: there are too few of a label, or two have one id.
    """
    d = config.data
    sources: list[Sequence[Conversation]]
    if d.path:
        sources = [_opened(config, "path", quarantine)]
        if d.test_path:
            sources.append(_opened(config, "test_path", quarantine))
    else:
        first, apart = config.seed << 32, d.examples // 3
        options = {"noise": d.noise}
        sources = [
            satisfaction.conversations(first, d.examples - apart, **options),
            satisfaction.conversations(first + d.examples - apart, apart, held_out=True, **options),
        ]
    named = {d.sat: SAT, d.dsat: DSAT} if d.path else {}
    taken, truth, left_out = [], [], {}
    begin = None  # of those that are tested on alone
    for number, source in enumerate(sources):
        begin = len(taken) if number else begin
        is_rated = getattr(source, "format", "") == "rated"
        for talk in source:
            found = talk.meta.get(d.label)
            if is_rated:
                found = dialogue_label(talk.meta["overall"], talk.meta["ratings"], d.neutral)
            label = found if is_rated or not d.path else named.get(_written(found))
            if label not in (SAT, DSAT):
                why = f"label {found!r}" if found is not None else "without a label"
            elif not any(m.role == "user" and m.content.strip() for m in talk.messages):
                why = "without a word of the user's"
            else:
                taken.append(talk)
                truth.append(label)
                continue
            left_out[why] = left_out.get(why, 0) + 1
    unread = {"that cannot be read": len(quarantine)} if len(quarantine) else {}
    _refuse_too_few(config, truth[:begin], left_out | unread)
    for label, field in ((SAT, "sat"), (DSAT, "dsat")):
        if begin is not None and label not in truth[begin:]:
            raise Refused(
                f"config.data.test_path={d.test_path!r}: of {len(taken) - begin} conversations "
                f"that are labelled none is {d[field]!r}"
            )
    ids = [talk.id for talk in taken]
    if len(set(ids)) < len(ids):
        twice = next(id for id, count in Counter(ids).items() if count > 1)
        raise Refused(
            f"two conversations have the id {twice!r}; every id may come once (rows without one "
            "are called by the name of their file and their line)"
        )
    return Talks(
        ids,
        [input_of(talk).turns for talk in taken],
        truth,
        [talk.meta for talk in taken],
        left_out,
        frozenset(range(begin, len(taken))) if begin is not None else frozenset(),
    )


def _written(found: Any) -> str:
    """A label as a config names it: a string, or what JSON writes for it (true, 1)."""
    return found if isinstance(found, str) else json.dumps(found)


def _opened(config, field: str, quarantine: Quarantine) -> Sequence[Conversation]:
    path = config.data[field]
    source = checks.naming(
        f"config.data.{field}: ", lambda: open_source(path, config.data.format, quarantine)
    )
    if isinstance(source[0], PreferencePair):
        raise Refused(
            f"config.data.{field}={path!r} holds preference pairs; it must hold conversations"
        )
    return source


def _refuse_too_few(config, truth: Sequence[str], left_out: Mapping[str, int]) -> None:
    """Refuses too few conversations of a label for every split to learn from, and says what would
    be enough, and which conversations were left out."""
    s = config.spur
    others = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
    others = f" (left out: {others})" if others else ""
    for label, field in ((SAT, "sat"), (DSAT, "dsat")):
        count = truth.count(label)
        if not count:
            raise Refused(
                f"config.data.label={config.data.label!r}: of {len(truth)} conversations that are "
                f"labelled none is {config.data[field]!r}{others}"
            )
        if (size := _share(s.train, count)) < LEAST:
            enough = math.ceil(100 * LEAST / count) / 100
            raise Refused(
                f"config.spur.train={s.train} of {count} conversations that are "
                f"{config.data[field]!r} is {size}; training parts need at least "
                f"{LEAST} of each label{others}. Give more conversations, or config.spur.train="
                f"{enough} with config.spur.splits={min(s.splits, max(int(1 / enough + 1e-9), 1))}"
            )


def _share(share: float, count: int) -> int:
    """Rounded down, so that shares which sum to 1 fit."""
    return int(share * count + 1e-9)


@dataclass(frozen=True)
class Split:
    """Indices of conversations to learn from, to tune a threshold with, and to test on."""

    train: list[int]
    dev: list[int]
    test: list[int]


def splits_of(config, talks: Talks) -> list[Split]:
    """Splits whose training parts share nothing; of each label every part has its share of what is
    not apart."""
    s = config.spur
    rng = np.random.default_rng(config.seed)
    parts: list[tuple[list[int], list[int], list[int]]] = [([], [], []) for _ in range(s.splits)]
    for label in (SAT, DSAT):
        own = [i for i, x in enumerate(talks.truth) if x == label and i not in talks.apart]
        apart = [i for i in sorted(talks.apart) if talks.truth[i] == label]
        order = rng.permutation(own).tolist()
        size, dev = _share(s.train, len(own)), _share(s.dev, len(own))
        for i, (train, tuned, test) in enumerate(parts):
            begin = i * size
            rest = [*order[begin + size :], *order[:begin]]
            train += order[begin : begin + size]
            tuned += rest[:dev]
            test += apart if talks.apart else rest[dev:]
    return [Split(*(rng.permutation(part).tolist() for part in own)) for own in parts]


def domain_of(config, meta: Mapping) -> str | None:
    found = meta.get(config.data.domain)
    return None if found is None else str(found)


def domain_groups(config, talks: Talks) -> dict[str, set[str]]:
    """The domains in two groups, those with an odd place in the alphabet in the second."""
    known = {domain_of(config, meta) for meta in talks.meta}
    found = sorted(domain for domain in known if domain is not None)
    if len(found) < 2:
        return {}
    return {"first": set(found[::2]), "second": set(found[1::2])}
