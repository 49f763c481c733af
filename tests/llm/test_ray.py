"""The executor `ray`: the same results as one process, whatever happens to workers."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from disturbance import finished_rows
from fault_server import digest, good
from hypothesis import given
from hypothesis import strategies as st
from small_task import FAST, TASK, Answer, endpoint, rows, words

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.llm import Journal, Settings, run_tasks
from jaxconv.llm.artifact import write_results
from jaxconv.llm.backends import base
from jaxconv.llm.backends.openai import OpenAI
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.ray_executor import divided

KEY, OTHER_KEY = "JAXCONV_TEST_KEY", "JAXCONV_OTHER_TEST_KEY"
SECRET = "secret-of-the-ray-tests-0123456789"
RAY = dataclasses.replace(FAST, executor="ray", workers=2, timeout_s=3.0)


@pytest.fixture(scope="module")
def short_folder():
    """Ray's sockets are in it, whose paths have 107 characters at most."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(short_folder):
    """A cluster of this machine, whose processes have KEY and not OTHER_KEY; its folder."""
    pytest.importorskip("ray", reason="ray is not installed")
    from jaxconv.llm.ray_nodes import cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, SECRET)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("TMPDIR", str(short_folder / "nodes"))
        (short_folder / "nodes").mkdir()
        with cluster(2) as ray:
            yield Path(ray._private.worker._global_node.get_session_dir_path())


def digest_of(row) -> str:
    return digest(words(row))


def workers() -> list[int]:
    """Process ids of the workers of clusters that this process has."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        if command.startswith(b"ray::") and b"Worker" in command:
            found.append(int(folder.name))

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid in found if ours(pid)]


@pytest.mark.slow
def test_a_worker_is_killed_and_the_artifact_is_that_of_one_process(serve, cluster, tmp_path):
    calm, rough = serve(rate=0.03, latency=0.2), serve(rate=0.03, latency=0.2)
    settings = dataclasses.replace(RAY, executor="local")
    results = run_tasks(TASK, rows(300), endpoint(calm.url), settings=settings)
    write_results(tmp_path / "calm", TASK, "faulty", results)

    killed = []

    def kill() -> None:
        while len(rough.asked()) < 60:
            time.sleep(0.01)
        os.kill(workers()[0], signal.SIGKILL)
        journals = Path(os.environ["TMPDIR"]).glob("jaxconv-*/*/share-*.sqlite")
        time.sleep(0.3)  # what was on its way gets to the server
        at = len(rough.asked())
        killed.append((set().union(*map(finished_rows, journals)), at))

    killer = threading.Thread(target=kill)
    killer.start()
    with Journal(tmp_path / "journal.sqlite") as journal:
        results = run_tasks(TASK, rows(300), endpoint(rough.url), journal=journal, settings=RAY)
        costs = journal.costs()
    killer.join()
    write_results(tmp_path / "rough", TASK, "faulty", results)
    assert (tmp_path / "rough").read_bytes() == (tmp_path / "calm").read_bytes()
    ((done, at),) = killed
    asked = rough.asked()
    assert len(asked) > len(calm.asked())  # something was interrupted, and asked again
    assert sum(cost.calls for cost in costs) >= len(asked)  # and stands in the journal
    assert done and not done & set(asked[at:])


@pytest.mark.slow
def test_a_node_without_the_key_is_named_before_anything_is_asked(serve, cluster, monkeypatch):
    server = serve(key="a-key-that-only-one-side-has")
    monkeypatch.setenv(OTHER_KEY, "a-key-that-only-one-side-has")
    model = endpoint(server.url, api_key_env=OTHER_KEY)
    with pytest.raises(Refused, match=f"Ray node .*{OTHER_KEY} is not set"):
        run_tasks(TASK, rows(4), model, settings=RAY)
    assert not server.asked()


@pytest.mark.slow
def test_keys_come_from_the_environment_and_are_written_nowhere(
    serve, cluster, tmp_path, monkeypatch
):
    server = serve(key=SECRET)
    monkeypatch.setenv(KEY, SECRET)
    model = endpoint(server.url, api_key_env=KEY)
    with Journal(tmp_path / "journal.sqlite") as journal:
        results = run_tasks(TASK, rows(20), model, journal=journal, settings=RAY)
    assert all(result.ok for result in results.values())
    places = (cluster, tmp_path, Path(os.environ["TMPDIR"]))
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_what_ends_a_run_on_a_worker_ends_it_here(serve, cluster, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    refusing = serve(key=SECRET, revoke_after=10)
    with pytest.raises(Refused, match="does not take the API key"):
        run_tasks(TASK, rows(200), endpoint(refusing.url, api_key_env=KEY), settings=RAY)
    failing = serve(rate=1 / 11)
    strict = dataclasses.replace(RAY, max_failure_rate=0.1, max_attempts=1)
    with pytest.raises(Failed, match=r"rows failed \(.*llm.max_failure_rate=0.1 allows fewer"):
        run_tasks(TASK, rows(400), endpoint(failing.url), settings=strict)
    assert len(failing.asked()) < 400
    with pytest.raises(Refused, match="workers=9; the Ray cluster has 2 CPUs"):
        run_tasks(
            TASK, rows(4), endpoint(failing.url), settings=dataclasses.replace(RAY, workers=9)
        )


@pytest.mark.slow
def test_stopping_keeps_every_answer_and_one_process_goes_on(serve, cluster, tmp_path):
    server = serve(latency=0.1)
    with Journal(tmp_path / "journal.sqlite") as journal:
        with pytest.raises(Stopped, match="every answer is in the journal"):
            run_tasks(
                TASK,
                rows(2000),
                endpoint(server.url),
                journal=journal,
                settings=RAY,
                stop=lambda: len(server.asked()) > 50,
            )
        before = server.asked()
        settings = dataclasses.replace(RAY, executor="local", concurrency=200)
        told = []
        results = run_tasks(
            TASK,
            rows(2000),
            endpoint(server.url),
            journal=journal,
            settings=settings,
            on_result=lambda r: told.append(r.attempts),
        )
    assert all(result.ok for result in results.values())
    assert len(before) < 2000 and sorted(server.asked()) == sorted(
        map(digest_of, rows(2000).values())
    )
    assert told.count(0) == len(before)


@pytest.mark.slow
def test_all_workers_together_keep_to_the_limits(serve, cluster):
    server = serve(latency=0.3)
    settings = dataclasses.replace(RAY, concurrency=5, requests_per_minute=600)
    live = []
    began = time.time()
    with Journal() as journal:
        results = run_tasks(
            TASK,
            rows(60),
            endpoint(server.url),
            journal=journal,
            settings=settings,
            on_result=lambda r: live.append((r.id, time.time())),
        )
    assert server.stats()["most_active"] <= 5
    times = sorted(json.loads(line)["time"] for line in server.log.read_text().splitlines())
    assert times[-1] - times[0] >= (60 - 2) / 10 - 1  # ten a second, and each worker begins at once
    assert sorted(results) == sorted(id for id, _ in live)
    assert live[0][1] < live[-1][1] - 3  # told while the run goes on
    assert all(r.attempts == 1 and r.value == Answer(**good(words(rows(60)[r.id])))
               for r in results.values())  # fmt: skip
    assert time.time() - began < 60


@pytest.mark.slow
def test_all_workers_together_keep_to_the_budget_and_spend_it(serve, cluster):
    server = serve()
    with Journal() as journal:
        one = run_tasks(TASK, rows(1), endpoint(server.url), journal=journal, settings=FAST)
        assert one["row-00000"].tokens == 60
        settings = dataclasses.replace(RAY, budget_tokens=60 * 40)
        results = run_tasks(
            TASK, rows(100), endpoint(server.url), journal=journal, settings=settings
        )
        (cost,) = journal.costs()
        alone = run_tasks(
            TASK,
            rows(100),
            endpoint(server.url),
            journal=journal,
            settings=dataclasses.replace(settings, executor="local"),
        )
    assert cost.tokens <= 60 * 40
    assert {r.error.kind for r in results.values() if r.error} == {"budget"}
    # As much as one process would: nothing more is affordable.
    assert [r.ok for r in alone.values()] == [r.ok for r in results.values()]


PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from test_ray import RAY
from small_task import *
with Journal({journal!r}) as journal:
    results = run_tasks(TASK, rows(600), endpoint({url!r}), journal=journal, settings=RAY)
write_results(Path({out!r}), TASK, "faulty", results)
"""


@pytest.mark.slow
def test_what_a_killed_run_left_on_the_nodes_is_not_asked_again(
    serve, short_folder, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="ray is not installed")
    server, nodes = serve(latency=0.5), short_folder / "killed"
    nodes.mkdir()
    monkeypatch.setenv("TMPDIR", str(nodes))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    journal, out = tmp_path / "journal.sqlite", tmp_path / "out"
    code = PROGRAM.format(
        here=str(Path(__file__).parent), journal=str(journal), url=server.url, out=str(out)
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command)
    while len(server.asked()) < 100 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.wait()
    time.sleep(3.0)  # its cluster ends with it
    left = list(nodes.glob("jaxconv-*/*/share-*.sqlite"))
    done, at = set().union(*map(finished_rows, left)), len(server.asked())
    assert len(done) > 30 and at < 600
    subprocess.run(command, check=True, timeout=300)
    again = server.asked()[at:]
    assert not done & set(again) and set(again) | done == set(map(digest_of, rows(600).values()))
    assert len(out.read_text().splitlines()) == 600
    assert not list(nodes.glob("jaxconv-*/*"))


@pytest.mark.slow
def test_a_budget_holds_when_a_node_is_lost_with_what_it_knew(serve, short_folder, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.delenv("TMPDIR", raising=False)
    server, budget = serve(latency=0.3, key=SECRET), 60 * 250
    (short_folder / "two").mkdir()
    program = Path(__file__).with_name("two_nodes.py")
    command = [sys.executable, program, short_folder / "two", server.url, server.log, str(budget)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200).stdout
    both, after, kinds, said = json.loads(out.splitlines()[-1])
    assert both == 100 and 40 <= after < 250 and kinds == ["budget"]
    assert 60 * (len(server.asked()) - 100) <= budget
    assert "Ray node" in said and f"{KEY} is not set" in said


# ---------------------------------------------------------------- without a cluster


def test_a_backend_travels_without_its_key(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    model = OpenAI("m", base_url="http://127.0.0.1:1/v1", api_key_env=KEY)
    model._client = threading.RLock()  # as it has one when it was used, which does not pickle
    pickled = pickle.dumps(model)
    assert SECRET.encode() not in pickled and pickle.loads(pickled).key == SECRET
    monkeypatch.delenv(KEY)
    with pytest.raises(Refused, match=f"environment variable {KEY} is not set"):
        pickle.loads(pickled)
    keyless = OpenAI("m", base_url="http://127.0.0.1:1/v1", api_key_env=KEY)
    assert pickle.loads(pickle.dumps(keyless)).key == ""


def test_ray_is_named_where_it_is_missing_and_not_imported_before(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refused, match=r"pip install 'jaxconv\[ray\]'"):
        run_tasks(TASK, rows(1), endpoint("http://127.0.0.1:1/v1"), settings=RAY)
    with pytest.raises(Refused, match="'rules', which asks no model"):
        run_tasks(TASK, rows(1), Rules(), settings=RAY)
    code = "import sys, jaxconv.llm.ray_executor; print('ray' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@given(
    workers=st.integers(1, 9),
    concurrency=st.integers(9, 99),
    per_minute=st.floats(0, 1e4),
    usd=st.sampled_from([0.0, 1e-3, 0.4, 7.0]),
    tokens=st.integers(0, 10_000),
)
def test_the_parts_of_limits_add_up_to_no_more_than_the_whole(
    workers, concurrency, per_minute, usd, tokens
):
    whole = Settings(
        concurrency=concurrency,
        requests_per_minute=per_minute,
        tokens_per_minute=2 * per_minute,
        budget_usd=usd,
        budget_tokens=tokens,
    )
    with Journal() as journal:
        parts = divided(whole, journal, workers)
    assert len(parts) == (0 if tokens and tokens < workers else workers)
    for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
        total = sum(getattr(part, name) for part in parts)
        assert total == pytest.approx(getattr(whole, name) if parts else 0)
    for name in ("budget_usd", "budget_tokens"):
        limited = [getattr(part, name) > 0 for part in parts]
        assert limited == [getattr(whole, name) > 0] * len(parts)  # 0 would be no limit at all
        assert sum(getattr(part, name) for part in parts) <= getattr(whole, name) * (1 + 1e-9)


def test_what_was_spent_is_not_divided(tmp_path):
    with Journal() as journal:
        run_tasks(TASK, rows(3), Counted(), journal=journal, settings=FAST)
        (part, _) = divided(Settings(budget_tokens=100), journal, 2)
        assert part.budget_tokens == (100 - 3 * 10) // 2
        assert divided(Settings(budget_tokens=30), journal, 2) == []


class Counted:
    """Ten tokens an answer."""

    model, is_model, price = "counted", True, None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        return base.Answer('{"label": "a", "score": 1}', False, 6, 4)
