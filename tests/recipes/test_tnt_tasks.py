"""The guards of TnT-LLM's tables and assignments, one by one, and the prompts they go with."""

import json

import pytest

from jaxconv.llm.answers import parse
from jaxconv.llm.conversations import Turn
from jaxconv.llm.failures import InvalidAnswer
from jaxconv.recipes.tnt_tasks import (
    ASSIGNMENT,
    GENERATION,
    REVIEW,
    SELECTION,
    SUMMARY,
    UPDATE,
    AssignmentInput,
    Label,
    SelectionInput,
    SummaryInput,
    TableInput,
    numbered,
)

LABELS = [
    Label(name="lost cards", description="a card is gone"),
    Label(name="fees", description=""),
]
GIVEN = TableInput(
    use_case="banking",
    documents=["a text"],
    labels=LABELS,
    max_labels=2,
    name_words=2,
    description_words=4,
    explanation_words=10,
)


def table(*names: str, description: str = "short") -> str:
    labels = [f'{{"name": "{name}", "description": "{description}"}}' for name in names]
    return f'{{"labels": [{", ".join(labels)}]}}'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (table("a", "b", "c"), "there are 3 labels; there may be 1 to 2"),
        ('{"labels": []}', "there are 0 labels"),
        (table("a very long name"), "the name of 'a very long name' has 4 words; it may have 2"),
        (table("a", description="one two three four five six seven"), "has 7 words; it may have 4"),
        (table("Fees", "fees "), "the label 'fees ' is there twice"),
        (table("Other"), "the label 'Other' is vague"),
        (table("general questions"), "'general questions' is vague"),
        (table("手数料"), "the label '手数料' is not in English"),
    ],
)
def test_a_table_that_breaks_a_guard_is_no_answer(answer, message):
    with pytest.raises(InvalidAnswer) as refused:
        parse(GENERATION, GIVEN, answer)
    assert message in str(refused.value) and refused.value.kind == "failed_check"


def test_a_table_within_its_limits_is_one():
    assert len(parse(GENERATION, GIVEN, table("lost cards", "überweisung")).labels) == 2


ONE, TWO, OTHER = (
    {"id": id, "name": name} for id, name in ((1, "lost cards"), (2, "fees"), (0, "Other"))
)


@pytest.mark.parametrize(
    ("primary", "applicable", "message"),
    [
        ({"id": 3, "name": "x"}, [ONE], "there is no label 3"),
        ({"id": 1, "name": "fees"}, [ONE], "label 1 is 'lost cards', not 'fees'"),
        (TWO, [ONE], "applicable lacks the primary label 2"),
        (OTHER, [OTHER, TWO], "applicable has Other beside other labels"),
    ],
)
def test_an_assignment_says_id_and_name_of_one_label(primary, applicable, message):
    given = AssignmentInput(
        turns=[Turn(number=1, role="user", content="x")], use_case="", labels=numbered(LABELS)
    )
    with pytest.raises(InvalidAnswer) as refused:
        parse(ASSIGNMENT, given, json.dumps({"primary": primary, "applicable": applicable}))
    assert message in str(refused.value)
    right = json.dumps({"primary": TWO | {"name": "Fees"}, "applicable": [TWO]})
    assert parse(ASSIGNMENT, given, right).primary.id == 2


def test_selection_names_one_of_the_candidates_and_summaries_are_short():
    given = SelectionInput(use_case="", candidates=[LABELS, LABELS], documents=[])
    with pytest.raises(InvalidAnswer, match="best is 3; it may be 1 to 2"):
        parse(SELECTION, given, '{"reason": "", "best": 3}')
    short = SummaryInput(turns=[], use_case="", words=2)
    with pytest.raises(InvalidAnswer, match="summary has 4 words; it may have 2"):
        parse(SUMMARY, short, '{"summary": "a b c d", "explanation": ""}')


def test_a_review_shows_no_data_and_temperatures_are_the_papers():
    review = REVIEW.request(GIVEN.model_copy(update={"documents": []}), model="m")
    assert "<summary>" not in review.messages[-1]["content"]
    assert "fits the use case" in review.messages[-1]["content"]
    update = UPDATE.request(GIVEN, model="m")
    assert "<summary>a text</summary>" in update.messages[-1]["content"]
    found = [task.temperature for task in (GENERATION, UPDATE, REVIEW, ASSIGNMENT)]
    assert found == [0.5, 0.2, 0, 0]
    assert update.parameters["temperature_step"] == 0.1
