"""One test for each of the seventeen requirements for a labelling pipeline, in their order."""

import asyncio
import collections
import dataclasses
import json
import signal
import sqlite3
import time

import pytest
from fault_server import digest, fault_of, good
from scripted import Scripted
from small_task import FAST, TASK, Answer, Row, endpoint, rows, words

from jaxconv.errors import Failed, Refused
from jaxconv.evals.agreement import agreement
from jaxconv.evals.judges import PairwiseInput, judge_pairs
from jaxconv.llm import Journal, Prompt, Settings, count_by_cause, estimate, run_tasks
from jaxconv.llm.artifact import write_results
from jaxconv.llm.backends.base import Answer as Reply
from jaxconv.llm.backends.batch import OpenAIBatch
from jaxconv.llm.backends.replay import Replay
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.failures import CallFailed, Failure
from jaxconv.llm.limits import Pace
from jaxconv.llm.prices import Price
from jaxconv.llm.ray_executor import _unanswered
from jaxconv.llm.shortlist import Shortlist

GOOD = '{"label": "a", "score": 1}'
SAME = lambda call: GOOD  # noqa: E731
ONE = {"x": Row(text="one")}
PENNY = Price(input=100.0, output=100.0)


def test_requirement_01_key_is_all_that_the_answer_depends_on():
    request = TASK.request(Row(text="one"), model="m")
    same = dataclasses.replace(TASK, name="renamed", checks=(lambda i, o: None,))
    assert same.request(Row(text="one"), model="m").key == request.key
    others = [
        TASK.request(Row(text="two"), model="m"),
        TASK.request(Row(text="one"), model="n"),
        TASK.request(Row(text="one"), model="m", sample=1),
        dataclasses.replace(TASK, temperature=0.5).request(Row(text="one"), model="m"),
        dataclasses.replace(TASK, prompt=Prompt("p", "{{ text }}")).request(
            Row(text="one"), model="m"
        ),
        dataclasses.replace(TASK, output=Row).request(Row(text="one"), model="m"),
    ]
    assert len({request.key, *(other.key for other in others)}) == 7
    journal, model = Journal(), Scripted(SAME)
    run_tasks(TASK, ONE, model, journal=journal)
    again = run_tasks(same, {"y": Row(text="one"), "z": Row(text="two")}, model, journal=journal)
    assert len(model.calls) == 2 and again["y"].attempts == 0 and again["z"].attempts == 1


def test_requirement_02_failures_are_never_an_answer_and_keep_their_text(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        bad = run_tasks(TASK, ONE, Scripted(lambda call: "nonsense"), journal=journal)["x"]
        assert bad.error.kind == "invalid_json" and bad.raw == "nonsense"
        # Given up, so not asked again; asked for, it is, and the failure is no answer to it.
        model = Scripted(SAME)
        assert run_tasks(TASK, ONE, model, journal=journal)["x"].error == bad.error
        assert not model.calls
        retried = run_tasks(TASK, ONE, model, journal=journal, retry_failed=True)["x"]
        assert retried.value == Answer(label="a", score=1) and len(model.calls) == 1
    kept = sqlite3.connect(path).execute("SELECT raw, error FROM calls ORDER BY number").fetchall()
    assert kept == [("nonsense", "invalid_json")] * 5 + [(GOOD, None)]


def test_requirement_03_attempts_stand_in_the_journal_before_they_are_made(tmp_path):
    path = tmp_path / "journal.sqlite"
    seen = []

    def script(call):
        # What another process finds while the call is under way.
        db = sqlite3.connect(path)
        query = (
            "SELECT count(*) FROM attempts WHERE key = ? AND number NOT IN "
            "(SELECT attempt FROM outcomes)"
        )
        seen.append(db.execute(query, (call.request.key,)).fetchone()[0])
        if len(seen) == 3:
            raise MemoryError
        return GOOD

    settings = Settings(concurrency=1)
    with Journal(path) as journal, pytest.raises(MemoryError):
        run_tasks(TASK, rows(4), Scripted(script), journal=journal, settings=settings)
    assert seen == [1, 1, 1]
    with Journal(path) as journal:
        model = Scripted(SAME)
        results = run_tasks(TASK, rows(4), model, journal=journal)
        # The interrupted one and the one that was never asked for.
        assert [r.attempts for r in results.values()] == [0, 0, 1, 1] and len(model.calls) == 2


def test_requirement_03_ctrl_c_in_a_program_of_ones_own_loses_no_answer():
    class Interrupts(Scripted):
        async def ask(self, call):
            self.calls.append(call)
            if len(self.calls) == 3:
                signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(60)
            return Reply(GOOD, False, 10, 5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        journal, settings = Journal(), Settings(concurrency=1)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(TASK, rows(4), Interrupts(SAME), journal=journal, settings=settings)
    finally:
        signal.signal(signal.SIGINT, before)
    again = run_tasks(TASK, rows(4), Scripted(SAME), journal=journal)
    assert [result.attempts for result in again.values()] == [0, 0, 1, 1]


def test_requirement_03_interrupted_attempts_do_not_count():
    journal, request = Journal(), TASK.request(Row(text="one"), model="scripted")
    begin = {"max_tokens": 1, "tokens": 1, "usd": 0.0}
    for _ in range(7):
        asyncio.run(journal.begin("small", "", request, **begin))
    assert run_tasks(TASK, ONE, Scripted(SAME), journal=journal)["x"].ok


def test_requirement_04_rows_keep_their_id_and_a_failed_one_is_an_error_in_its_place():
    def script(call):
        return GOOD if "text 1<" not in call.messages[1]["content"] else "no"

    inputs = rows(4) | {"broken": {"text": 7}}
    results = run_tasks(TASK, inputs, Scripted(script))
    assert list(results) == list(inputs) and all(r.id == id for id, r in results.items())
    kinds = {id: r.error and r.error.kind for id, r in results.items()}
    assert kinds == dict.fromkeys(rows(4)) | {
        "row-00001": "invalid_json",
        "broken": "invalid_input",
    }
    with pytest.raises(Refused, match="two inputs have the id 'x'"):
        run_tasks(TASK, [("x", Row(text="a")), ("x", Row(text="b"))], Scripted(SAME))


def test_requirement_05_the_model_is_told_what_was_wrong_and_gets_no_fewer_tokens():
    replies = iter(['{"label": "a", "score": "many"}', Reply('{"label": ', True, 1, 1), GOOD])
    model = Scripted(lambda call: next(replies))
    assert run_tasks(TASK, ONE, model)["x"].ok
    first, second, _ = model.calls
    assert second.messages[: len(first.messages)] == first.messages
    assistant, user = second.messages[len(first.messages) :]
    assert assistant == {"role": "assistant", "content": '{"label": "a", "score": "many"}'}
    assert user["role"] == "user" and "score: Input should be a valid integer" in user["content"]
    assert [call.max_tokens for call in model.calls] == [64, 64, 128]
    stubborn = Scripted(lambda call: "no")
    run_tasks(TASK, ONE, stubborn, settings=Settings(max_attempts=4))
    assert len(stubborn.calls) == 4


def test_requirement_06_labels_outside_the_list_are_errors():
    result = run_tasks(TASK, ONE, Scripted(lambda call: '{"label": "Other", "score": 1}'))["x"]
    assert result.value is None and result.error.kind == "outside_labels"
    assert "Other" in result.error.message and "Other" in result.raw


def test_requirement_07_one_bad_row_fails_alone_and_a_rate_of_failures_ends_the_run():
    def script(call):
        return "no" if any(f"text {i}<" in call.messages[1]["content"] for i in range(9)) else GOOD

    results = run_tasks(TASK, rows(30), Scripted(script))
    assert count_by_cause(results.values()) == {"invalid_json": 9}
    with pytest.raises(Failed, match=r"rows failed \(invalid_json \d+\); llm.max_failure_rate=0.1"):
        run_tasks(TASK, rows(30), Scripted(script), settings=Settings(max_failure_rate=0.1))


def test_requirement_08_only_transient_errors_are_tried_again_after_a_pause():
    def calls(kind, retry_after=None):
        model = Scripted(lambda call: CallFailed(Failure(kind, "it broke"), retry_after))
        settings = Settings(max_attempts=3, backoff_s=0.01, timeout_s=0.05)
        began = time.monotonic()
        result = run_tasks(TASK, ONE, model, settings=settings)["x"]
        assert result.error.kind == kind
        return len(model.calls), time.monotonic() - began

    assert calls("refused_request")[0] == calls("content_filter")[0] == 1
    assert calls("server_error")[0] == calls("connection")[0] == 3
    tries, seconds = calls("rate_limited", retry_after=0.2)
    assert tries == 3 and seconds >= 0.4  # two pauses, each as long as the server asked for

    class Hangs(Scripted):
        async def ask(self, call):
            self.calls.append(call)
            await asyncio.sleep(60)

    hangs = Hangs(None)
    settings = Settings(max_attempts=2, backoff_s=0.01, timeout_s=0.05)
    assert run_tasks(TASK, ONE, hangs, settings=settings)["x"].error.kind == "timeout"
    assert len(hangs.calls) == 2


def test_requirement_08_pauses_grow_and_are_the_same_for_the_same_seed():
    def pauses(seed):
        settings = Settings(backoff_s=1.0, max_backoff_s=8.0, seed=seed)
        return [settings.backoff("key", [Failure("server_error", "")] * n) for n in range(6)]

    assert pauses(0) == pauses(0) != pauses(1)
    for pause, longest in zip(pauses(0), (1, 2, 4, 8, 8, 8), strict=True):
        assert longest / 2 <= pause <= longest


def test_requirement_09_limits_hold_and_do_not_decay():
    now, starts = [0.0], []

    async def sleep(seconds):
        now[0] += seconds

    async def take(n, amount=1.0):
        for _ in range(n):
            await pace.take(amount)
            starts.append(now[0])

    pace = Pace(600, clock=lambda: now[0], sleep=sleep)
    asyncio.run(take(3000))
    assert starts[-1] == pytest.approx(2999 / 10)  # the whole limit is used, to the end
    first = 0
    for last, start in enumerate(starts):
        while starts[first] <= start - 60 + 1e-6:
            first += 1
        assert last - first + 1 <= 600
    # Tokens that were not used are given back to those that wait.
    now[0], pace = 0.0, Pace(6000, clock=lambda: now[0], sleep=sleep)

    async def refund():
        for _ in range(10):
            await pace.take(100)
            pace.give_back(50)

    asyncio.run(refund())
    assert now[0] == pytest.approx(9 * 0.5)


def test_requirement_09_concurrency_is_reached_and_never_passed(serve):
    server = serve(latency=0.05)
    settings = dataclasses.replace(FAST, concurrency=8, timeout_s=10.0)
    run_tasks(TASK, rows(64), endpoint(server.url), settings=settings)
    assert server.stats()["most_active"] == 8


def test_requirement_10_nothing_is_spent_past_the_cap_and_hits_cost_nothing():
    def script(call):
        return Reply(GOOD, False, 200, call.max_tokens)

    call_usd = PENNY.usd(200, 64)
    journal, model = Journal(), Scripted(script, PENNY)
    settings = Settings(budget_usd=10 * call_usd, concurrency=8)
    results = run_tasks(TASK, rows(40), model, journal=journal, settings=settings)
    (cost,) = journal.costs()
    spent = cost.usd
    assert 0 < spent <= 10 * call_usd and cost.calls == len(model.calls)
    failed = count_by_cause(results.values())
    assert failed == {"budget": 40 - len(model.calls)} and 4 <= len(model.calls) <= 10
    # A budget that ran out is no answer: with more, the rest is asked for, and only the rest.
    more = dataclasses.replace(settings, budget_usd=0.0)
    assert all(
        r.ok for r in run_tasks(TASK, rows(40), model, journal=journal, settings=more).values()
    )
    assert len(model.calls) == 40
    total = journal.costs()
    run_tasks(TASK, rows(40), model, journal=journal, settings=more)
    assert journal.costs() == total and len(model.calls) == 40
    with pytest.raises(Refused, match="no price for model 'scripted'"):
        run_tasks(TASK, ONE, Scripted(SAME), settings=settings)


def test_requirement_10_the_cap_holds_over_calls_that_nobody_knows_the_price_of():
    def script(call):
        return CallFailed(Failure("timeout", "no answer"))

    journal = Journal()
    settings = Settings(budget_tokens=3000, max_attempts=99, backoff_s=0.0)
    results = run_tasks(TASK, rows(20), Scripted(script), journal=journal, settings=settings)
    (cost,) = journal.costs()
    assert set(count_by_cause(results.values())) == {"budget"}
    assert 0 < cost.unknown_tokens <= 3000 and cost.tokens == 0
    # Another process knows what this one may have spent.
    model = Scripted(SAME)
    run_tasks(TASK, rows(20), model, journal=journal, settings=settings)
    assert not model.calls


def test_requirement_10_a_dry_run_counts_calls_tokens_and_cost():
    journal, model = Journal(), Scripted(SAME, PENNY)
    run_tasks(TASK, rows(4), model, journal=journal)
    plan = estimate(TASK, rows(10), model, journal=journal)
    assert (plan.rows, plan.answered, plan.calls) == (10, 4, 6) and len(model.calls) == 4
    assert plan.output_tokens == 6 * 64 and 6 * 60 < plan.input_tokens < 6 * 100
    assert plan.usd == pytest.approx(PENNY.usd(plan.input_tokens, plan.output_tokens))


def test_requirement_11_the_same_questions_give_the_same_file(serve, tmp_path):
    server = serve()
    answered = []
    with Journal(tmp_path / "journal.sqlite") as journal:
        model = endpoint(server.url)
        answered.append(run_tasks(TASK, rows(20), model, journal=journal, settings=FAST))
    backwards = dict(reversed(rows(20).items()))
    answered.append(run_tasks(TASK, backwards, Replay(tmp_path / "journal.sqlite")))
    files = []
    for results in answered:
        write_results(tmp_path / "labels.jsonl", TASK, "faulty", results)
        files.append((tmp_path / "labels.jsonl").read_bytes())
    assert files[0] == files[1]
    first = json.loads(files[0].splitlines()[0])
    assert first["id"] == "row-00000" and first["prompt"] == TASK.prompt.version
    assert first["value"] == good(words(rows(1)["row-00000"]))


def test_requirement_12_rules_and_replay_need_no_network(tmp_path):
    ruled = run_tasks(TASK, rows(3), Rules())
    assert [r.value.score for r in ruled.values()] == [6, 6, 6]
    with Journal(tmp_path / "journal.sqlite") as journal:
        script = {"one": GOOD, "two": "no"}
        model = Scripted(lambda call: next(s for w, s in script.items() if w in str(call.messages)))
        inputs = {name: Row(text=name) for name in script}
        then = run_tasks(TASK, inputs, model, journal=journal)
    replay = Replay(tmp_path / "journal.sqlite")
    now = run_tasks(TASK, inputs | {"three": Row(text="three")}, replay)
    assert [(now[id].value, now[id].error) for id in then] == [
        (r.value, r.error) for r in then.values()
    ]
    assert now["three"].error.kind == "not_in_journal"


def test_requirement_13_a_batch_api_answers_through_the_same_interface(serve, tmp_path):
    server, rate = serve(rate=0.03), 0.03
    inputs = rows(30)
    batch = OpenAIBatch(
        "faulty", base_url=server.url, state=tmp_path / "state", linger_s=0.05, poll_s=0.1
    )
    settings = dataclasses.replace(FAST, timeout_s=60.0)
    with Journal(tmp_path / "journal.sqlite") as journal:
        results = run_tasks(TASK, inputs, batch, journal=journal, settings=settings)
    for id, row in inputs.items():
        fault, over = fault_of(words(row), 0, rate)
        if not fault or over is not None:
            assert results[id].value == Answer(**good(words(row))), (id, fault)
        else:
            assert results[id].error.kind in ("server_error", "outside_labels")
    # A run that was killed with a batch under way finds it again.
    at = len(server.asked())
    with Journal() as lost:
        again = run_tasks(TASK, inputs, batch, journal=lost, settings=settings)
    assert len(server.asked()) == at
    assert {id: r.value for id, r in again.items()} == {id: r.value for id, r in results.items()}


def test_requirement_14_agreement_and_position_are_measured():
    reference = ["a"] * 50 + ["b"] * 50
    given = ["a"] * 40 + ["b"] * 10 + ["b"] * 35 + ["a"] * 10 + [None] * 5
    found = agreement(given, reference, seed=0)
    assert found.coverage.value == 0.95 and found.accuracy.value == pytest.approx(75 / 95)
    chance = (50 * 50 + 45 * 45) / 95**2
    assert found.kappa.value == pytest.approx((75 / 95 - chance) / (1 - chance))
    assert found.kappa.ci95[0] < found.kappa.value < found.kappa.ci95[1]
    assert found.confusions == (("a", "b", 10), ("b", "a", 10))
    pairs = {f"p{i}": PairwiseInput(question="q", first="x", second="y") for i in range(10)}
    first_slot = Scripted(lambda call: '{"reason": "", "winner": "first"}')
    judged = judge_pairs(pairs, lambda task, inputs: run_tasks(task, inputs, first_slot))
    assert set(judged.winners.values()) == {"tie"}
    assert judged.flip_rate.value == 1.0 and judged.first_slot_rate.value == 1.0


def test_requirement_15_large_label_spaces_are_cut_to_the_likeliest():
    names = {f"card_{i}": f"about thing number {i}" for i in range(76)}
    names["lost_card"] = "the user has lost a card and asks for help"
    shortlist = Shortlist(names)
    top = shortlist.top("I lost my card yesterday", 5)
    assert len(top) == 5 and "lost_card" in top and top == sorted(top, key=list(names).index)


def test_requirement_16_each_row_says_where_it_comes_from(tmp_path):
    path = tmp_path / "journal.sqlite"
    script = iter(["no", GOOD])
    with Journal(path) as journal:
        model = Scripted(lambda call: next(script))
        results = run_tasks(TASK, ONE, model, journal=journal)
    write_results(tmp_path / "labels.jsonl", TASK, "scripted", results)
    row = json.loads((tmp_path / "labels.jsonl").read_text())
    assert (row["task"], row["model"], row["prompt"]) == ("small", "scripted", TASK.prompt.version)
    db = sqlite3.connect(path)
    calls = (
        "SELECT raw, error, input_tokens, output_tokens FROM calls WHERE key = ? ORDER BY number"
    )
    assert db.execute(calls, (row["key"],)).fetchall() == [
        ("no", "invalid_json", 10, 5),
        (GOOD, None, 10, 5),
    ]
    (body,) = db.execute("SELECT body FROM requests WHERE key = ?", (row["key"],)).fetchone()
    assert json.loads(body)["messages"][1]["content"] == "<text>one</text>"


def test_requirement_17_a_budget_says_how_far_it_goes_before_it_is_spent():
    model = Scripted(SAME, PENNY)
    whole = estimate(TASK, rows(10), model, settings=Settings(budget_usd=100.0))
    assert whole.affordable == 10 and "WARNING" not in str(whole)
    little = Settings(budget_usd=whole.usd * 0.9, concurrency=1)
    part = estimate(TASK, rows(10), model, settings=little)
    said = f"WARNING: the budget covers about {part.affordable} of 10 calls"
    assert 0 < part.affordable < 10 and said in str(part)
    none = estimate(TASK, rows(10), model, settings=Settings(budget_tokens=10))
    assert none.affordable == 0
    assert not model.calls
    tokens = (whole.input_tokens // 10, whole.output_tokens // 10)
    spender = Scripted(lambda call: Reply(GOOD, False, *tokens), PENNY)
    run_tasks(TASK, rows(10), spender, settings=little)
    assert len(spender.calls) == part.affordable


def test_the_same_question_under_two_ids_is_asked_once():
    model = Scripted(SAME)
    inputs = {str(i): Row(text="one") for i in range(5)}
    results = run_tasks(TASK, inputs, model)
    assert len(model.calls) == 1 and collections.Counter(r.ok for r in results.values())[True] == 5


def test_an_answer_that_a_new_check_refuses_is_asked_for_again():
    journal, model = Journal(), Scripted(SAME)
    run_tasks(TASK, ONE, model, journal=journal)
    strict = dataclasses.replace(TASK, checks=(lambda i, o: "wrong" if o.score < 2 else None,))
    model._script = lambda call: '{"label": "a", "score": 2}'
    assert estimate(strict, ONE, model, journal=journal).calls == 1
    assert run_tasks(strict, ONE, model, journal=journal)["x"].value.score == 2
    # It is told what is wrong with the one that it gave before.
    assistant, user = model.calls[-1].messages[2:]
    assert assistant["content"] == GOOD and "not a valid answer: wrong." in user["content"]


def test_a_row_that_is_given_up_after_it_had_an_answer_is_asked_again_only_when_told_to():
    journal, model, three = Journal(), Scripted(SAME), Settings(max_attempts=3)
    run_tasks(TASK, ONE, model, journal=journal)
    strict = dataclasses.replace(TASK, checks=(lambda i, o: "wrong" if o.score < 2 else None,))
    found = [run_tasks(strict, ONE, model, journal=journal, settings=three)["x"] for _ in range(3)]
    assert [result.attempts for result in found] == [3, 0, 0]
    assert {result.error.kind for result in found} == {"failed_check"}
    for retry_failed, calls in ((False, 0), (True, 1)):
        plan = estimate(strict, ONE, model, journal=journal, retry_failed=retry_failed)
        assert (plan.calls, plan.answered) == (calls, 1 - calls)
    # The checks that it was right by know it still.
    assert run_tasks(TASK, ONE, model, journal=journal)["x"].ok and len(model.calls) == 4
    run_tasks(strict, ONE, model, journal=journal, settings=three, retry_failed=True)
    assert len(model.calls) == 7


def test_workers_on_ray_are_asked_what_a_new_check_refuses_and_not_what_was_given_up():
    journal, model, inputs = Journal(), Scripted(SAME), rows(2)
    run_tasks(TASK, inputs, model, journal=journal)
    strict = dataclasses.replace(TASK, checks=(lambda i, o: "wrong" if o.score < 2 else None,))

    def asked(retry_failed=False):
        rows = list(inputs.items())
        return [
            [id for id, _ in part]
            for part in _unanswered(rows, strict, model, journal, 0, retry_failed)[1:]
        ]

    assert asked() == [list(inputs), []]
    run_tasks(strict, dict(list(inputs.items())[:1]), model, journal=journal)
    assert asked() == [["row-00001"], []] and asked(True) == [list(inputs), []]


def test_run_tasks_works_where_an_event_loop_runs():
    async def cell():
        return run_tasks(TASK, ONE, Rules())

    assert asyncio.run(cell())["x"].ok


def test_the_server_and_the_runner_know_rows_by_the_same_words(serve):
    server = serve()
    run_tasks(TASK, rows(3), endpoint(server.url), settings=FAST)
    assert sorted(server.asked()) == sorted(digest(words(row)) for row in rows(3).values())
