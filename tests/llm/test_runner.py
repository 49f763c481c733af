"""What the requirements do not name: imports, settings, journals in use, stopping."""

import asyncio
import dataclasses
import functools
import json
import math
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from pydantic import BaseModel, field_validator
from small_task import TASK, Row, rows

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.llm import Journal, Prompt, Result, Settings, run_tasks
from jaxconv.llm.answers import parse
from jaxconv.llm.artifact import write_results
from jaxconv.llm.backends.base import Answer, Call
from jaxconv.llm.backends.dialect import Dialect
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.failures import CallFailed, Failure, InvalidAnswer
from jaxconv.llm.prices import FREE, Price, price_of

GOOD = '{"label": "a", "score": 1}'


def test_tasks_need_neither_jax_nor_a_client():
    code = (
        "import sys, jaxconv.llm.section, jaxconv.llm.task_file, jaxconv.llm.artifact\n"
        "print(sorted({'jax', 'openai', 'aiohttp', 'sklearn', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("['numpy']", "[]")


@pytest.mark.parametrize("field", ["concurrency", "max_attempts", "timeout_s"])
def test_settings_that_would_ask_nobody_are_refused(field):
    with pytest.raises(Refused, match=f"{field}=0"):
        Settings(**{field: 0})


def test_a_journal_has_one_writer_and_an_empty_one_leaves_no_file(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path), pytest.raises(Refused, match="in use by another process"):
        Journal(path)
    assert not path.exists()
    (tmp_path / "letter").write_text("dear journal")
    with pytest.raises(Refused, match="letter: file is not a database"):
        Journal(tmp_path / "letter")
    with pytest.raises(Refused, match="no such file"):
        Journal(path, read_only=True)


def test_a_database_of_something_else_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "users.db"
    with sqlite3.connect(path) as users:
        users.execute("CREATE TABLE users (name)")
        users.execute("INSERT INTO users VALUES ('Ann')")
    users.close()
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(Refused, match=r"users.db: it is .* with a table 'users'"):
            Journal(path, read_only=read_only)
    assert path.read_bytes() == before
    empty = tmp_path / "empty"
    empty.touch()
    Journal(empty).close()
    assert empty.exists()  # it was not made here


def test_what_cannot_be_written_ends_a_run_and_leaves_nobody_waiting():
    journal, request = Journal(), TASK.request(Row(text="one"), model="slow")
    begin = functools.partial(journal.begin, "small", "", request, max_tokens=1, usd=0.0)

    async def both():
        at_once = asyncio.gather(begin(tokens=10**30), begin(tokens=1), return_exceptions=True)
        ended = await asyncio.wait_for(at_once, 5)
        return ended, await begin(tokens=1)

    ended, after = asyncio.run(both())
    assert [type(error) for error in ended] == [Failed, Failed] and after == 3
    assert "cannot write journal" in str(ended[0])


class Slow:
    model, is_model, price = "slow", True, None

    def __init__(self, seconds: float):
        self._seconds, self.asked = seconds, 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        self.asked += 1
        await asyncio.sleep(self._seconds)
        return Answer(GOOD, False, 1, 1)


def test_stopping_waits_for_calls_under_way_and_keeps_their_answers():
    stop = threading.Event()
    with Journal() as journal:
        model = Slow(0.3)
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(Stopped, match="every answer is in the journal"):
            run_tasks(
                TASK,
                rows(100),
                model,
                journal=journal,
                settings=Settings(concurrency=4),
                stop=stop.is_set,
            )
        assert model.asked == 4
        again = Slow(0.0)
        assert all(r.ok for r in run_tasks(TASK, rows(100), again, journal=journal).values())
        assert again.asked == 96


def test_stopping_gives_up_on_calls_that_take_too_long():
    model, began = Slow(60.0), time.monotonic()
    with pytest.raises(Stopped):
        run_tasks(
            TASK, rows(8), model, settings=Settings(grace_s=0.2), stop=lambda: model.asked > 0
        )
    assert time.monotonic() - began < 5


def test_a_million_rows_are_not_read_ahead():
    read = []

    def many():
        for i in range(1000):
            read.append(i)
            yield f"row-{i}", Row(text=str(i))

    with pytest.raises(Stopped):
        settings = Settings(concurrency=2, grace_s=0.1)
        run_tasks(TASK, many(), Slow(5.0), settings=settings, stop=lambda: len(read) > 0)
    assert len(read) <= 2 * 4


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here you are: {GOOD} I hope it helps.",
        f"<think>{{maybe b?}}</think>\n{GOOD}",
        f"It is {{a}}: {GOOD}",
        f'thought {{"label": "b", "score": 1}} ends</think>{GOOD}',
        f"<think>{{</think> a </think>\n{GOOD}",
        f"{r'{x}' * 1000}</think>{r'{x}_{}' * 1000}```json\n{GOOD}\n```",
        f"{GOOD} so once more: {GOOD}",
    ],
)
def test_words_around_an_answer_do_not_matter(text):
    assert parse(TASK, Row(text="x"), text).label == "a"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "invalid_json"),
        ("a", "invalid_json"),
        ("[1]", "invalid_json"),
        ('{"label": "a", "score": NaN}', "invalid_json"),
        ('{"label": "a"', "invalid_json"),
        ("[" * 200_000, "invalid_json"),
        (f'{GOOD} or rather {{"label": "b", "score": 1}}', "invalid_json"),
        (f"<think>it may be {GOOD}", "invalid_json"),
        (f"<think>it may be {GOOD}</think> I do not know", "invalid_json"),
        ('{"label": "a", "score": 1e999}', "invalid_json"),
        (f'{{"share": 1e999, "other": {GOOD}}}', "invalid_json"),
        ('{"label": ' * 20_000, "invalid_json"),
        ('{"label": ' + "[" * 200_000, "invalid_json"),
        ('{"label": "a"}', "wrong_schema"),
        ('{"label": "e", "score": 1}', "outside_labels"),
        ('{"label": "e", "score": "x"}', "wrong_schema"),
    ],
)
def test_what_is_no_answer_has_a_kind(text, kind):
    with pytest.raises(InvalidAnswer) as invalid:
        parse(TASK, Row(text="x"), text)
    assert invalid.value.kind == kind


def test_an_answer_s_own_words_may_be_tags():
    task = dataclasses.replace(TASK, output=Row)
    for text in ("<think>hi</think>", "hi</think> there"):
        said = json.dumps({"text": text})
        assert parse(task, Row(text="x"), said).text == text
        assert parse(task, Row(text="x"), f"Here: {said}").text == text


def test_a_value_that_json_cannot_hold_is_no_answer(tmp_path):
    class Number(BaseModel):
        number: float

    task = dataclasses.replace(TASK, output=Number)
    for text in ('{"number": "nan"}', '{"number": "-inf"}'):
        with pytest.raises(InvalidAnswer, match="cannot be written as JSON") as invalid:
            parse(task, Row(text="x"), text)
        assert invalid.value.kind == "wrong_schema"
    by_hand = {"x": Result("x", "k", Number(number=math.nan), None, None)}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path / "labels.jsonl", task, "m", by_hand)
    assert not (tmp_path / "labels.jsonl").exists()


def test_rules_that_fail_fail_for_their_row_alone():
    def rules(row):
        if row.text == "text 1":
            raise ValueError("no words")
        return TASK.rules(row)

    results = run_tasks(dataclasses.replace(TASK, rules=rules), rows(3), Rules())
    kinds = [r.error and (r.error.kind, r.error.message) for r in results.values()]
    assert kinds == [None, ("rule_error", "ValueError: no words"), None]
    with pytest.raises(Refused, match="task small has no rules"):
        run_tasks(dataclasses.replace(TASK, rules=None), rows(1), Rules())


class Says:
    model, is_model, price = "says", True, None

    def __init__(self, text):
        self._text = text

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        return Answer(self._text, False, 1, 1)


@pytest.mark.parametrize(
    "text", ['{"label": "\ud83d", "score": 1}', "\ud83d", '{"label": "\\ud83d"}']
)
def test_half_a_surrogate_pair_fails_its_row_alone(text, tmp_path):
    quick = Settings(max_attempts=2)
    with Journal(tmp_path / "journal.sqlite") as journal:
        results = run_tasks(TASK, rows(2), Says(text), journal=journal, settings=quick)
    assert all(r.error.kind in ("invalid_json", "outside_labels") for r in results.values())
    write_results(tmp_path / "labels.jsonl", TASK, "says", results)
    bad = run_tasks(TASK, {"x": Row(text="\ud83d")} | rows(1), Says(GOOD))
    assert bad["x"].error.kind == "invalid_input" and bad["row-00000"].ok


def test_failures_can_be_written_down():
    failure = Failure("server_error", "a \ud83d", "b \ud83d")
    assert (failure.message, failure.raw) == ("a \\ud83d", "b \\ud83d")


def test_a_prompt_or_a_check_that_fails_fails_for_its_row_alone():
    def check(row, answer):
        return None if row.text == "text 0" else 1 / 0

    results = run_tasks(dataclasses.replace(TASK, checks=(check,)), rows(2), Says(GOOD))
    first, second = results.values()
    assert first.ok and (second.error.kind, second.attempts) == ("check_error", 1)
    assert second.raw == GOOD
    prompt = Prompt("p", "{{ text[9] }}")
    results = run_tasks(dataclasses.replace(TASK, prompt=prompt), rows(1), Says(GOOD))
    assert results["row-00000"].error.kind == "invalid_input"


class Touchy(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _looked_up(cls, text: str) -> str:
        return {"good": "known"}[text]


def test_a_type_that_raises_fails_for_its_row_alone():
    read = dataclasses.replace(TASK, input=Touchy)
    results = run_tasks(read, {"x": {"text": "bad"}, "y": {"text": "good"}}, Says(GOOD))
    assert results["y"].ok and results["x"].error.kind == "invalid_input"
    assert results["x"].error.message == "the input type raised KeyError: 'bad'"
    journal, said = Journal(), Says('{"text": "bad"}')
    written = dataclasses.replace(TASK, output=Touchy)
    result = run_tasks(written, rows(1), said, journal=journal)["row-00000"]
    assert result.error == Failure(
        "check_error", "the output type raised KeyError: 'bad'", '{"text": "bad"}'
    )
    # It stands in the journal, so the next run does not meet it again.
    assert run_tasks(written, rows(1), said, journal=journal)["row-00000"].attempts == 0


def test_a_prompt_that_raises_fails_for_its_row_alone():
    class Notes(BaseModel):
        notes: list[str] | None

    prompt = Prompt("p", "{% for note in notes %}{{ note }}{% endfor %}")
    task = dataclasses.replace(TASK, input=Notes, prompt=prompt)
    results = run_tasks(task, {"x": {"notes": None}, "y": {"notes": ["n"]}}, Says(GOOD))
    assert results["y"].ok and results["x"].error.kind == "invalid_input"
    assert "prompt p: TypeError: 'NoneType' object is not iterable" in results["x"].error.message


def test_a_backend_that_raises_fails_for_its_row_alone_and_once():
    class Odd(Says):
        async def ask(self, call):
            return {}["x"] if "text 0" in str(call.messages) else await super().ask(call)

    journal = Journal()
    for attempts in (1, 0):
        bad, good = run_tasks(TASK, rows(2), Odd(GOOD), journal=journal).values()
        assert good.ok and bad.attempts == attempts
        assert bad.error == Failure("backend_error", "KeyError: 'x'")
    assert sum(cost.unknown_calls for cost in journal.costs()) == 1


def test_prices_are_data(tmp_path):
    assert price_of("gpt-4o-mini") == Price(0.15, 0.6)
    assert price_of("gpt-4o-mini", batch=True) == Price(0.075, 0.3)
    assert price_of("nobody's") is None
    own = tmp_path / "prices.json"
    own.write_text(json.dumps({"models": {"mine": {"input": 1, "output": 2}}}))
    assert price_of("mine", path=own).usd(500_000, 1_000_000) == 2.5
    for content in ('{"models": {"mine": {"input": -1, "output": 2}}}', "[]", "{"):
        own.write_text(content)
        with pytest.raises(Refused, match=r"price table .*prices.json"):
            price_of("mine", path=own)


class Heated:
    """Says nothing valid below a temperature, and loses the first call."""

    model, is_model, price = "heated", True, FREE

    def __init__(self, from_temperature: float):
        self._from, self.sent = from_temperature, []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        self.sent.append(Dialect().body(call)["temperature"])
        if len(self.sent) == 1:
            raise CallFailed(Failure("server_error", "lost"))
        return Answer(GOOD if call.temperature >= self._from else "no", False, 1, 1)


def test_each_invalid_answer_raises_the_temperature_also_after_a_resume():
    stepping = dataclasses.replace(TASK, temperature=0.5, temperature_step=0.1)
    fast = Settings(max_attempts=4, backoff_s=0.01)
    with Journal() as journal:
        model = Heated(9.0)
        first = run_tasks(stepping, rows(1), model, journal=journal, settings=fast)
        # A call that was lost brought no answer, and leaves the temperature where it is.
        assert model.sent == [0.5, 0.5, 0.6, 0.7] and not first["row-00000"].ok
        more = dataclasses.replace(fast, max_attempts=6)
        again = run_tasks(
            stepping, rows(1), model, journal=journal, settings=more, retry_failed=True
        )
    assert model.sent[4:] == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0] and not again["row-00000"].ok
    very = dataclasses.replace(TASK, temperature=1.9, temperature_step=0.3)
    request = very.request(Row(text="x"), model="m")
    sent = Dialect().body(Call(very, Row(text="x"), request, request.messages, 64, 3, 2))
    assert sent["temperature"] == 2.0 and "temperature_step" not in sent
    plain = TASK.request(Row(text="x"), model="m")
    assert "temperature_step" not in plain.parameters
    assert stepping.request(Row(text="x"), model="m").key != plain.key
    with pytest.raises(Refused, match="temperature_step=-1; it must be at least 0"):
        dataclasses.replace(TASK, temperature_step=-1)
