"""Each task's classical baseline in the place of a model: no network, no weights."""

from jaxconv.errors import Refused
from jaxconv.llm.backends.base import Answer, Call
from jaxconv.llm.failures import CallFailed, Failure
from jaxconv.llm.prices import FREE


class Rules:
    """Answers by `task.rules`, a plain function. What is wrong with its answer is final."""

    model = "rules"
    is_model = False
    price = FREE

    async def __aenter__(self) -> "Rules":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def ask(self, call: Call) -> Answer:
        """The function's answer, as JSON.

        Raises:
            Refused: the task has none.
            CallFailed: it raised an error, which is this row's alone.
        """
        if call.task.rules is None:
            raise Refused(f"task {call.task.name} has no rules; it needs a model")
        try:
            return Answer(call.task.rules(call.input).model_dump_json())
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            raise CallFailed(Failure("rule_error", message)) from error
