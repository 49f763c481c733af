"""What recipes ask stage by stage: one budget, one journal, failures told, dry runs that go on."""

import collections
import dataclasses
import importlib

import pytest
from pydantic import BaseModel

from jaxconv import recipes
from jaxconv.errors import Failed, Refused
from jaxconv.evals.report import Report
from jaxconv.llm import Journal, Prompt, Settings, Task
from jaxconv.llm.backends.base import Answer
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.prices import FREE
from jaxconv.recipes.asking import Asking, NoAnswer, once
from jaxconv.train.workdir import Workdir


class Number(BaseModel):
    n: int


def _double(input: Number) -> Number:
    return Number(n=2 * input.n)


TASK = Task(
    name="double", input=Number, output=Number, prompt=Prompt("double.md", "{{ n }}"), rules=_double
)


class Model:
    """Says ten more; nothing that is a number for 13."""

    model, is_model, price = "ten-more", True, FREE

    def __init__(self):
        self.asked = collections.Counter()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        self.asked[call.input.n] += 1
        n = "none" if call.input.n == 13 else call.input.n + 10
        return Answer(f'{{"n": {n if isinstance(n, int) else chr(34) + n + chr(34)}}}', False, 5, 5)


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run") as held:
        yield held


def asking(workdir, journal, backend, **settings):
    return Asking(backend, journal, Settings(max_attempts=2, **settings), workdir=workdir)


def values(results):
    return {id: result.value and result.value.n for id, result in results.items()}


def test_stages_share_a_journal_and_the_report_tells_what_failed(workdir):
    model = Model()
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, model)
        first = asked.ask(TASK, {"a": {"n": 1}, "b": {"n": 13}})
        again = asked.ask(TASK, [("c", {"n": 1}), ("d", {"n": 11})])
        assert values(first) == {"a": 11, "b": None} and values(again) == {"c": 11, "d": 21}
        assert model.asked == {1: 1, 13: 2, 11: 1}  # 1 is known when c is asked
        report = Report(status="done")
        asked.report(report)
    assert asked.failures == 1 and report.status == "partial"
    assert report.notes[0].startswith("1 of 4 rows of double have no value: wrong_schema 1")
    assert f"| double | {TASK.prompt.version} | ten-more | 4 | 1 |" in report.sections["Questions"]
    assert report.cost == {"llm_calls": 4, "llm_tokens": 40, "usd": 0}


def test_a_stage_of_one_question_fails_where_it_has_no_answer(workdir):
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, Model())
        found = asked.in_step({"a": once(TASK, "only", {"n": 3}), "b": once(TASK, "2", {"n": 13})})
        assert found["a"].n == 13 and isinstance(found["b"], NoAnswer)
        assert str(found["b"]).startswith("task double, b, 2: wrong_schema")


def count_down(start, steps, task=TASK):
    """Says how far it came, and takes what it is told."""
    n = start
    for step in range(steps):
        n = (yield from once(task, f"step {step}", {"n": n})).n
    return n


def test_chains_ask_together_what_they_ask_next(workdir):
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, Model())
        found = asked.in_step(
            {"long": count_down(0, 3), "short": count_down(100, 1), "stuck": count_down(3, 2)}
        )
        # 3 becomes 13, to which there is no answer; the others go on.
        assert (found["long"], found["short"]) == (30, 110)
        assert isinstance(found["stuck"], NoAnswer)
        assert [plan.rows for plan in asked.plans] == [3, 2, 1]
        assert list(found) == ["long", "short", "stuck"]


@pytest.mark.parametrize("dry", [False, True])
def test_chains_with_rules_of_their_own_get_their_own_answers(workdir, dry):
    tripled = dataclasses.replace(TASK, rules=lambda input: Number(n=3 * input.n))
    with Journal(workdir.journal) as journal:
        asked = asking(None if dry else workdir, journal, Model() if dry else Rules())
        found = asked.in_step({"a": count_down(1, 3), "b": count_down(1, 3, tripled)})
    assert found == {"a": 8, "b": 27}


def test_a_chain_may_go_on_without_some_of_its_answers(workdir):
    def votes():
        results = yield TASK, {"one": {"n": 1}, "two": {"n": 13}}
        return [result.value and result.value.n for result in results.values()]

    with Journal(workdir.journal) as journal:
        assert asking(workdir, journal, Model()).in_step({"x": votes()}) == {"x": [11, None]}


def test_a_later_stage_is_refused_where_the_budget_is_spent(workdir):
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, Model(), budget_tokens=2000)
        asked.ask(TASK, {"a": {"n": 1}})
        journal_before = journal.costs()
        poor = asking(workdir, journal, Model(), budget_tokens=11)
        with pytest.raises(Refused, match="the budget is not enough for one call"):
            poor.ask(TASK, {"b": {"n": 2}})
        assert journal.costs() == journal_before


def test_a_budget_that_was_used_up_on_the_way_is_a_failure_that_says_how_to_go_on(workdir):
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, Model(), budget_tokens=2000)
        asked.ask(TASK, {"a": {"n": 1}})
        with pytest.raises(Failed, match=r"the budget is used up.*larger config\.llm\.budget_usd"):
            for n in range(2, 300):
                asked.ask(TASK, {f"{n}": {"n": n}})
        rich = asking(workdir, journal, Model(), budget_tokens=90_000)
        assert values(rich.ask(TASK, {"a": {"n": 1}})) == {"a": 11}
        assert rich.plans[0].calls == 0


def test_what_an_unknown_price_comes_to_is_said_to_be_unknown(workdir):
    model = Model()
    model.price = None
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, model)
        asked.ask(TASK, {"a": {"n": 1}}, keep="doubled")
        report = Report(status="done")
        asked.report(report)
    assert report.cost == {"llm_calls": 1, "llm_tokens": 10} and not report.perf
    assert any("What it cost is unknown: 'ten-more' has no price" in note for note in report.notes)
    assert report.artifacts == {"answers": "artifacts/answers"}


def test_a_dry_run_asks_nobody_and_goes_on_with_what_is_known(workdir):
    model = Model()
    with Journal(workdir.journal) as journal:
        asking(workdir, journal, model).ask(TASK, {"a": {"n": 1}})
        calls = model.asked.copy()
        dry = asking(None, journal, model)
        first = dry.ask(TASK, {"a": {"n": 1}, "b": {"n": 2}})
        # The model's answer of before, and the rules' answer where there is none.
        assert values(first) == {"a": 11, "b": 4}
        dry.ask(TASK, {id: {"n": result.value.n} for id, result in first.items()})
        assert [(plan.rows, plan.answered, plan.calls) for plan in dry.plans] == [
            (2, 1, 1),
            (2, 0, 2),
        ]
        assert model.asked == calls and dry.dry


def test_rules_are_named_as_such(workdir):
    with Journal(workdir.journal) as journal:
        asked = asking(workdir, journal, Rules())
        assert values(asked.ask(TASK, {"a": {"n": 4}})) == {"a": 8}
        assert asked.who == "rules (no model was asked)"


def test_every_recipe_that_a_config_may_name_can_be_checked_and_run():
    for name in recipes.RECIPES:
        if name == "counting":  # that of another test
            continue
        module = importlib.import_module(f"jaxconv.recipes.{name}")
        assert callable(module.check) and callable(module.run)
