"""Rows divided among workers of which one is lost with all that it knew: caps hold, also in the
next run. The nodes are stand-ins, so no cluster is needed."""

import asyncio
import dataclasses
import functools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from small_task import FAST, TASK, rows

from jaxconv.errors import Failed
from jaxconv.llm import Journal, merge_journals, ray_executor, ray_worker, run_tasks
from jaxconv.llm.backends import base
from jaxconv.llm.failures import CallFailed, Failure
from jaxconv.llm.journal import Outcome
from jaxconv.llm.ray_nodes import Nodes

RAY = dataclasses.replace(FAST, executor="ray", workers=2)
TOKENS = 770  # of an answer: nearly all of the 779 that are reserved for it
BUDGET = 25 * TOKENS


class Priced:
    """Counts what it is asked for."""

    model, is_model, price = "priced", True, None

    def __init__(self):
        self.asked = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        self.asked.append(call.request.key)
        return base.Answer('{"label": "a", "score": 1}', False, TOKENS - 64, 64)


class Refusing(Priced):
    async def ask(self, call):
        raise CallFailed(Failure("refused_request", "no"), tokens=(0, 0))


class Handle:
    """An actor in this process."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._actor, name))


class NodesOfOneProcess(Nodes):
    """Asks for one share after the other.

    Args:
        lost: the share whose journal is lost.
        found: whether it is on some node after all.
        error: what ends the run after that.
    """

    def __init__(self, ray, journal, *, folder, lost=None, found=False, error=None):
        super().__init__(ray, journal)
        self._folder, self._lost, self._found, self._error = folder, lost, found, error

    def alive(self):
        return ["one", "other"]

    def prepare(self, backend):
        pass

    def _gather(self, backend=None):
        if self._lost is None or not self._found:
            return set()
        merge_journals([self._folder / f"share-{self._lost}.sqlite"], self._journal)
        return {self._lost}

    def _on(self, node, what, **options):
        return SimpleNamespace(remote=lambda: Handle(what()))

    def _rows(self, shares, control):
        for share in shares:
            path = self._folder / f"share-{share.number}.sqlite"
            control.begin.remote(share.number)
            with Journal(path) as journal:
                run_tasks(
                    share.task,
                    share.rows,
                    share.backend,
                    journal=journal,
                    settings=share.settings,
                    on_result=lambda result: control.report.remote(
                        [dataclasses.replace(result, value=None)]
                    ),
                )
            lost = share.number == self._lost
            if lost and self._error:
                raise self._error
            part = b"" if lost or not path.exists() else path.read_bytes()
            ended = ray_worker.LOST if lost else ""
            yield {"number": share.number, "ended": ended, "message": "", "at": 0, "part": part}


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """`nodes(**options)` makes runs with `executor=ray` use `NodesOfOneProcess` with these."""

    @contextmanager
    def cluster(workers):
        yield SimpleNamespace(
            cluster_resources=lambda: {"CPU": 2},
            exceptions=SimpleNamespace(RayError=ConnectionError),
            get=lambda value: value,
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "one"),
        )

    monkeypatch.setattr(ray_executor, "cluster", cluster)
    runs = iter(range(9))

    def use(**options):
        folder = tmp_path / f"nodes-{next(runs)}"
        folder.mkdir()
        made = functools.partial(NodesOfOneProcess, folder=folder, **options)
        monkeypatch.setattr(ray_executor, "Nodes", made)

    return use


def attempted(journal, ids):
    """One attempt that counts at each of these rows."""

    async def add():
        for id in ids:
            request = TASK.request(TASK.typed(rows(100)[id]), model=Priced.model, sample=0)
            version = TASK.prompt.version
            number = await journal.begin(
                TASK.name, version, request, max_tokens=1, tokens=1, usd=0.0
            )
            failed = Outcome("{", None, Failure("invalid_json", "cut", "{"), 0, 0, 0.0)
            await journal.end(request.key, number, failed, give_up=False)

    asyncio.run(add())


@pytest.mark.parametrize("begun", [0, 30])
@pytest.mark.parametrize("error", [None, Failed("on a Ray node: it died")])
def test_what_a_lost_share_may_have_spent_counts_from_then_on(begun, error, nodes, tmp_path):
    backend = Priced()
    settings = dataclasses.replace(RAY, budget_tokens=BUDGET)
    with Journal(tmp_path / "journal.sqlite") as journal:
        attempted(journal, list(rows(begun)))
        nodes(lost=0, error=error)
        if error:
            with pytest.raises(Failed, match="it died"):
                run_tasks(TASK, rows(100), backend, journal=journal, settings=settings)
        else:
            run_tasks(TASK, rows(100), backend, journal=journal, settings=settings)
        assert BUDGET / 3 < len(backend.asked) * TOKENS <= BUDGET
    with Journal(tmp_path / "journal.sqlite") as journal:
        nodes()
        results = run_tasks(TASK, rows(100), backend, journal=journal, settings=settings)
        (cost,) = journal.costs()
        assert cost.unknown_tokens == BUDGET // 2 and cost.unknown_calls == 1
    assert len(backend.asked) * TOKENS <= BUDGET
    assert {r.error.kind for r in results.values() if r.error} == {"budget"}


def test_a_share_whose_journal_is_found_counts_as_what_it_took(nodes):
    backend = Priced()
    settings = dataclasses.replace(RAY, budget_tokens=BUDGET)
    with Journal() as journal:
        nodes(lost=0, found=True)
        run_tasks(TASK, rows(100), backend, journal=journal, settings=settings)
        (cost,) = journal.costs()
    assert cost.unknown_calls == 0
    assert cost.tokens == len(backend.asked) * TOKENS > 0.9 * BUDGET


@pytest.mark.parametrize("affordable", [0, 1, 9])
def test_a_row_that_was_given_up_and_its_share_cannot_pay_for_is_asked_again(affordable, nodes):
    inputs = rows(4) | {"twin": rows(4)["row-00000"]}
    found = []
    for executor in ("local", "ray"):
        nodes()
        with Journal() as journal:
            run_tasks(TASK, inputs, Refusing(), journal=journal, settings=FAST)
            backend = Priced()
            backend.model = Refusing.model
            results = run_tasks(
                TASK,
                inputs,
                backend,
                journal=journal,
                settings=dataclasses.replace(
                    RAY, executor=executor, concurrency=2, budget_tokens=affordable * 780 or 9
                ),
                retry_failed=True,
            )
        found.append([(id, r.value, r.error and r.error.kind) for id, r in results.items()])
        assert len(backend.asked) == min(affordable, 4)
    assert found[0] == found[1]
