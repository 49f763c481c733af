"""A provider's batch API: nothing is paid for twice, and what went wrong is said."""

import json
import time
from types import SimpleNamespace

import openai
import pytest
from small_task import TASK, rows

from jaxconv.errors import Failed, Stopped
from jaxconv.llm import Journal, Settings, run_tasks
from jaxconv.llm.backends import batch as module
from jaxconv.llm.backends.batch import OpenAIBatch

GOOD = {
    "choices": [
        {"message": {"content": '{"label": "a", "score": 1}'}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 50, "completion_tokens": 5},
}
LOST = openai.APIConnectionError(request=None)


class Provider:
    """Files and batches in this process, in the place of the client.

    Attributes:
        sent: the bytes of each file.
        batches: the file of each batch that was made.
        trouble: what is raised in place of telling of the next batches, made all the same.
        open: whether batches go on without an end.
        lists: whether they are listed.
        refuses: the parameters that a call may not have.
        line: what an output file says of a call.
        about: a batch that is over.
    """

    def __init__(self, monkeypatch):
        self.sent, self.batches, self.trouble, self.open = {}, [], [], False
        self.line = {"response": {"status_code": 200, "body": GOOD}}
        self.about = {"status": "completed", "error_file_id": None, "errors": None}
        self.lists, self.refuses = True, ()
        self.batch_calls = SimpleNamespace(
            create=self.create_batch, retrieve=self.retrieve, list=self.list_batches
        )
        client = SimpleNamespace(files=self, batches=self.batch_calls, close=self.close)
        monkeypatch.setattr(module, "make_client", lambda *of: client)

    async def close(self):
        pass

    async def create(self, *, file, purpose):
        name = f"file-{len(self.sent)}"
        self.sent[name] = file[1]
        return SimpleNamespace(id=name)

    async def create_batch(self, *, input_file_id, endpoint, completion_window):
        self.batches.append(input_file_id)
        if self.trouble and (trouble := self.trouble.pop(0)) is not None:
            raise trouble
        return SimpleNamespace(id=f"batch-{len(self.batches) - 1}")

    async def list_batches(self, *, limit):
        if not self.lists:
            response = SimpleNamespace(status_code=404, headers={}, request=None)
            raise openai.NotFoundError("no such path", response=response, body=None)
        for number, file in reversed(list(enumerate(self.batches))):
            yield SimpleNamespace(
                id=f"batch-{number}", input_file_id=file, created_at=int(time.time())
            )

    async def retrieve(self, batch):
        if self.open:
            return SimpleNamespace(status="in_progress")
        file = self.batches[int(batch.removeprefix("batch-"))]
        about = {"output_file_id": file} | self.about
        return SimpleNamespace(**about)

    def answer(self, body):
        name = next((name for name in self.refuses if name in body), None)
        if name is None:
            return self.line
        said = {"message": f"Unsupported value: '{name}'", "param": name}
        return {"response": {"status_code": 400, "body": {"error": said}}}

    async def content(self, file):
        calls = [json.loads(line) for line in self.sent[file].splitlines()]
        lines = [
            json.dumps({"custom_id": call["custom_id"]} | self.answer(call["body"]))
            for call in calls
        ]
        return SimpleNamespace(text="\n".join(lines))


@pytest.fixture
def provider(monkeypatch):
    return Provider(monkeypatch)


def backend(tmp_path, **options) -> OpenAIBatch:
    return OpenAIBatch(
        "m",
        base_url="http://host/v1",
        state=tmp_path / "batches.jsonl",
        linger_s=0.005,
        poll_s=0.005,
        **options,
    )


QUICK = Settings(concurrency=100, backoff_s=0.001, max_attempts=2, grace_s=0.0)


def test_a_batch_of_which_nobody_heard_that_it_was_made_is_not_made_again(provider, tmp_path):
    provider.trouble = [LOST]
    with Journal() as journal:
        results = run_tasks(TASK, rows(5), backend(tmp_path), journal=journal, settings=QUICK)
        assert all(r.ok and r.attempts == 1 for r in results.values())
        assert len(provider.batches) == 1
        (cost,) = journal.costs()
        assert (cost.calls, cost.tokens, cost.unknown_calls) == (5, 5 * 55, 0)


def test_a_kill_between_making_a_batch_and_writing_it_down_makes_no_second_one(provider, tmp_path):
    provider.trouble = [KeyboardInterrupt()]
    with Journal() as journal:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(TASK, rows(5), backend(tmp_path), journal=journal, settings=QUICK)
        results = run_tasks(TASK, rows(5), backend(tmp_path), journal=journal, settings=QUICK)
        assert all(r.ok for r in results.values()) and len(provider.batches) == 1
        (cost,) = journal.costs()
        assert (cost.calls, cost.tokens, cost.unknown_calls) == (5, 5 * 55, 0)


def test_a_kill_before_a_batch_is_made_leaves_its_calls_to_the_next_run(provider, tmp_path):
    provider.trouble = [KeyboardInterrupt()]
    with Journal() as journal:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(TASK, rows(5), backend(tmp_path), journal=journal, settings=QUICK)
        provider.batches.clear()
        results = run_tasks(TASK, rows(5), backend(tmp_path), journal=journal, settings=QUICK)
        assert all(r.ok for r in results.values()) and provider.batches == ["file-1"]


def test_a_batch_that_is_found_again_takes_nothing_more_out_of_the_budget(provider, tmp_path):
    provider.open = True
    settings = Settings(concurrency=100, grace_s=0.0, budget_tokens=20_000)
    with Journal() as journal:
        for _ in range(2):
            with pytest.raises(Stopped):
                run_tasks(
                    TASK,
                    rows(20),
                    backend(tmp_path),
                    journal=journal,
                    settings=settings,
                    stop=lambda: bool(provider.batches),
                )
        (cost,) = journal.costs()
        assert cost.calls == cost.unknown_calls == 20 and 10_000 < cost.unknown_tokens < 20_000
        provider.open = False
        results = run_tasks(TASK, rows(20), backend(tmp_path), journal=journal, settings=settings)
        assert all(r.ok for r in results.values()) and len(provider.batches) == 1
        (cost,) = journal.costs()
        assert (cost.calls, cost.tokens, cost.unknown_calls) == (20, 20 * 55, 0)


def test_an_endpoint_that_takes_no_batch_ends_the_run_and_no_row(provider, tmp_path):
    provider.trouble = [LOST] * 10
    provider.batch_calls.list = lambda limit: nowhere()
    with Journal() as journal:
        with pytest.raises(Failed, match=r"takes no batch .* the same command goes on"):
            run_tasks(TASK, rows(3), backend(tmp_path), journal=journal, settings=QUICK)
        assert len(provider.batches) == 1
        provider.batch_calls.list = provider.list_batches
        results = run_tasks(TASK, rows(3), backend(tmp_path), journal=journal, settings=QUICK)
        assert all(r.ok for r in results.values()) and len(provider.batches) == 1


async def nowhere():
    raise LOST
    yield


def test_an_endpoint_that_lists_no_batches_is_asked_again_and_a_note_says_so(provider, tmp_path):
    provider.trouble, provider.lists = [LOST], False
    model = backend(tmp_path)
    assert all(r.ok for r in run_tasks(TASK, rows(3), model, settings=QUICK).values())
    assert len(provider.batches) == 2 and "paid for twice" in model.notes[0]


def test_why_a_batch_failed_is_said(provider, tmp_path):
    error = SimpleNamespace(
        model_dump=lambda: {"code": "token_limit_exceeded", "message": "too many", "line": None}
    )
    provider.about = {
        "status": "failed",
        "output_file_id": None,
        "error_file_id": None,
        "errors": SimpleNamespace(data=[error]),
    }
    with Journal() as journal:
        model = backend(tmp_path)
        result = run_tasks(TASK, rows(1), model, journal=journal, settings=QUICK)["row-00000"]
        assert result.error.kind == "server_error" and result.attempts == 2
        assert "batch-1 failed: token_limit_exceeded: too many" in result.error.message
        (cost,) = journal.costs()
        assert (cost.tokens, cost.unknown_calls) == (0, 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"response": None, "error": {"code": "batch_expired", "message": "too late"}},
         "batch_expired: too late"),
        ({"response": None, "error": None}, "it does not say why"),
        ({"response": {"status_code": 500, "body": {"error": {"message": "broken"}}}},
         "HTTP 500: broken"),
    ],
)  # fmt: skip
def test_why_a_call_of_a_batch_failed_is_said(provider, tmp_path, line, said):
    provider.line = line
    result = run_tasks(TASK, rows(1), backend(tmp_path), settings=QUICK)["row-00000"]
    assert result.error.kind == "server_error" and said in result.error.message


def test_what_a_model_does_not_take_is_left_out_of_the_next_batch(provider, tmp_path):
    provider.refuses = "temperature", "top_p"
    model = backend(tmp_path)
    with Journal() as journal:
        results = run_tasks(TASK, rows(5), model, journal=journal, settings=QUICK)
        assert all(r.ok and r.attempts == 1 for r in results.values())
    assert len(provider.batches) == 3 and len(model.notes) == 2
    # A run that has lost its journal finds all three, and what is new costs no round more.
    again = backend(tmp_path)
    assert all(r.ok for r in run_tasks(TASK, rows(5), again, settings=QUICK).values())
    assert len(provider.batches) == 3
    assert all(r.ok for r in run_tasks(TASK, rows(9), model, settings=QUICK).values())
    assert len(provider.batches) == 4
    # Nor does it matter in which dialect an earlier run began with a row.
    assert all(r.ok for r in run_tasks(TASK, rows(9), again, settings=QUICK).values())
    assert len(provider.batches) == 4


def test_no_batch_has_more_bytes_than_a_provider_takes(provider, tmp_path):
    whole = backend(tmp_path)
    run_tasks(TASK, rows(8), whole, settings=QUICK)
    (content,) = provider.sent.values()
    provider.sent.clear()
    provider.batches.clear()
    (tmp_path / "batches.jsonl").unlink()
    size = len(content) // 3
    results = run_tasks(TASK, rows(8), backend(tmp_path, size=size), settings=QUICK)
    assert all(r.ok for r in results.values()) and len(provider.batches) == 4
    assert all(len(part) <= size for part in provider.sent.values())
    assert sorted(b"".join(provider.sent.values()).splitlines()) == sorted(content.splitlines())


def test_the_client_finds_a_batch_whose_reply_was_cut(serve, tmp_path):
    server = serve(lose_batch=True)
    model = OpenAIBatch(
        "faulty", base_url=server.url, state=tmp_path / "state", linger_s=0.02, poll_s=0.05
    )
    results = run_tasks(TASK, rows(3), model, settings=QUICK)
    assert all(r.ok and r.attempts == 1 for r in results.values()) and len(server.asked()) == 3
