"""Judges: answers compared in both orders, graded one by one, or checked point by point.

A judge is a task like any other: who answers, the journal and the limits are those of `run_tasks`.
Each has a classical baseline for `rules`, which looks at words alone and is no judge of quality.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from jaxconv.evals.statistics import Estimate, proportion
from jaxconv.llm import Failure, Prompt, Result, Task

_PROMPTS = Path(__file__).parent / "prompts"
_WORD = re.compile(r"\w{3,}")


# ---------------------------------------------------------------- two answers


class PairwiseInput(BaseModel):
    """Two answers to `question`; `checklist` is what its author is known to want, if anything."""

    question: str
    first: str
    second: str
    checklist: list[str] = []

    def swapped(self) -> "PairwiseInput":
        return self.model_copy(update={"first": self.second, "second": self.first})


class Verdict(BaseModel):
    """The reason comes first: a model that has to give one judges after it."""

    reason: str
    winner: Literal["first", "second", "tie"]


def _closer(input: PairwiseInput) -> Verdict:
    wanted = _words(" ".join([input.question, *input.checklist]))
    first, second = (len(wanted & _words(answer)) for answer in (input.first, input.second))
    winner = "tie" if first == second else "first" if first > second else "second"
    return Verdict(reason=f"words in common: {first} and {second}", winner=winner)


PAIRWISE = Task(
    name="judge/pairwise",
    input=PairwiseInput,
    output=Verdict,
    prompt=Prompt.load(_PROMPTS / "pairwise.md"),
    rules=_closer,
    max_tokens=256,
)


@dataclass(frozen=True)
class Judged:
    """Pairs judged in both orders.

    Attributes:
        winners: by id: "first", "second" or "tie". Where the orders disagree it is a tie.
        errors: by id, of pairs without a verdict in one of the orders: they are in no rate.
        win_rate: of `first`, a tie as half a win, is a mean over pairs; None without a verdict.
        flip_rate: share of pairs whose winner changed with the order.
        first_slot_rate: share of the verdicts with a winner that went to the answer shown first;
            a judge without a bias of position is at a half.
        swapped, straight: the results behind them, by id.
    """

    winners: dict[str, str]
    errors: dict[str, Failure]
    win_rate: float | None
    flip_rate: Estimate | None
    first_slot_rate: Estimate | None
    straight: Mapping[str, Result]
    swapped: Mapping[str, Result]


def judge_pairs(
    pairs: Mapping[str, PairwiseInput],
    ask: Callable[[Task, Mapping[str, Any]], Mapping[str, Result]],
    *,
    task: Task = PAIRWISE,
) -> Judged:
    """Judges each pair in both orders; a winner has to win in both.

    Args:
        pairs: by id.
        ask: asks a task of inputs by id, as `run_tasks` with a backend does.
        task: with `PairwiseInput` and `Verdict`.
    """
    straight = ask(task, pairs)
    swapped = ask(task, {id: p.swapped() for id, p in pairs.items()})
    other = {"first": "second", "second": "first", "tie": "tie"}
    winners, errors, flips, slots = {}, {}, 0, []
    for id in pairs:
        error = straight[id].error or swapped[id].error
        if error is not None:
            errors[id] = error
            continue
        said, back = straight[id].value.winner, other[swapped[id].value.winner]
        winners[id] = said if said == back else "tie"
        flips += said != back
        slots += [v for v in (said, swapped[id].value.winner) if v != "tie"]
    points = [{"first": 1.0, "tie": 0.5, "second": 0.0}[winner] for winner in winners.values()]
    return Judged(
        winners,
        errors,
        sum(points) / len(points) if points else None,
        proportion(flips, len(winners)) if winners else None,
        proportion(slots.count("first"), len(slots)) if slots else None,
        straight,
        swapped,
    )


# ---------------------------------------------------------------- one answer


class PointwiseInput(BaseModel):
    question: str
    answer: str
    criterion: str


class Grade(BaseModel):
    reason: str
    grade: int = Field(ge=1, le=10)


def _overlap(input: PointwiseInput) -> Grade:
    wanted = _words(f"{input.question} {input.criterion}")
    share = len(wanted & _words(input.answer)) / max(1, len(wanted))
    return Grade(reason="share of the request's words in the answer", grade=1 + round(9 * share))


POINTWISE = Task(
    name="judge/pointwise",
    input=PointwiseInput,
    output=Grade,
    prompt=Prompt.load(_PROMPTS / "pointwise.md"),
    rules=_overlap,
    max_tokens=256,
)


class ChecklistInput(BaseModel):
    question: str
    answer: str
    checklist: list[str] = Field(min_length=1)


class Point(BaseModel):
    reason: str
    met: bool


class Checked(BaseModel):
    points: list[Point]

    @property
    def score(self) -> float:
        """Share of the points that are met."""
        return sum(point.met for point in self.points) / len(self.points)


def _each_point(input: ChecklistInput, checked: Checked) -> str | None:
    if len(checked.points) == len(input.checklist):
        return None
    return f"points: there are {len(checked.points)}; there must be {len(input.checklist)}"


def _mentioned(input: ChecklistInput) -> Checked:
    said = _words(input.answer)
    points = []
    for item in input.checklist:
        wanted = _words(item)
        found = len(wanted & said)
        reason = f"{found} of {len(wanted)} words"
        points.append(Point(reason=reason, met=2 * found >= len(wanted)))
    return Checked(points=points)


CHECKLIST = Task(
    name="judge/checklist",
    input=ChecklistInput,
    output=Checked,
    prompt=Prompt.load(_PROMPTS / "checklist.md"),
    checks=(_each_point,),
    rules=_mentioned,
    max_tokens=1024,
)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
