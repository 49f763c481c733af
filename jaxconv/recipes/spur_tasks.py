"""The questions of SPUR to a language model, with what an answer must be.

Lin et al. (2024), "Interpretable User Satisfaction Estimation for Conversational Systems with
Large Language Models", arXiv 2403.12388. Prompts are in `prompts/spur`; the classical baselines
learn (`spur_rules.py`), and the recipe puts them into the tasks.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from jaxconv.llm import Prompt, Task
from jaxconv.llm.conversations import Turn
from jaxconv.llm.prompt import is_quoted

MAX_PATTERNS = 3
MAX_EXAMPLES = 8
MAX_SCORE = 10
MAX_ITEMS = 10
"""Of a rubric, so that R lies between -100 and 100."""
SAT, DSAT = "sat", "dsat"

_WARMER = 0.1  # after each answer that a check refuses

_PROMPTS = Path(__file__).parent / "prompts" / "spur"
_LABEL_WORDS = re.compile(r"\b(thumbs?[- ](up|down)|rating|label(l?ed)?|ground truth)\b", re.I)


def _joined(problems: list[str]) -> str | None:
    """All that is wrong, so that one answer can mend it."""
    return "; ".join(problems) or None


def is_users(quote: str, turns: list[Turn]) -> bool:
    """Whether these words stand in one turn of the user's."""
    return any(turn.role == "user" and is_quoted(quote, turn.content) for turn in turns)


# ---------------------------------------------------------------- 1. supervised extraction


class ExtractionInput(BaseModel):
    turns: list[Turn]
    satisfied: bool


class Pattern(BaseModel):
    """Why a user was satisfied or not, and the words that show it."""

    pattern: str = Field(min_length=1)
    quote: str


class Patterns(BaseModel):
    patterns: list[Pattern] = Field(max_length=MAX_PATTERNS)


def _quotes_of_the_user(input: ExtractionInput, found: Patterns) -> str | None:
    return _joined(
        [
            f"patterns[{i}].quote: {pattern.quote!r} does not stand in a turn of the user's"
            for i, pattern in enumerate(found.patterns)
            if not is_users(pattern.quote, input.turns)
        ]
    )


def _spelt(text: str) -> str:
    """In one of the ways to write it, as "thumbs-up" for "Thumbs up"."""
    return text.casefold().replace(" ", "-")


def _label_not_told(input: ExtractionInput, found: Patterns) -> str | None:
    """A reason may speak of ratings and labels where the user does."""
    said = _spelt(" ".join(turn.content for turn in input.turns if turn.role == "user"))
    return _joined(
        [
            f"patterns[{i}].pattern mentions {told[0]!r}; it must be about the conversation"
            for i, pattern in enumerate(found.patterns)
            if (told := _LABEL_WORDS.search(pattern.pattern)) and _spelt(told[0]) not in said
        ]
    )


EXTRACTION = Task(
    name="spur/extract",
    input=ExtractionInput,
    output=Patterns,
    prompt=Prompt.load(_PROMPTS / "extract.md"),
    checks=(_quotes_of_the_user, _label_not_told),
    max_tokens=512,
    temperature_step=_WARMER,
)


# ---------------------------------------------------------------- 2. rubric summarisation


class RubricItem(BaseModel):
    """A sign of satisfaction or its lack: `examples` are words of users who showed it."""

    name: str = Field(min_length=1, max_length=80)
    description: str
    examples: list[str] = Field(default=[], max_length=MAX_EXAMPLES)


class Rubric(BaseModel):
    items: list[RubricItem]


class SummaryInput(BaseModel):
    """A minibatch of patterns of one polarity, and the rubric of the minibatches before."""

    satisfied: bool
    patterns: list[Pattern]
    previous: list[RubricItem] = []
    limit: int


def _at_most(input: SummaryInput, rubric: Rubric) -> str | None:
    if not 1 <= len(rubric.items) <= input.limit:
        return f"items: there are {len(rubric.items)}; there may be 1 to {input.limit}"
    return None


def _different_names(input: SummaryInput, rubric: Rubric) -> str | None:
    names = [item.name.strip().casefold() for item in rubric.items]
    twice = next((name for name in names if names.count(name) > 1), None)
    return f"items: {twice!r} is there twice" if twice else None


SUMMARY = Task(
    name="spur/summarise",
    input=SummaryInput,
    output=Rubric,
    prompt=Prompt.load(_PROMPTS / "summarise.md"),
    checks=(_at_most, _different_names),
    max_tokens=3000,
    temperature_step=_WARMER,
)


# ---------------------------------------------------------------- 3. scoring


class NumberedItem(RubricItem):
    """`id` is S1, S2, … or D1, D2, …"""

    id: str


class ScoringInput(BaseModel):
    turns: list[Turn]
    sat: list[NumberedItem]
    dsat: list[NumberedItem]

    @property
    def ids(self) -> list[str]:
        return [item.id for item in (*self.sat, *self.dsat)]


class ItemScore(BaseModel):
    id: str
    present: bool
    quote: str
    score: int = Field(ge=0, le=MAX_SCORE)


class ItemScores(BaseModel):
    items: list[ItemScore]

    @property
    def satisfaction(self) -> int:
        """R, the sum over signs of satisfaction less that over signs of its lack: -100 to 100 with
        ten items each."""
        return sum(i.score if i.id.startswith("S") else -i.score for i in self.items)


def _each_item_once(input: ScoringInput, scores: ItemScores) -> str | None:
    found = sorted(item.id for item in scores.items)
    if found == sorted(input.ids):
        return None
    return f"items: there are {', '.join(found)}; there must be {', '.join(input.ids)}, each once"


def _scores_fit(input: ScoringInput, scores: ItemScores) -> str | None:
    problems = []
    for item in scores.items:
        if item.present != (item.score > 0):
            wanted = "from 1 to 10 where it is shown" if item.present else "0 where it is not"
            problems.append(f"{item.id}: its score is {item.score}; it must be {wanted}")
        elif item.present and not is_users(item.quote, input.turns):
            problems.append(f"{item.id}: {item.quote!r} does not stand in a turn of the user's")
    return _joined(problems)


SCORING = Task(
    name="spur/score",
    input=ScoringInput,
    output=ItemScores,
    prompt=Prompt.load(_PROMPTS / "score.md"),
    checks=(_each_item_once, _scores_fit),
    max_tokens=2000,
    temperature_step=_WARMER,
)


# ---------------------------------------------------------------- zero-shot and few-shot


class Example(BaseModel):
    turns: list[Turn]
    label: Literal["sat", "dsat"]


class ClassificationInput(BaseModel):
    turns: list[Turn]
    examples: list[Example] = []


class Classified(BaseModel):
    label: Literal["sat", "dsat"]


CLASSIFICATION = Task(
    name="spur/classify",
    input=ClassificationInput,
    output=Classified,
    prompt=Prompt.load(_PROMPTS / "classify.md"),
    max_tokens=64,
    temperature_step=_WARMER,
)

TASKS = (EXTRACTION, SUMMARY, SCORING, CLASSIFICATION)
