"""Tasks past one machine: their rows are divided among workers on a Ray cluster.

Each worker is a `run_tasks` with a journal on its node and its part of the limits. The journals are
merged into the run's one, out of which `run_tasks` here gives the results: so they are what one
process gives, and whatever no worker finished is asked from here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from jaxconv.errors import Refused, Stopped
from jaxconv.llm.answers import is_valid, parse
from jaxconv.llm.backends.base import Backend
from jaxconv.llm.failures import InvalidInput
from jaxconv.llm.journal import Journal
from jaxconv.llm.ray_nodes import Nodes, cluster
from jaxconv.llm.ray_worker import Share
from jaxconv.llm.results import Result, Tally
from jaxconv.llm.runner import run_tasks
from jaxconv.llm.settings import Settings
from jaxconv.llm.task import Task


def run_on_ray(
    rows: Iterable[tuple[str, Any]],
    task: Task,
    backend: Backend,
    journal: Journal,
    settings: Settings,
    sample: int,
    retry_failed: bool,
    stop: Callable[[], bool],
    on_result: Callable[[Result], None],
) -> dict[str, Result]:
    """As `run_tasks`, on the cluster at RAY_ADDRESS, or else on one of this machine alone.

    Raises:
        Refused: ray is not installed, the backend asks no model, or a node lacks what it needs.
    """
    if not backend.is_model:
        raise Refused(
            f"llm.executor='ray' and answers of {backend.model!r}, which asks no model; it must be "
            "'local'"
        )
    rows = list(rows)
    settings = replace(settings, executor="local")
    told: dict[str, Result] = {}
    tally = Tally(task.name, settings.max_failure_rate)

    def tell(result: Result) -> None:
        if result.id not in told:  # a worker that was killed tells again what its journal has
            told[result.id] = result
            tally.add(result)
            on_result(result)

    def here(rows: Iterable[tuple[str, Any]], settings: Settings, retry_failed: bool = False):
        return run_tasks(
            task,
            rows,
            backend,
            journal=journal,
            settings=replace(settings, max_failure_rate=1.0),  # `tally` judges
            sample=sample,
            retry_failed=retry_failed,
            stop=stop,
            on_result=tell,
        )

    with cluster(settings.workers) as ray:
        nodes = Nodes(ray, journal)
        nodes.prepare(backend)
        wanted = settings.workers or len(nodes.alive())
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if wanted > cpus:
            raise Refused(f"llm.workers={wanted}; the Ray cluster has {cpus} CPUs, one for each")
        keys, asked, begun = _unanswered(rows, task, backend, journal, sample, retry_failed)
        given_up = journal.given_up() if retry_failed else {}
        workers = min(wanted, settings.concurrency, len(asked))
        parts = divided(settings, journal, workers) if workers else []
        shares = [
            Share(number, task, backend, part, sample, asked[number :: len(parts)])
            for number, part in enumerate(parts)
        ]
        inputs = dict(asked)

        def tell_valued(result: Result) -> None:
            if result.error is None:
                value = parse(task, inputs[result.id], result.raw)
                tell(replace(result, value=value))
            elif result.error.kind != "budget":  # what one share cannot pay for, others may
                tell(result)

        try:
            if shares:
                nodes.ask(shares, stop, tell_valued)
        except Stopped:
            raise Stopped(
                f"in task {task.name}, {tally.finished:,} rows done; every answer is in the journal"
            ) from None
    if begun:
        here(begun, settings, retry_failed)
    now = journal.given_up()
    owed = {key for key, number in given_up.items() if now[key] == number}  # no retry failed yet
    results = here([row for row in rows if keys.get(row[0]) not in owed], settings)
    if again := [row for row in rows if keys.get(row[0]) in owed]:
        results |= here(again, settings, retry_failed)
    return {id: _with_cost(results[id], told[id]) for id, _ in rows}


def _with_cost(result: Result, told: Result) -> Result:
    return replace(result, attempts=told.attempts, tokens=told.tokens, usd=told.usd)


def _unanswered(
    rows: Sequence[tuple[str, Any]],
    task: Task,
    backend: Backend,
    journal: Journal,
    sample: int,
    retry_failed: bool,
) -> tuple[dict[str, str], list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(key of each id, rows to ask, rows to ask at which attempts were made that count). Of rows
    with the same question the first is asked."""
    ids: set[str] = set()
    keys: dict[str, str] = {}
    asked, begun = [], []
    known: set[str] = set()
    for id, given in rows:
        if id in ids:
            raise Refused(f"two inputs have the id {id!r}; every id may come once")
        ids.add(id)
        try:
            input = task.typed(given)
            key = task.request(input, model=backend.model, sample=sample).key
        except InvalidInput:
            continue
        keys[id] = key
        if key in known:
            continue
        known.add(key)
        history = journal.history(key)
        if history.answer is not None and is_valid(task, input, history.answer):
            continue
        if history.failure is not None and not retry_failed:
            continue
        (begun if history.tried else asked).append((id, input))
    return keys, asked, begun


# ---------------------------------------------------------------- limits


def divided(settings: Settings, journal: Journal, workers: int) -> list[Settings]:
    """The part of each worker, so that all together keep to the limits. What the journal says was
    spent is spent; where nothing is left there is no worker."""
    if workers > settings.concurrency:
        raise Refused(f"{workers} workers with concurrency {settings.concurrency}; at most that")
    costs = journal.costs()
    usd = settings.budget_usd - sum(cost.usd + cost.unknown_usd for cost in costs)
    tokens = settings.budget_tokens - sum(cost.tokens + cost.unknown_tokens for cost in costs)
    tokens //= workers
    if (settings.budget_usd and usd <= 0) or (settings.budget_tokens and tokens <= 0):
        return []
    each, more = divmod(settings.concurrency, workers)
    return [
        replace(
            settings,
            concurrency=each + (number < more),
            requests_per_minute=settings.requests_per_minute / workers,
            tokens_per_minute=settings.tokens_per_minute / workers,
            budget_usd=usd / workers if settings.budget_usd else 0.0,
            budget_tokens=tokens if settings.budget_tokens else 0,
            max_failure_rate=1.0,  # the rate of all rows counts, not that of a share
        )
        for number in range(workers)
    ]
