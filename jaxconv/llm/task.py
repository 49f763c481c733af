"""What is asked of a language model: a typed input, a prompt, a typed output, checks on it."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from jaxconv.errors import Refused
from jaxconv.llm.failures import InvalidInput
from jaxconv.llm.prompt import ChatMessage, Prompt

Input = TypeVar("Input", bound=BaseModel)
Output = TypeVar("Output", bound=BaseModel)

_INSTRUCTION = "Answer with one JSON object that fits this JSON schema, and with nothing else:\n"


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Input, Output]):
    """One kind of question.

    Attributes:
        name: of the task: letters, digits, `_`, `-` and `/`. It stands in the journal and in costs,
            and is no part of a request's key.
        input, output: pydantic models. The schema of `output` is in every request.
        prompt: filled with the fields of an input.
        checks: each takes an input and an answer to it and returns what is wrong with the answer in
            one sentence, which the model is told, or None.
        rules: the task's classical baseline: the answer to an input without a model. None where
            there is none.
        max_tokens: of an answer; an answer that was cut there is asked for again with more.
        temperature, top_p: of sampling.
        temperature_step: added to the temperature with each answer that is no valid one, so that a
            model does not write the same again.
    """

    name: str
    input: type[Input]
    output: type[Output]
    prompt: Prompt
    checks: tuple[Callable[[Input, Output], str | None], ...] = ()
    rules: Callable[[Input], Output] | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    temperature_step: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-/" for c in self.name):
            raise Refused(f"task name {self.name!r}; it may have letters, digits, '_', '-' and '/'")
        if self.max_tokens < 1:
            raise Refused(f"task {self.name}: max_tokens={self.max_tokens}; it must be at least 1")
        if self.temperature_step < 0:
            raise Refused(
                f"task {self.name}: temperature_step={self.temperature_step}; it must be at least 0"
            )
        self.prompt.check(tuple(self.input.model_fields))

    @property
    def parameters(self) -> dict[str, Any]:
        """What a request says of sampling."""
        parameters = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        if self.temperature_step:
            parameters["temperature_step"] = self.temperature_step
        return parameters

    def typed(self, given: Any) -> Input:
        """`given` as the input type, which it may be already.

        Raises:
            InvalidInput: it does not fit.
        """
        if isinstance(given, self.input):
            return given
        try:
            return self.input.model_validate(given)
        except ValidationError as invalid:
            error = invalid.errors(include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in error["loc"]) or "the input"
            raise InvalidInput(f"{place}: {error['msg']}") from None
        except Exception as error:  # of a validator: this row's alone
            message = f"the input type raised {type(error).__name__}: {error}"
            raise InvalidInput(message) from error

    def request(self, input: Input, *, model: str, sample: int = 0) -> "Request":
        """What is sent for an input: `sample` tells several answers to the same question apart.

        Raises:
            InvalidInput: the prompt cannot be filled with it.
        """
        messages = self.prompt.render(dict(input))
        schema, instruction = _schema_and_instruction(self.output)
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] += f"\n\n{instruction}"
        else:
            messages.insert(0, {"role": "system", "content": instruction})
        try:
            return Request(model, self.parameters, messages, schema, sample)
        except UnicodeEncodeError:
            raise InvalidInput("it holds half of a surrogate pair") from None


@dataclass(frozen=True)
class Request:
    """A question as a model gets it.

    Attributes:
        key: SHA-256 of all of it in hexadecimal digits, so what an answer depends on and no more:
            an edit of code that leaves a request as it was leaves its answer as well.
    """

    model: str
    parameters: Mapping[str, Any]
    messages: list[ChatMessage]
    schema: Mapping[str, Any]
    sample: int = 0
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", hashlib.sha256(self.body.encode()).hexdigest())

    @property
    def body(self) -> str:
        """All of it as canonical JSON."""
        return _canonical(
            {
                "model": self.model,
                "parameters": dict(self.parameters),
                "messages": self.messages,
                "schema": self.schema,
                "sample": self.sample,
            }
        )


@functools.cache
def _schema_and_instruction(output: type[BaseModel]) -> tuple[dict[str, Any], str]:
    schema = output.model_json_schema()
    return schema, _INSTRUCTION + _canonical(schema)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
