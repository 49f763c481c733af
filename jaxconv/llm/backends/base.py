"""What the runner knows of who answers."""

from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel

from jaxconv.llm.prices import Price
from jaxconv.llm.prompt import ChatMessage
from jaxconv.llm.task import Request, Task

_HOTTEST = 2.0  # that endpoints take


@dataclass(frozen=True)
class Call:
    """One attempt at a request.

    Attributes:
        task, input: what is asked, for backends that do not read prompts.
        request: as it was first asked.
        messages: those of the request, then the answers that were wrong and what was wrong.
        max_tokens: of the answer.
        before: attempts at the request that were completed before this one, ever.
        invalid: how many of them brought an answer that was no valid one.
    """

    task: Task
    input: BaseModel
    request: Request
    messages: list[ChatMessage]
    max_tokens: int
    before: int
    invalid: int = 0

    @property
    def temperature(self) -> float:
        """Of this attempt."""
        asked = self.request.parameters
        raised = asked["temperature"] + self.invalid * asked.get("temperature_step", 0.0)
        return min(round(raised, 6), _HOTTEST)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: as the model wrote it.
        cut: whether it ended at `max_tokens`.
        input_tokens, output_tokens: as the server counted them; None where it did not.
    """

    text: str
    cut: bool = False
    input_tokens: int | None = None
    output_tokens: int | None = None


class Backend(Protocol):
    """Answers calls, many at a time, in the event loop that entered it.

    Attributes:
        model: what answers; a part of every request's key.
        is_model: a language model answers: its calls are counted and paid for, and what it said
            before is not asked again. Others cost nothing and answer anew every time.
        price: of its tokens, None where nobody knows.
    """

    model: str
    is_model: bool
    price: Price | None

    async def __aenter__(self) -> "Backend": ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def ask(self, call: Call) -> Answer:
        """The answer to one call.

        Raises:
            CallFailed: there is none.
        """
        ...
