"""An endpoint: keys that reach no file, schemas it may not take, refusals that mean all rows."""

import asyncio
import dataclasses
import json
import logging
import pickle
import time

import pytest
from pydantic import BaseModel
from small_task import FAST, TASK, Row, endpoint, rows

from jaxconv.errors import Refused
from jaxconv.llm import Journal, run_tasks
from jaxconv.llm.backends import openai as backend
from jaxconv.llm.backends.base import Call
from jaxconv.llm.backends.dialect import Dialect, Status, strict_schema
from jaxconv.llm.backends.openai import (
    OpenAI,
    answer_of,
    checked_url,
    only_model,
    retry_after,
)
from jaxconv.llm.failures import CallFailed

KEY = "sk-test-0123456789abcdefghij"


@pytest.mark.parametrize(
    ("place", "kind"), [("error", "refused_request"), ("answer", "invalid_json")]
)
def test_a_key_reaches_no_journal_error_or_log(serve, tmp_path, monkeypatch, caplog, place, kind):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(echo_key=place)  # what a server says may have the key in it
    with Journal(tmp_path / "journal.sqlite") as journal:
        results = run_tasks(TASK, rows(2), endpoint(server.url), journal=journal, settings=FAST)
    errors = [result.error for result in results.values()]
    assert {error.kind for error in errors} == {kind}
    # The server did say it.
    assert all("[API key]" in f"{error.message} {error.raw}" for error in errors)
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY.encode() not in files
    assert KEY not in caplog.text and KEY not in repr(results)


def test_a_wrong_key_ends_the_run_and_is_not_shown(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(key="another")
    with pytest.raises(Refused, match="does not take the API key") as refusal:
        run_tasks(TASK, rows(50), endpoint(server.url), settings=FAST)
    assert KEY not in str(refusal.value) and len(server.asked()) <= 50


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@host/v1", f"https://host/v1?api_key={KEY}", "localhost:8000"]
)
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(url):
    with pytest.raises(Refused) as refusal:
        checked_url(url)
    assert KEY not in str(refusal.value)


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_shown():
    with pytest.raises(Refused, match="must be the name of an environment variable") as refusal:
        OpenAI("m", base_url="http://host/v1", api_key_env=KEY)
    assert KEY not in str(refusal.value)


def test_without_a_key_there_is_no_provider():
    with pytest.raises(Refused, match="OPENAI_API_KEY is not set"):
        OpenAI("m")


def test_a_server_without_schemas_is_asked_for_text(serve):
    server = serve(no_schema=True)
    model = endpoint(server.url)
    assert all(result.ok for result in run_tasks(TASK, rows(40), model, settings=FAST).values())
    assert len(model.notes) == 1 and "takes no JSON schema" in model.notes[0]
    only = endpoint(server.url, structured="schema")
    result = run_tasks(TASK, {"x": Row(text="y")}, only, settings=FAST)["x"]
    assert result.error.kind == "refused_request"


def test_the_only_model_of_an_endpoint_is_found(serve):
    assert only_model(serve().url, "OPENAI_API_KEY") == "faulty"
    with pytest.raises(Refused, match=r"llm.model is not set; .* has one, two"):
        only_model(serve(models="two,one").url, "OPENAI_API_KEY")


def test_nobody_listens():
    model = endpoint("http://127.0.0.1:9/v1")
    result = run_tasks(TASK, {"x": Row(text="y")}, model, settings=FAST)["x"]
    assert (result.error.kind, result.error.message) == (
        "connection",
        "cannot connect to the endpoint",
    )


class Client:
    """In the place of the provider's: gives a text, or raises an error."""

    def __init__(self, said):
        self._said = said

    async def post(self, *args, **options):
        if isinstance(self._said, Exception):
            raise self._said
        return self._said


@pytest.mark.parametrize(
    ("said", "kind"),
    [("[" * 200_000, "server_error"), (ValueError(f"header {KEY}"), "backend_error")],
)
def test_a_reply_or_an_error_that_nobody_foresaw_is_its_call_s_alone(monkeypatch, said, kind):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model = endpoint("http://127.0.0.1:9/v1")
    model._client = Client(said)
    with pytest.raises(CallFailed) as failed:
        asyncio.run(model._post({}))
    failure = failed.value.failure
    assert failure.kind == kind and KEY not in str(failure)


def test_retry_after_in_all_its_forms():
    assert retry_after({"retry-after": "2"}) == 2.0
    assert retry_after({"retry-after-ms": "150", "retry-after": "9"}) == 0.15
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 27 <= retry_after({"retry-after": date}) <= 31
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
    assert (
        retry_after({"retry-after": "inf"}) is None and retry_after({"retry-after": "nan"}) is None
    )
    assert retry_after({"retry-after-ms": "nan", "retry-after": "3"}) == 3.0


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ([], "server_error"),
        ({"choices": []}, "no_answer"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "no_answer"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]},
         "content_filter"),
        ({"choices": [{"message": {"content": None, "refusal": "no"}}]}, "content_filter"),
    ],
)  # fmt: skip
def test_replies_without_an_answer(reply, kind):
    with pytest.raises(CallFailed) as failed:
        answer_of(reply)
    assert failed.value.failure.kind == kind
    assert json.loads(failed.value.failure.raw) == reply


def test_usage_that_is_not_told_is_unknown():
    reply = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
    assert answer_of(reply) == backend.Answer("x", True, None, None)


@pytest.mark.parametrize("told", [10**30, 2**32, True, 1.5, "7", -1])
def test_usage_that_cannot_be_is_unknown(told):
    reply = {"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": told}}
    assert answer_of(reply).input_tokens is None


class Inner(BaseModel):
    a: int = 1


class Outer(BaseModel):
    inner: Inner
    many: list[Inner]


class Free(BaseModel):
    names: dict[str, int]


def test_strict_schemas_close_every_object_and_leave_free_ones():
    before = pickle.dumps(Outer.model_json_schema())
    schema, strict = strict_schema(Outer.model_json_schema())
    assert strict and pickle.dumps(Outer.model_json_schema()) == before
    for part in (schema, schema["$defs"]["Inner"]):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
    assert "default" not in schema["$defs"]["Inner"]["properties"]["a"]
    assert strict_schema(Free.model_json_schema()) == (Free.model_json_schema(), False)


class Awkward(BaseModel):
    default: str
    type: str
    plain: int = 3


def test_a_property_may_have_the_name_of_a_word_of_json_schema():
    schema, strict = strict_schema(Awkward.model_json_schema())
    assert strict and list(schema["properties"]) == ["default", "type", "plain"]
    assert schema["required"] == ["default", "type", "plain"]
    assert "default" not in schema["properties"]["plain"]


class Picky(OpenAI):
    """An endpoint that says no, in the words of `nos`, to bodies with the parameter they name."""

    def __init__(self, *nos):
        super().__init__("picky", base_url="http://host/v1")
        self.nos, self.sent = nos, []

    async def _post(self, body):
        self.sent.append(body)
        for name, error in self.nos:
            if name in body:
                raise Status(400, {"error": error}, {})
        message = {"content": '{"label": "a", "score": 1}'}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}


NO_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0.0 with this model. Only the "
    "default (1) value is supported.",
    "param": "temperature",
    "code": "unsupported_value",
}
NOT_BOTH = {"message": "`temperature` and `top_p` cannot both be specified for this model."}


@pytest.mark.parametrize(
    ("nos", "left"),
    [
        ([("temperature", NO_TEMPERATURE)], {"top_p"}),
        ([("top_p", NOT_BOTH)], {"temperature"}),
        ([("temperature", NO_TEMPERATURE), ("top_p", {"message": "unknown field: top_p"})], set()),
    ],
)
def test_a_model_that_takes_no_parameter_of_sampling_is_asked_without_it(nos, left):
    model = Picky(*nos)
    results = run_tasks(TASK, rows(8), model, settings=FAST)
    assert all(result.ok for result in results.values())
    assert {"temperature", "top_p"} & set(model.sent[-1]) == left
    assert len(model.notes) == len(nos)
    assert all("takes no" in note and "for picky" in note for note in model.notes)


def test_a_no_to_one_call_leaves_the_parameters_of_sampling_to_the_others():
    model = Picky(("messages", {"message": "cannot read 'the temperature, the schema'"}))
    result = run_tasks(TASK, rows(1), model, settings=FAST)["row-00000"]
    assert (result.error.kind, model.notes) == ("refused_request", [])
    model.nos = ()
    assert run_tasks(TASK, rows(1), model, settings=FAST)["row-00000"].ok
    assert {"temperature", "top_p", "response_format"} <= set(model.sent[-1])


def test_the_seed_goes_out_with_a_temperature_and_unless_it_is_refused():
    warm = dataclasses.replace(TASK, temperature=0.7)
    request = warm.request(Row(text="x"), model="m", sample=3)
    call = Call(warm, Row(text="x"), request, request.messages, 64, 0)
    assert Dialect().body(call)["seed"] == 3
    assert "seed" not in Dialect(without=frozenset({"seed"})).body(call)


@pytest.mark.parametrize("key", [KEY + "\n", "\u201c" + KEY + "\u201d", KEY + "\t"])
def test_a_key_that_no_header_can_hold_is_refused_by_its_variable(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Refused, match="environment variable OPENAI_API_KEY") as refusal:
        OpenAI("m")
    assert KEY not in str(refusal.value)
