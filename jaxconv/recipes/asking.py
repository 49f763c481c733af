"""Asks a recipe's tasks one after the other, with one backend, one journal and one budget."""

import collections
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from jaxconv import processes
from jaxconv.data.quarantine import Quarantine
from jaxconv.errors import Failed, Refused
from jaxconv.evals.report import Quantity, Report, table
from jaxconv.llm import (
    Estimate,
    Journal,
    Result,
    Task,
    count_by_cause,
    estimate,
    run_tasks,
    section,
)
from jaxconv.llm.answers import parse
from jaxconv.llm.artifact import write_results
from jaxconv.llm.backends.base import Backend
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.failures import InvalidAnswer, InvalidInput
from jaxconv.llm.settings import Settings
from jaxconv.train import clock, interrupt
from jaxconv.train.progress import Progress
from jaxconv.train.workdir import Workdir

Inputs = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""By id, or pairs of id and input; gone through more than once."""

T = TypeVar("T")
Chain = Generator[tuple[Task, Mapping[str, Any]], Mapping[str, Result], T]
"""Questions of which each depends on the answers before: yields a task and its inputs by id, is
sent the results, and returns what it was for."""


class NoAnswer(Failed):
    """A question that nothing goes on without has no valid answer."""


def once(task: Task, id: str, input: Any) -> Chain[Any]:
    """A step of a chain: the value for one input.

    Raises:
        NoAnswer: there is none.
    """
    result = (yield task, {id: input})[id]
    if result.error is not None:
        raise NoAnswer(
            f"task {task.name}, {result.id}: {result.error.kind}: {result.error.message}; "
            "--retry_failed asks again"
        )
    return result.value


@dataclass
class Asked:
    """What became of the questions of one task.

    Attributes:
        rows: inputs.
        causes: how many have no value, by kind of failure.
    """

    rows: int
    causes: collections.Counter[str]


class Asking:
    """Who a recipe asks, and what came of it so far.

    In a dry run nobody is asked: `ask` notes what it would take, and gives the answers that an
    earlier run was given, and for the rest those of the tasks' rules, so that what comes after can
    be estimated too.

    Attributes:
        backend: who answers.
        dry: whether this is a dry run.
        plans: what each call of `ask` was going to take, in order.
    """

    def __init__(
        self,
        backend: Backend,
        journal: Journal | None,
        settings: Settings,
        *,
        workdir: Workdir | None,
        retry_failed: bool = False,
    ):
        self.backend = backend
        self.dry = workdir is None
        self.plans: list[Estimate] = []
        self._workdir = workdir
        self._journal = journal
        self._options: dict[str, Any] = {
            "journal": journal,
            "settings": settings,
            "retry_failed": retry_failed,
        }
        self._asked: dict[tuple[str, str], Asked] = {}

    @property
    def who(self) -> str:
        """Who answers, as tables and notes say it."""
        model = self.backend.model
        if self.by_rules:
            return f"{model} (no model was asked)"
        return model if self.backend.is_model else f"{model} (replayed)"

    @property
    def by_rules(self) -> bool:
        return isinstance(self.backend, Rules)

    @property
    def failures(self) -> int:
        """Rows without a value."""
        return sum(asked.causes.total() for asked in self._asked.values())

    def ask(
        self, task: Task, inputs: Inputs, *, sample: int = 0, keep: str = ""
    ) -> dict[str, Result]:
        """One result for each input, by id, as `llm.run_tasks` gives them.

        Args:
            task, inputs, sample: as for `run_tasks`.
            keep: name of a file in `artifacts/answers` that gets a line for each row, with the key
                under which the journal has its calls and what they cost; "" keeps none.

        Raises:
            Refused: the budget is not enough for one call, and nobody has been asked; and as
                `run_tasks`.
            Failed: what was asked before has used the budget up; and as `run_tasks`.
            Stopped: as `run_tasks`.
        """
        plan = self.plan(task, inputs, sample=sample)
        if self.dry:
            return self._foretold(task, inputs, sample)
        if self.backend.is_model:
            processes.say(str(plan))
        if plan.calls and plan.affordable == 0:
            if not any(asked.rows for asked in self._asked.values()):
                raise Refused(f"the budget is not enough for one call; {plan}")
            raise Failed(
                f"the budget is used up; {plan}. What is answered is kept: the same command with a "
                "larger config.llm.budget_usd or config.llm.budget_tokens goes on"
            )
        with contextlib.ExitStack() as stack:
            tell = lambda result: None  # noqa: E731
            if plan.rows > 1:
                title = f"{task.name} ({keep})" if keep else task.name
                tell = _telling(stack.enter_context(Progress(self._workdir, title, plan.rows)))
            stack.enter_context(clock.spending(clock.STEP))
            results = run_tasks(
                task,
                inputs,
                self.backend,
                sample=sample,
                stop=interrupt.noticed,
                on_result=tell,
                **self._options,
            )
        asked = self._asked.setdefault(
            (task.name, task.prompt.version), Asked(0, collections.Counter())
        )
        asked.rows += len(results)
        asked.causes.update(count_by_cause(results.values()))
        if keep:
            self.write(self._workdir.artifacts / "answers" / f"{keep}.jsonl", task, results)
        return results

    def plan(self, task: Task, inputs: Inputs, *, sample: int = 0) -> Estimate:
        """What `ask` with the same arguments would take.

        Raises:
            Refused: two inputs have one id.
        """
        plan = estimate(task, inputs, self.backend, sample=sample, **self._options)
        self.plans.append(plan)
        return plan

    def in_step(self, chains: Mapping[str, Chain[T]]) -> dict[str, T | NoAnswer]:
        """What each chain returns, by its name, or why it ended without an answer.

        What the chains ask next is asked together, so that as many calls are under way as there are
        chains. The id of a row is "<name of the chain>, <id in it>".
        """
        found: dict[str, T | NoAnswer] = {}
        waiting: dict[str, tuple[Task, Mapping[str, Any]]] = {}

        def go_on(name: str, results: Mapping[str, Result] | None) -> None:
            try:
                waiting[name] = chains[name].send(results)
            except StopIteration as end:
                found[name] = end.value
            except NoAnswer as error:
                found[name] = error

        for name in chains:
            go_on(name, None)
        while waiting:
            groups: dict[tuple, dict[str, tuple[Task, Mapping[str, Any]]]] = {}
            for name, (task, inputs) in waiting.items():
                # Rules may differ between chains, and a dry run answers with them.
                who = () if self.backend.is_model and not self.dry else (id(task.rules),)
                group = groups.setdefault((task.name, task.prompt.version, *who), {})
                group[name] = task, inputs
            waiting.clear()
            for group in groups.values():
                task = next(iter(group.values()))[0]
                joined = {
                    f"{name}, {id}": given
                    for name, (_, inputs) in group.items()
                    for id, given in inputs.items()
                }
                results = self.ask(task, joined)
                for name, (_, inputs) in group.items():
                    go_on(name, {id: results[f"{name}, {id}"] for id in inputs})
        return {name: found[name] for name in chains}

    def write(self, path: Path, task: Task, results: Mapping[str, Result]) -> None:
        """`llm.artifact.write_results`; a dry run writes nothing."""
        if not self.dry:
            write_results(path, task, self.backend.model, results)

    def foretold(self) -> list[str]:
        """What everything asked for so far was going to take, a line a task."""
        sums: dict[str, Estimate] = {}
        before = 0
        for plan in self.plans:
            if plan.affordable is not None:  # of a budget that what came before has used
                left = min(max(plan.affordable - before, 0), plan.calls)
                plan = dataclasses.replace(plan, affordable=left)
            before += plan.calls
            sums[plan.task] = plan if plan.task not in sums else sums[plan.task] + plan
        return [str(total) for total in sums.values()]

    def report(self, report: Report) -> None:
        """Adds who was asked what and what it took, by the journal; a row without a value makes the
        status "partial"."""
        rows = [
            [name, version, self.backend.model, f"{asked.rows:,}", f"{asked.causes.total():,}"]
            for (name, version), asked in self._asked.items()
        ]
        report.sections["Questions"] = table(
            ["task", "prompt", "answers of", "rows", "without a value"], rows
        )
        for (name, _), asked in self._asked.items():
            if asked.causes:
                said = ", ".join(f"{kind} {n}" for kind, n in asked.causes.most_common())
                report.notes.append(
                    f"{asked.causes.total()} of {asked.rows} rows of {name} have no value: {said}. "
                    "--retry_failed asks again."
                )
        if self.failures:
            report.status = "partial"
        if (self._workdir.artifacts / "answers").is_dir():
            report.artifacts["answers"] = "artifacts/answers"
        report.notes += getattr(self.backend, "notes", [])
        self._add_cost(report)

    def _add_cost(self, report: Report) -> None:
        costs = self._journal.costs()
        priced = not self.backend.is_model or self.backend.price is not None
        report.cost |= {
            "llm_calls": sum(cost.calls for cost in costs),
            "llm_tokens": sum(cost.tokens for cost in costs),
        }
        if priced:
            report.cost["usd"] = round(sum(cost.usd for cost in costs), 6)
        elif costs:
            report.notes.append(
                f"What it cost is unknown: {self.backend.model!r} has no price; config.llm.prices "
                "names a table with one."
            )
        for cost in costs:
            if priced:
                report.perf[f"llm/{cost.task}/{cost.model}/usd"] = Quantity(cost.usd, "USD")
            if cost.unknown_calls:
                most = f", {cost.unknown_usd:.4g} USD" if priced else ""
                report.notes.append(
                    f"{cost.unknown_calls} calls of {cost.task} brought no answer and may be paid "
                    f"for: at most {cost.unknown_tokens:,} tokens{most}, on top."
                )

    def _foretold(self, task: Task, inputs: Inputs, sample: int) -> dict[str, Result]:
        results = run_tasks(task, inputs, Rules())
        if self._journal is None or not self.backend.is_model:
            return results
        for id, given in inputs.items() if isinstance(inputs, Mapping) else inputs:
            try:
                input: BaseModel = task.typed(given)
                request = task.request(input, model=self.backend.model, sample=sample)
                history = self._journal.history(request.key)
                if history.answer is not None:
                    value = parse(task, input, history.answer)
                    results[id] = Result(id, request.key, value, None, history.answer)
                elif history.failure is not None and not self._options["retry_failed"]:
                    results[id] = Result(id, request.key, None, history.failure, None)
            except (InvalidInput, InvalidAnswer):
                continue  # it would be asked again, or has been estimated as no call
        return results


def _telling(progress: Progress) -> Callable[[Result], None]:
    so_far: collections.Counter[str] = collections.Counter()

    def tell(result: Result) -> None:
        so_far.update(rows=1, failed=not result.ok, usd=result.usd)
        headline = {"failed": so_far["failed"], "usd": so_far["usd"]}
        progress.update(so_far["rows"], headline, tokens=result.tokens)

    return tell


@contextlib.contextmanager
def asking(config, workdir: Workdir, *, retry_failed: bool = False) -> Iterator[Asking]:
    """Whom the config names, with the journal of the workdir."""
    if processes.count() > 1:
        raise Refused(
            f"recipe {config.recipe!r} runs in one process; start it without --distributed"
        )
    backend = section.make_backend(config, workdir.artifacts / "batches.jsonl")
    # What is asked is written again, from the journal where it holds it.
    shutil.rmtree(workdir.artifacts / "answers", ignore_errors=True)
    with Journal(workdir.journal) as journal:
        yield Asking(
            backend,
            journal,
            section.settings_of(config),
            workdir=workdir,
            retry_failed=retry_failed,
        )


@contextlib.contextmanager
def dry_asking(config, path: Path) -> Iterator[tuple[Asking, Path]]:
    """For `--dry_run`: (whom the config names and what the workdir at `path`, which need not be
    there, has of them; a folder for what is made on the way and not kept)."""
    backend = section.make_backend(config, path / "artifacts" / "batches.jsonl")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place, journal = path / "journal.sqlite", None
        if place.exists():
            journal = stack.enter_context(Journal(place, read_only=True))
        yield Asking(backend, journal, section.settings_of(config), workdir=None), folder


def add_quarantine(report: Report, quarantine: Quarantine, workdir: Workdir) -> None:
    """Adds the rows that could not be read, if there are any; the status is "partial" then."""
    if len(quarantine):
        report.status = "partial"
        report.artifacts["quarantine"] = str(quarantine.path.relative_to(workdir.path))
        report.notes += quarantine.notes(report.artifacts["quarantine"])
