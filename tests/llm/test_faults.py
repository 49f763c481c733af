"""Every fault ends in a value or a typed error, once; a kill at any moment changes nothing."""

import collections

import pytest
from disturbance import kill_and_resume
from fault_server import FAULTS, digest, fault_of, good
from small_task import FAST, TASK, Answer, endpoint, rows, words

from jaxconv.llm import run_tasks

KINDS = {
    "rate_limited": "rate_limited",
    "status_500": "server_error",
    "status_503": "server_error",
    "timeout": "timeout",
    "cut_connection": "connection",
    "truncated_json": "truncated",
    "wrong_schema": "wrong_schema",
    "outside_label": "outside_labels",
    "empty_choices": "no_answer",
    "oversized": "oversized",
}


def expected(row, rate: float) -> str | Answer:
    """The kind of error, or the value, that a row must end with."""
    fault, over = fault_of(words(row), 0, rate)
    if not fault or fault == "slow_first_byte" or over is not None:
        return Answer(**good(words(row)))
    return KINDS[fault]


def of_each_fault(rate: float, permanent: int, passing: int) -> dict:
    """Rows so that each fault comes so often, and as many rows without one."""
    wanted = {(fault, over): n for fault in FAULTS for over, n in ((None, permanent), (1, passing))}
    wanted["", 0] = 10
    out = {}
    for id, row in rows(20_000).items():
        kind = fault_of(words(row), 0, rate)
        if wanted.get(kind, 0):
            wanted[kind] -= 1
            out[id] = row
        if not any(wanted.values()):
            return out
    raise AssertionError(f"no rows for {wanted}")


def test_each_fault_ends_once_as_value_or_typed_error(serve):
    rate = 0.05
    inputs = of_each_fault(rate, permanent=1, passing=1)
    server = serve(rate=rate)
    seen = []
    results = run_tasks(
        TASK, inputs, endpoint(server.url), settings=FAST, on_result=lambda r: seen.append(r.id)
    )
    assert list(results) == list(inputs) and sorted(seen) == sorted(inputs)
    got = {id: r.error.kind if r.error else r.value for id, r in results.items()}
    assert got == {id: expected(row, rate) for id, row in inputs.items()}
    for id, result in results.items():
        assert (result.value is None) == (result.error is not None), id
        if result.error and result.error.kind in ("truncated", "wrong_schema", "outside_labels"):
            assert result.error.raw.startswith('{"label"')
    counts = collections.Counter(server.asked())
    for id, row in inputs.items():
        fault, over = fault_of(words(row), 0, rate)
        calls = 1 if not fault or fault == "slow_first_byte" else 3 if over is None else 2
        assert counts[digest(words(row))] == calls, (id, fault)


def test_a_kill_loses_nothing_and_asks_for_nothing_twice(serve, tmp_path):
    kill_and_resume(serve, tmp_path, n=120, rate=0.04, timeout=1.0, kills=1, seed=1)


@pytest.mark.slow
def test_three_kills_lose_nothing(serve, tmp_path):
    kill_and_resume(serve, tmp_path, n=1000, rate=0.05, timeout=3.0, kills=3, seed=2)
