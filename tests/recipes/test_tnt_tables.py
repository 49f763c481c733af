"""How tables of labels come about: chains side by side, comparisons, patience, guards."""

import json
import types
from collections.abc import Callable
from pathlib import Path

from jaxconv.llm import Journal, Settings
from jaxconv.llm.backends.base import Answer
from jaxconv.llm.prices import FREE
from jaxconv.recipes.asking import Asking
from jaxconv.recipes.tnt_tables import Place, TableMaker
from jaxconv.train.config import load
from jaxconv.train.workdir import Workdir

CONFIG = Path(__file__).parents[2] / "configs" / "tnt_llm.py"


class Scripted:
    """Answers by a function of the call."""

    model, is_model, price = "scripted", True, FREE

    def __init__(self, function):
        self._function, self.calls = function, []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        self.calls.append(call)
        return Answer(json.dumps(self._function(call)), False, 1, 1)


def asking(tmp_path, function) -> tuple[Asking, Scripted]:
    backend = Scripted(function)
    workdir = Workdir(tmp_path / "run")
    return Asking(backend, Journal(), Settings(max_attempts=6), workdir=workdir), backend


def maker_of(asked: Asking) -> TableMaker:
    """One whose tables are made by a model alone."""
    config = load(str(CONFIG)).config
    config.select.every = config.select.patience = 1
    config.taxonomy.batch = 1
    rules = types.SimpleNamespace(generate=None, update=None, select=None)
    return TableMaker(config, asked, rules)


def table(name: str) -> dict:
    return {"labels": [{"name": name, "description": ""}]}


def alternating(call, best: Callable[[list[str]], int]):
    """Tables named by what they are made from; `best` picks one of names."""
    if call.task.name == "tnt_llm/select":
        names = [labels[0].name for labels in call.input.candidates]
        return {"reason": "", "best": best(names)}
    if call.task.name == "tnt_llm/generate":
        return table(f"of {call.input.documents[0]}")
    last = call.input.documents[0] if call.input.documents else "nothing"
    labels = call.input.labels if last == "nothing" else table(f"of {last}")["labels"]
    labels = [x if isinstance(x, dict) else x.model_dump() for x in labels]
    return {"rating": 1, "explanation": "", "edits": [], "labels": labels}


def test_a_judge_with_a_favourite_place_keeps_the_best_so_far(tmp_path):
    asked, backend = asking(tmp_path, lambda call: alternating(call, lambda names: 1))
    maker = maker_of(asked)
    found = maker.tables({"": Place(["a", "b", "c"], ["d"], 5, 1)})[""]
    first, second, *_ = maker.steps
    assert found[0].name == first.labels[0].name and second.chosen is False
    assert [step.kind for step in maker.steps] == ["generate", "update", "review"]  # patience is 1
    shown = [
        call.input.candidates[0][0].name for call in backend.calls if "select" in call.task.name
    ]
    # Two orders are all there are.
    assert sorted(shown) == sorted(step.labels[0].name for step in (first, second))


def test_a_judge_of_tables_finds_the_better_one_wherever_it_stands(tmp_path):
    pick = lambda names: 1 + names.index(max(names))  # noqa: E731
    asked, _ = asking(tmp_path, lambda call: alternating(call, pick))
    maker = maker_of(asked)
    maker.config.select.patience = 5
    assert maker.tables({"": Place(["a", "b", "c"], ["d"], 5, 3)})[""][0].name == "of c"


def test_without_a_valid_comparison_nothing_is_worse_and_the_first_stays(tmp_path):
    asked, _ = asking(tmp_path, lambda call: alternating(call, lambda names: 7))
    maker = maker_of(asked)
    found = maker.tables({"": Place(["a", "b", "c"], ["d"], 5, 1)})[""]
    assert found == maker.steps[0].labels
    assert [step.chosen for step in maker.steps] == [None] * 4  # no patience is lost


def test_chains_go_on_side_by_side_and_one_without_an_answer_is_told(tmp_path):
    def answer(call):
        if call.task.name == "tnt_llm/update" and call.input.labels[0].name == "of a":
            return {"labels": []}
        return alternating(call, lambda names: 1)

    asked, _ = asking(tmp_path, answer)
    maker = maker_of(asked)
    found = maker.tables({"": Place(["a", "b"], ["d"], 5, 6), "x": Place(["e"], [], 5, 1)})
    assert set(found) == {"", "x"} and found["x"][0].name == "of e"
    begun_with_a = {
        s.chain for s in maker.steps if s.kind == "generate" and "a" in s.labels[0].name
    }
    assert begun_with_a and len(maker.notes) == len(begun_with_a)
    assert all("task tnt_llm/update" in note for note in maker.notes)
    assert asked.plans[0].rows == 7
    order = [(step.place, step.chain, step.number) for step in maker.steps]
    assert order == sorted(order)


def test_a_table_that_no_longer_changes_ends_its_chain(tmp_path):
    def answer(call):
        if call.task.name == "tnt_llm/generate":
            return table("the same")
        return {"rating": 90, "explanation": "", "edits": [], "labels": table("the same")["labels"]}

    asked, backend = asking(tmp_path, answer)
    maker = maker_of(asked)
    maker.config.select.patience = 2
    maker.tables({"": Place([f"{i}" for i in range(9)], ["d"], 5, 1)})
    kinds = [step.kind for step in maker.steps]
    assert kinds == ["generate", "update", "update", "review"]
    assert not any("select" in call.task.name for call in backend.calls)


def test_orders_are_different_and_have_their_reverse():
    maker = maker_of(None)
    for count, wanted in ((2, 2), (3, 4), (5, 4)):
        orders = maker._orders(count)
        assert len(set(orders)) == len(orders) == wanted
        assert all(order[::-1] in orders for order in orders)


def test_a_table_that_is_too_large_is_asked_for_again_warmer(tmp_path):
    sizes = iter([9, 7, 5])

    def answer(call):
        if call.task.name != "tnt_llm/generate":
            return alternating(call, None)
        return {"labels": [{"name": f"label {i}", "description": "x"} for i in range(next(sizes))]}

    asked, backend = asking(tmp_path, answer)
    assert len(maker_of(asked).tables({"": Place(["text"], [], 5, 1)})[""]) == 5
    assert [call.temperature for call in backend.calls] == [0.5, 0.6, 0.7, 0.0]
    assert "there are 9 labels; there may be 1 to 5" in backend.calls[1].messages[-1]["content"]
    assert backend.calls[0].request.parameters["top_p"] == 0.5
