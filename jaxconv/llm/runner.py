"""Asks a task's question of many inputs and loses no answer."""

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.llm.answers import parse
from jaxconv.llm.backends.base import Answer, Backend, Call
from jaxconv.llm.event_loop import in_event_loop
from jaxconv.llm.failures import (
    ANSWERS,
    FINAL,
    TRANSIENT,
    CallFailed,
    Failure,
    InvalidAnswer,
    InvalidInput,
    writable,
)
from jaxconv.llm.journal import UNSENT, Interrupted, Journal, Outcome
from jaxconv.llm.limits import Budget, BudgetSpent, Pace
from jaxconv.llm.messages import about_tokens, feedback, most_tokens
from jaxconv.llm.prices import FREE
from jaxconv.llm.prompt import ChatMessage
from jaxconv.llm.results import Result, Tally
from jaxconv.llm.settings import Settings
from jaxconv.llm.task import Request, Task

_WAITING = 4  # rows under way for each call that may be: those others wait before they ask again
_AT_ONCE = 32  # calls when a run begins
_RAMP_S = 1.0  # seconds until all may be under way
_READY = 2  # for each so many calls one more stands ready
_LIMITED = 3  # answers "too many requests" in a row mean everybody, not that row


def run_tasks(
    task: Task,
    inputs: Mapping[str, Any] | Iterable[tuple[str, Any]],
    backend: Backend,
    *,
    journal: Journal | None = None,
    settings: Settings | None = None,
    sample: int = 0,
    retry_failed: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_result: Callable[[Result], None] = lambda result: None,
) -> dict[str, Result]:
    """One result for each input, by id and in the order of the inputs.

    What the journal holds is not asked again: neither an answer, nor, without `retry_failed`, a row
    that was given up. A row that fails is an error in its own place; the others go on.

    Args:
        task: the question.
        inputs: by id, or pairs of id and input: the task's input type, or fields for it.
        backend: who answers.
        journal: takes every call of a model; None forgets them when this returns.
        settings: how to ask.
        sample: which of several answers to the same questions this is.
        retry_failed: rows that were given up get all their attempts again.
        stop: asked often whether to stop.
        on_result: told of each result when it is there, in the event loop's thread; with Ray in
            the caller's.

    Raises:
        Refused: two inputs have one id, the endpoint does not take the model or the key, or there
            is a budget in USD and no price.
        Failed: more failures than allowed, an account without credit, or a full disk.
        Stopped: it was asked to; what is answered is in the journal.
    """
    rows = inputs.items() if isinstance(inputs, Mapping) else inputs
    settings = settings or Settings()
    with Journal() if journal is None else nullcontext(journal) as kept:
        options = task, backend, kept, settings, sample, retry_failed, stop, on_result
        if settings.executor == "ray":
            from jaxconv.llm.ray_executor import run_on_ray

            return run_on_ray(rows, *options)
        run = _Run(*options)
        return in_event_loop(lambda: run.all(rows))


# ---------------------------------------------------------------- one run


class _Run:
    """The state of one `run_tasks`."""

    def __init__(self, task, backend, journal, settings, sample, retry_failed, stop, on_result):
        self._task, self._backend, self._journal = task, backend, journal
        self._settings, self._sample, self._retry_failed = settings, sample, retry_failed
        self._stop, self._on_result = stop, on_result
        self._results: dict[str, Result | None] = {}
        self._under_way: dict[str, asyncio.Future[Result]] = {}
        self._tally = Tally(task.name, settings.max_failure_rate)
        self._limited, self._not_before = 0, 0.0
        costs = journal.costs()
        if settings.budget_usd and backend.is_model and backend.price is None:
            raise Refused(
                f"llm.budget_usd={settings.budget_usd} and no price for model {backend.model!r}; "
                "add it to a price table (llm.prices), or set llm.budget_tokens"
            )
        self._price = backend.price or FREE
        # Of backends in which a call outlives the run that made it.
        self._resumes = getattr(backend, "resumes", lambda call: False)
        self._spent = (
            sum(cost.usd + cost.unknown_usd for cost in costs),
            sum(cost.tokens + cost.unknown_tokens for cost in costs),
        )

    async def all(self, rows: Iterable[tuple[str, Any]]) -> dict[str, Result]:
        s = self._settings
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(min(s.concurrency, _AT_ONCE))
        # More than may be called stand ready in the journal, so that no call waits for the disk.
        # With a pace none does: its turn would be over when a call may be made at last.
        ready = 0 if s.requests_per_minute or s.tokens_per_minute else s.concurrency // _READY
        self._prepared = asyncio.Semaphore(s.concurrency + ready)
        self._requests = Pace(s.requests_per_minute, sleep=self._pause)
        self._tokens = Pace(s.tokens_per_minute, sleep=self._pause)
        usd, tokens = self._spent
        self._budget = Budget(s.budget_usd, s.budget_tokens, spent_usd=usd, spent_tokens=tokens)
        rows = iter(rows)
        async with self._backend, _nothing_old_collected():
            workers = [
                asyncio.create_task(self._work(rows)) for _ in range(s.concurrency * _WAITING)
            ]
            others = [
                asyncio.create_task(self._watch(workers)),
                asyncio.create_task(self._open_slots(s.concurrency - _AT_ONCE)),
            ]
            try:
                await asyncio.gather(*workers)
            except asyncio.CancelledError:
                if not self._stopping.is_set():
                    raise
            finally:
                for each in (*workers, *others):
                    each.cancel()
                await asyncio.gather(*workers, *others, return_exceptions=True)
                await self._journal.drain()
        if self._stopping.is_set():
            raise Stopped(
                f"in task {self._task.name}, {self._tally.finished:,} rows done; "
                "every answer is in the journal"
            )
        return self._results

    async def _watch(self, workers: Sequence[asyncio.Task]) -> None:
        while not self._stop():
            await asyncio.sleep(0.1)
        self._stopping.set()
        await asyncio.sleep(self._settings.grace_s)
        for worker in workers:
            worker.cancel()

    async def _open_slots(self, more: int) -> None:
        """Calls that begin together end together, and then each waits for the work on all of them:
        so all but the first begin one after the other, within a second."""
        began, opened = time.monotonic(), 0
        while opened < more:
            await asyncio.sleep(0.01)
            due = min(more, math.ceil(more * (time.monotonic() - began) / _RAMP_S))
            for _ in range(due - opened):
                self._slots.release()
            opened = due

    async def _work(self, rows: Iterator[tuple[str, Any]]) -> None:
        for id, given in rows:
            if self._stopping.is_set():
                return
            if id in self._results:
                raise Refused(f"two inputs have the id {id!r}; every id may come once")
            self._results[id] = None  # keeps the order of the inputs
            result = await self._row(id, given)
            if result is None:
                return
            self._results[id] = result
            self._tally.add(result)
            self._on_result(result)
            await asyncio.sleep(0)  # rows that wait for nothing let the others go on

    async def _row(self, id: str, given: Any) -> Result | None:
        """The result of a row, None where the run stops before there is one."""
        try:
            input = self._task.typed(given)
            request = self._task.request(input, model=self._backend.model, sample=self._sample)
        except InvalidInput as invalid:
            return Result(id, "", None, Failure("invalid_input", str(invalid)), None)
        if (other := self._under_way.get(request.key)) is not None:
            # The same question under another id: one answer is enough.
            same = await asyncio.shield(other)
            return same and Result(id, same.key, same.value, same.error, same.raw)
        self._under_way[request.key] = promise = asyncio.get_running_loop().create_future()
        result = None
        try:
            result = await (self._asked if self._backend.is_model else self._looked_up)(
                id, input, request
            )
            return result
        finally:
            promise.set_result(result)
            del self._under_way[request.key]

    async def _looked_up(self, id: str, input: BaseModel, request: Request) -> Result:
        """One try with a backend that costs nothing and would answer the same again."""
        call = Call(self._task, input, request, request.messages, self._task.max_tokens, 0)
        raw = None
        try:
            raw = (await self._backend.ask(call)).text
            return Result(id, request.key, parse(self._task, input, raw), None, raw, 1)
        except CallFailed as failed:
            failure = failed.failure
        except InvalidAnswer as invalid:
            failure = Failure(invalid.kind, str(invalid), raw)
        return Result(id, request.key, None, failure, failure.raw, 1)

    async def _asked(self, id: str, input: BaseModel, request: Request) -> Result | None:
        """Asks until there is a valid answer or no attempt is left."""
        history, refused = self._journal.history(request.key), []
        if history.answer is not None:
            # Checks may have changed since; an answer that they refuse now is none.
            try:
                value = parse(self._task, input, history.answer)
                return Result(id, request.key, value, None, history.answer)
            except InvalidAnswer as invalid:
                refused = [Failure(invalid.kind, str(invalid), history.answer)]
        if history.failure is not None and not self._retry_failed:
            return Result(id, request.key, None, history.failure, history.failure.raw)
        tried, made, tokens, usd = list(history.tried), 0, 0, 0.0

        def ended(value: Any, error: Failure | None, raw: str | None) -> Result:
            return Result(id, request.key, value, error, raw, made, tokens, usd)

        before = history.completed
        while len(tried) < self._settings.max_attempts:
            if self._stopping.is_set():
                return None
            try:
                told = feedback([*refused, *tried])
                going_on = None if made else history.interrupted
                done = await self._attempt(input, request, tried, told, before + made, going_on)
            except BudgetSpent as spent:
                return ended(None, Failure("budget", str(spent)), None)
            if done is None:
                return None
            value, outcome, wait = done
            made += 1
            tokens += (outcome.input_tokens or 0) + (outcome.output_tokens or 0)
            usd += outcome.usd or 0.0
            if outcome.failure is None:
                return ended(value, None, outcome.raw)
            tried.append(outcome.failure)
            if self._is_last(tried):
                break
            await self._pause(wait)
        else:
            if not made:  # fewer attempts are allowed than before
                await self._journal.give_up(request.key, tried[-1])
        return ended(None, tried[-1], tried[-1].raw)

    def _is_last(self, tried: Sequence[Failure]) -> bool:
        return tried[-1].kind in FINAL or len(tried) >= self._settings.max_attempts

    async def _attempt(
        self,
        input: BaseModel,
        request: Request,
        tried: Sequence[Failure],
        told: Sequence[ChatMessage],
        before: int,
        interrupted: Interrupted | None,
    ) -> tuple[Any, Outcome, float] | None:
        """(value, outcome, seconds to wait before the next) of one attempt; None when stopping."""
        messages = [*request.messages, *told]
        truncated = sum(failure.kind == "truncated" for failure in tried)
        max_tokens = self._task.max_tokens * 2 ** min(truncated, 2)
        most = most_tokens(messages, max_tokens)
        usd = self._price.usd(most - max_tokens, max_tokens)
        about = about_tokens(messages) + max_tokens
        invalid = sum(failure.kind in ANSWERS for failure in tried)
        call = Call(self._task, input, request, messages, max_tokens, before, invalid)
        goes_on = interrupted is not None and self._resumes(call)
        async with self._prepared:
            if goes_on:  # the same attempt, which is not paid for again
                number, most, usd = interrupted.number, interrupted.tokens, interrupted.usd
                self._budget.adopt(usd, most)
            else:
                await self._budget.reserve(usd, most)
                await self._turn(about)
                if self._stopping.is_set():
                    return None
                number = await self._journal.begin(
                    self._task.name,
                    self._task.prompt.version,
                    request,
                    feedback=told,
                    max_tokens=max_tokens,
                    tokens=most,
                    usd=usd,
                )
            value, outcome, retry_after = await self._call(call)
        if outcome is UNSENT:
            if not goes_on:
                await self._journal.end(request.key, number, outcome, give_up=False)
            return None
        used = None
        if outcome.input_tokens is not None and outcome.output_tokens is not None:
            used = outcome.input_tokens + outcome.output_tokens
            if not goes_on:
                self._tokens.give_back(about - used)
        await self._budget.settle(usd, most, used_usd=outcome.usd, used_tokens=used)
        failure = outcome.failure
        wait = 0.0
        if failure is not None and failure.kind in TRANSIENT:
            wait = self._settings.backoff(request.key, tried, retry_after)
        self._limited = self._limited + 1 if failure and failure.kind == "rate_limited" else 0
        if self._limited >= _LIMITED:
            self._not_before = max(self._not_before, time.monotonic() + wait)
        last = failure is not None and self._is_last([*tried, failure])
        await self._journal.end(request.key, number, outcome, give_up=last)
        return value, outcome, wait

    async def _turn(self, tokens: int) -> None:
        """Returns when the limits a minute let a call of about so many tokens go, or when the run
        stops."""
        while not self._stopping.is_set():
            await self._pause(self._not_before - time.monotonic())
            await self._requests.take()
            await self._tokens.take(tokens)
            if self._not_before <= time.monotonic():
                return
            self._tokens.give_back(tokens)  # all were told to wait in the meantime

    async def _call(self, call: Call) -> tuple[Any, Outcome, float | None]:
        """(value, outcome, what the server asks to wait) of a call; of one that the end of the run
        comes before, `UNSENT`."""
        try:
            async with self._slots:
                while (early := self._not_before - time.monotonic()) > 0:
                    if await self._pause(early + self._settings.backoff(call.request.key, ())):
                        break
                if self._stopping.is_set():
                    return None, UNSENT, None
                answer = await self._answer(call)
            value = self._checked(call, answer)
        except CallFailed as failed:
            failure, took = failed.failure, self._usage(*(failed.tokens or (None, None)))
            return None, Outcome(failure.raw, None, failure, *took), failed.retry_after
        except InvalidAnswer as invalid:
            raw = _cut(answer.text, self._settings.max_answer_bytes)
            failure = Failure(invalid.kind, str(invalid), raw)
            took = self._usage(answer.input_tokens, answer.output_tokens)
            return None, Outcome(raw, None, failure, *took), None
        took = self._usage(answer.input_tokens, answer.output_tokens)
        return value, Outcome(answer.text, value.model_dump_json(), None, *took), None

    async def _answer(self, call: Call) -> Answer:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._backend.ask(call)
        except TimeoutError:
            seconds = f"{self._settings.timeout_s:g} s"
            raise CallFailed(Failure("timeout", f"no answer within {seconds}")) from None
        except (CallFailed, Refused, Failed, Stopped, MemoryError):
            raise
        except Exception as error:
            # Nobody foresaw it. Without an outcome it would end every run at this row.
            message = f"{type(error).__name__}: {error}"
            raise CallFailed(Failure("backend_error", message)) from error
        return replace(answer, text=writable(answer.text))

    def _checked(self, call: Call, answer: Answer) -> Any:
        size, allowed = len(answer.text.encode()), self._settings.max_answer_bytes
        if size > allowed:
            raise InvalidAnswer("oversized", f"the answer has {size} bytes; it may have {allowed}")
        try:
            return parse(call.task, call.input, answer.text)
        except InvalidAnswer as invalid:
            if answer.cut and invalid.kind == "invalid_json":
                message = f"the answer was cut at {call.max_tokens} tokens"
                raise InvalidAnswer("truncated", message) from None
            raise

    def _usage(
        self, input_tokens: int | None, output_tokens: int | None
    ) -> tuple[int | None, int | None, float | None]:
        if input_tokens is None or output_tokens is None:
            return None, None, None
        return input_tokens, output_tokens, self._price.usd(input_tokens, output_tokens)

    async def _pause(self, seconds: float) -> bool:
        """Waits, less when the run stops; returns whether it does."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()


@asynccontextmanager
async def _nothing_old_collected() -> AsyncIterator[None]:
    """Inside the block the garbage collector leaves alone what is there before it: a client's
    thousands of classes, which stop all calls for tenths of a second whenever it looks at them."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")
