"""What a run is going to take, before it takes it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxconv.errors import Refused
from jaxconv.llm.answers import is_valid
from jaxconv.llm.backends.base import Backend
from jaxconv.llm.failures import InvalidInput
from jaxconv.llm.journal import Journal
from jaxconv.llm.messages import about_tokens, most_tokens
from jaxconv.llm.settings import Settings
from jaxconv.llm.task import Task


@dataclass(frozen=True)
class Estimate:
    """What a run of a task is going to take.

    Attributes:
        rows: inputs.
        answered: rows that the journal has an answer to, or gave up: they cost nothing.
        calls: rows that are asked; those that are asked again come on top.
        input_tokens: about, four bytes each.
        output_tokens: at most.
        usd: at most, for so many input tokens; None without a price.
        affordable: calls that the budget is enough for, if each takes its most; None without one.
    """

    task: str
    model: str
    rows: int
    answered: int
    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None
    affordable: int | None

    def __add__(self, other: "Estimate") -> "Estimate":
        """Of two runs of the same task, one after the other."""

        def both(one, two):
            return None if one is None or two is None else one + two

        return Estimate(
            self.task,
            self.model,
            self.rows + other.rows,
            self.answered + other.answered,
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            both(self.usd, other.usd),
            both(self.affordable, other.affordable),
        )

    def __str__(self) -> str:
        cost = "price unknown" if self.usd is None else f"at most about {self.usd:.4g} USD"
        line = (
            f"{self.task} with {self.model}: {self.rows:,} rows, {self.answered:,} answered "
            f"before, {self.calls:,} calls, about {self.input_tokens:,} input tokens, at most "
            f"{self.output_tokens:,} output tokens, {cost}"
        )
        if self.affordable is not None and self.affordable < self.calls:
            line += (
                f"; WARNING: the budget covers about {self.affordable:,} of {self.calls:,} calls"
            )
        return line


def estimate(
    task: Task,
    inputs: Mapping[str, Any] | Iterable[tuple[str, Any]],
    backend: Backend,
    *,
    journal: Journal | None = None,
    settings: Settings | None = None,
    sample: int = 0,
    retry_failed: bool = False,
) -> Estimate:
    """What `run_tasks` with the same arguments would take; asks nobody.

    Raises:
        Refused: two inputs have one id.
    """
    settings, price = settings or Settings(), backend.price
    usd_left, tokens_left = settings.budget_usd, settings.budget_tokens
    if journal is not None:
        costs = journal.costs()
        usd_left -= sum(cost.usd + cost.unknown_usd for cost in costs)
        tokens_left -= sum(cost.tokens + cost.unknown_tokens for cost in costs)
    ids: set[str] = set()
    answered = calls = sent = affordable = 0
    open_budget = True
    for id, given in inputs.items() if isinstance(inputs, Mapping) else inputs:
        if id in ids:
            raise Refused(f"two inputs have the id {id!r}; every id may come once")
        ids.add(id)
        if not backend.is_model:
            continue
        try:
            input = task.typed(given)
            request = task.request(input, model=backend.model, sample=sample)
        except InvalidInput:
            continue
        if journal is not None:
            history = journal.history(request.key)
            if (history.answer is not None and is_valid(task, input, history.answer)) or (
                history.failure is not None and not retry_failed
            ):
                answered += 1
                continue
        calls += 1
        tokens, most = (
            about_tokens(request.messages),
            most_tokens(request.messages, task.max_tokens),
        )
        sent += tokens
        # As the runner does it: the most is reserved, and then less is spent.
        open_budget &= (
            not settings.budget_usd
            or price is None
            or price.usd(most - task.max_tokens, task.max_tokens) <= usd_left
        ) and (not settings.budget_tokens or most <= tokens_left)
        affordable += open_budget
        usd_left -= price.usd(tokens, task.max_tokens) if price else 0.0
        tokens_left -= tokens + task.max_tokens
    capped = bool(settings.budget_usd or settings.budget_tokens)
    return Estimate(
        task.name,
        backend.model,
        len(ids),
        answered,
        calls,
        sent,
        calls * task.max_tokens,
        price.usd(sent, calls * task.max_tokens) if price else None,
        affordable if capped else None,
    )
