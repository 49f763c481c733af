"""The questions of TnT-LLM to a language model, with what an answer must be.

Wan et al. (2024), "TnT-LLM: Text Mining at Scale with Large Language Models", arXiv 2403.12173.
Prompts are in `prompts/tnt_llm`; checks are the guards, which an answer that breaks one is told of,
and asked again a tenth warmer. The classical baselines learn (`tnt_rules.py`), and the recipe puts
them into the tasks.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from jaxconv.llm import Prompt, Task
from jaxconv.llm.conversations import Turn

OTHER = "Other"
OTHER_ID = 0

_PROMPTS = Path(__file__).parent / "prompts" / "tnt_llm"
_WARMER = 0.1  # after each answer that breaks a guard
_TOP_P = 0.5
_SLACK = 1.5  # words are counted in more ways than one
_VAGUE = re.compile(
    r"(other|others|general|generic|misc(ellaneous)?|unclear|undefined|various|unknown|none|n/a"
    r"|(other|general|miscellaneous|various) (topics?|questions?|requests?|inquir(y|ies)|issues?))",
    re.I,
)


def _task(name: str, prompt: str, **options: Any) -> Task:
    return Task(
        name=f"tnt_llm/{name}",
        prompt=Prompt.load(_PROMPTS / f"{prompt}.md"),
        top_p=_TOP_P,
        temperature_step=_WARMER,
        **options,
    )


def words_of(text: str) -> int:
    return len(text.split())


# ---------------------------------------------------------------- 1. summaries


class SummaryInput(BaseModel):
    turns: list[Turn]
    use_case: str
    words: int


class Summary(BaseModel):
    summary: str = Field(min_length=1)
    explanation: str


def _short(input: SummaryInput, found: Summary) -> str | None:
    if words_of(found.summary) > _SLACK * input.words:
        return f"summary has {words_of(found.summary)} words; it may have {input.words}"
    return None


SUMMARY = _task(
    "summarise", "summarise", input=SummaryInput, output=Summary, checks=(_short,), max_tokens=256
)


# ---------------------------------------------------------------- 2. tables of labels


class Label(BaseModel):
    name: str = Field(min_length=1)
    description: str


class TableInput(BaseModel):
    """What a table may be.

    Attributes:
        use_case: what it is for.
        documents: summaries of a minibatch.
        labels: the table so far.
        max_labels: of the table.
        name_words, description_words, explanation_words: at most.
    """

    use_case: str
    documents: list[str] = []
    labels: list[Label] = []
    max_labels: int
    name_words: int
    description_words: int
    explanation_words: int


class Table(BaseModel):
    labels: list[Label]


class Update(BaseModel):
    """The loss, the gradient and the step, as the paper has it."""

    rating: int = Field(ge=0, le=100)
    explanation: str
    edits: list[str]
    labels: list[Label]


def size_guard(input: TableInput, found: Table | Update) -> str | None:
    if not 1 <= len(found.labels) <= input.max_labels:
        return f"there are {len(found.labels)} labels; there may be 1 to {input.max_labels}"
    return None


def words_guard(input: TableInput, found: Table | Update) -> str | None:
    for label in found.labels:
        for field, most in (("name", input.name_words), ("description", input.description_words)):
            count = words_of(getattr(label, field))
            if count > _SLACK * most:
                return f"the {field} of {label.name!r} has {count} words; it may have {most}"
    return None


def names_guard(input: TableInput, found: Table | Update) -> str | None:
    seen: set[str] = set()
    for label in found.labels:
        name = label.name.strip().casefold()
        if name in seen:
            return f"the label {label.name!r} is there twice"
        if is_vague(name):
            return f"the label {label.name!r} is vague; each must say something"
        seen.add(name)
    return None


def is_vague(name: str) -> bool:
    """Whether it says nothing: a label of that name would take in anything."""
    return _VAGUE.fullmatch(name.strip()) is not None


def is_latin(text: str) -> bool:
    """Whether four of five letters are Latin ones."""
    letters = [c for c in text if c.isalpha()]
    return sum(ord(c) < 0x250 for c in letters) >= 0.8 * len(letters)


def latin_guard(input: TableInput, found: Table | Update) -> str | None:
    """English, as far as letters tell it: a name in another script is not."""
    for label in found.labels:
        if not is_latin(label.name):
            return f"the label {label.name!r} is not in English: its letters are not Latin"
    return None


GUARDS = (size_guard, words_guard, names_guard, latin_guard)

GENERATION = _task(
    "generate",
    "generate",
    input=TableInput,
    output=Table,
    checks=GUARDS,
    max_tokens=6000,
    temperature=0.5,
)
UPDATE = _task(
    "update",
    "update",
    input=TableInput,
    output=Update,
    checks=GUARDS,
    max_tokens=8000,
    temperature=0.2,
)
REVIEW = _task("review", "update", input=TableInput, output=Update, checks=GUARDS, max_tokens=8000)


# ---------------------------------------------------------------- 3. model selection


class SelectionInput(BaseModel):
    use_case: str
    candidates: list[list[Label]]
    documents: list[str]


class Selection(BaseModel):
    reason: str
    best: int


def _one_of_them(input: SelectionInput, found: Selection) -> str | None:
    if not 1 <= found.best <= len(input.candidates):
        return f"best is {found.best}; it may be 1 to {len(input.candidates)}"
    return None


SELECTION = _task(
    "select",
    "select",
    input=SelectionInput,
    output=Selection,
    checks=(_one_of_them,),
    max_tokens=256,
)


# ---------------------------------------------------------------- 4. assignment


class NumberedLabel(Label):
    """`id` counts from 1; 0 is `OTHER`."""

    id: int


class AssignmentInput(BaseModel):
    turns: list[Turn]
    use_case: str
    labels: list[NumberedLabel]


class Named(BaseModel):
    id: int
    name: str


class Assignment(BaseModel):
    primary: Named
    applicable: list[Named] = Field(min_length=1)


def _known_labels(input: AssignmentInput, found: Assignment) -> str | None:
    """A name that does not go with its id is neither of both."""
    names = {OTHER_ID: OTHER} | {label.id: label.name for label in input.labels}
    for place, label in (
        ("primary", found.primary),
        *(("applicable", x) for x in found.applicable),
    ):
        if label.id not in names:
            return f"{place}: there is no label {label.id}; it may be 0 to {len(input.labels)}"
        if label.name.strip().casefold() != names[label.id].strip().casefold():
            return f"{place}: label {label.id} is {names[label.id]!r}, not {label.name!r}"
    return None


def _primary_applies(input: AssignmentInput, found: Assignment) -> str | None:
    ids = [label.id for label in found.applicable]
    if found.primary.id not in ids:
        return f"applicable lacks the primary label {found.primary.id}"
    if OTHER_ID in ids and len(set(ids)) > 1:
        return f"applicable has {OTHER} beside other labels"
    return None


ASSIGNMENT = _task(
    "assign",
    "assign",
    input=AssignmentInput,
    output=Assignment,
    checks=(_known_labels, _primary_applies),
    max_tokens=256,
)


# ---------------------------------------------------------------- 5. judging labels


class ChoiceInput(BaseModel):
    turns: list[Turn]
    use_case: str
    first: Label
    second: Label


class Choice(BaseModel):
    better: Literal["first", "second"]


CHOICE = _task("choose", "choose", input=ChoiceInput, output=Choice, max_tokens=32)


class RelevanceInput(BaseModel):
    turns: list[Turn]
    use_case: str
    label: Label


class Relevance(BaseModel):
    relevant: bool


RELEVANCE = _task("relevance", "relevance", input=RelevanceInput, output=Relevance, max_tokens=32)


TASKS = (SUMMARY, GENERATION, UPDATE, REVIEW, SELECTION, ASSIGNMENT, CHOICE, RELEVANCE)


def numbered(labels: Sequence[Label]) -> list[NumberedLabel]:
    """With ids from 1."""
    return [NumberedLabel(id=i, **label.model_dump()) for i, label in enumerate(labels, 1)]
