"""Budgets and paces, as a run keeps to them."""

import asyncio
import time

import pytest
from scripted import Scripted
from small_task import TASK, rows

from jaxconv.errors import Stopped
from jaxconv.llm import Journal, Settings, run_tasks, runner
from jaxconv.llm.backends.base import Answer
from jaxconv.llm.backends.dialect import Status
from jaxconv.llm.backends.openai import answer_of, failed_call
from jaxconv.llm.failures import CallFailed, Failure

GOOD = Answer('{"label": "a", "score": 1}', False, 10, 5)
REFUSAL = {"choices": [{"message": {"content": None, "refusal": "no"}}]}


def test_refusals_are_paid_for_out_of_the_budget():
    reply = REFUSAL | {"usage": {"prompt_tokens": 400, "completion_tokens": 30}}
    journal, model = Journal(), Scripted(lambda call: answer_of(reply))
    settings = Settings(budget_tokens=3000, concurrency=1)
    results = run_tasks(TASK, rows(50), model, journal=journal, settings=settings)
    (cost,) = journal.costs()
    assert cost.input_tokens == 400 * len(model.calls) and cost.unknown_calls == 0
    assert cost.output_tokens == 30 * len(model.calls)
    assert 2 <= len(model.calls) <= 3000 // 430 and cost.tokens <= 3000
    kinds = [result.error.kind for result in results.values()]
    assert set(kinds[: len(model.calls)]) == {"content_filter"}
    assert set(kinds[len(model.calls) :]) == {"budget"}


@pytest.mark.parametrize(
    ("code", "known"),
    [(400, True), (413, True), (429, True), (500, True), (503, True), (502, False), (504, False)],
)
def test_what_an_http_error_took_is_nothing_but_where_an_answer_may_be_lost(code, known):
    failed = failed_call(Status(code, "it broke", {}), "")
    assert failed.tokens == ((0, 0) if known else None)


@pytest.mark.parametrize("reply", [[], REFUSAL, {"choices": []}, {"usage": {"prompt_tokens": 3}}])
def test_what_a_reply_without_usage_took_is_unknown_and_counts_as_the_most(reply):
    with pytest.raises(CallFailed) as failed:
        answer_of(reply)
    assert failed.value.tokens is None
    journal, model = Journal(), Scripted(lambda call: answer_of(reply))
    settings = Settings(concurrency=1, max_attempts=1)
    run_tasks(TASK, rows(1), model, journal=journal, settings=settings)
    (cost,) = journal.costs()
    assert cost.unknown_calls == 1 and cost.unknown_tokens > 64 and cost.tokens == 0


@pytest.fixture
def turns(monkeypatch):
    """When each turn of the requests was taken; nobody waits for one."""
    taken = []

    class Pace:
        def __init__(self, per_minute, *, sleep):
            self._requests = per_minute == 600

        async def take(self, amount=1.0):
            if self._requests:
                taken.append(time.monotonic())

        def give_back(self, amount):
            pass

    monkeypatch.setattr(runner, "Pace", Pace)
    return taken


def test_rows_that_cannot_be_paid_for_take_no_turn(turns):
    model = Scripted(lambda call: GOOD)
    settings = Settings(budget_tokens=1000, requests_per_minute=600, concurrency=1)
    results = run_tasks(TASK, rows(60), model, settings=settings)
    assert 0 < len(model.calls) < 60 and sum(r.ok for r in results.values()) == len(model.calls)
    assert len(turns) == len(model.calls)


def test_turns_are_taken_after_a_pause_for_all_and_not_in_it(turns):
    starts, together = [], asyncio.Event()

    class Limited(Scripted):
        async def ask(self, call):
            starts.append(time.monotonic())
            if len(starts) > 3:
                return GOOD
            if len(starts) == 3:
                together.set()
            await together.wait()
            raise CallFailed(Failure("rate_limited", "slow down"), 0.1)

    settings = Settings(requests_per_minute=600, concurrency=3, backoff_s=0.01)
    results = run_tasks(TASK, rows(9), Limited(None), settings=settings)
    assert all(result.ok for result in results.values()) and len(starts) == 12
    over = starts[2] + 0.1
    assert min(starts[3:]) >= over
    assert sum(turn >= over for turn in turns) >= 9


def test_who_waits_for_a_turn_stops_at_once_and_stands_nowhere_as_asked():
    journal, model, began = Journal(), Scripted(lambda call: GOOD), time.monotonic()
    settings = Settings(requests_per_minute=1, concurrency=4)
    with pytest.raises(Stopped):
        run_tasks(TASK, rows(8), model, journal=journal, settings=settings, stop=lambda: True)
    assert time.monotonic() - began < settings.grace_s / 2
    assert sum(cost.calls for cost in journal.costs()) == len(model.calls) <= 1


def test_the_pause_is_what_the_server_asks_for_and_jitter_on_top():
    settings = Settings(backoff_s=1.0)
    pauses = {settings.backoff(f"row {i}", (), 4.0) for i in range(20)}
    assert len(pauses) == 20 and min(pauses) >= 4.5 and max(pauses) <= 5.0
    assert settings.backoff("row", (), 86400.0) <= 601.0
