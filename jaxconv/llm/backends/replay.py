"""A journal in the place of a model: offline, and the same answers every time."""

from pathlib import Path

from jaxconv.errors import Refused
from jaxconv.llm.backends.base import Answer, Call
from jaxconv.llm.failures import CallFailed, Failure
from jaxconv.llm.journal import Journal
from jaxconv.llm.prices import FREE


class Replay:
    """Answers what a journal holds; a row that it does not hold is an error of kind
    `not_in_journal`.

    Args:
        path: of the journal, which is only read.
        model: whose answers; "" where the journal has those of one model.

    Raises:
        Refused: no such journal, or no such model in it.
    """

    is_model = False
    price = FREE

    def __init__(self, path: str | Path, model: str = ""):
        self._path = Path(path)
        with Journal(self._path, read_only=True) as journal:
            known = journal.models()
        if model not in known and (model or len(known) != 1):
            found = ", ".join(known) or "none"
            raise Refused(f"journal {path} has answers of {found}; model={model!r} names none")
        self.model = model or known[0]

    async def __aenter__(self) -> "Replay":
        self._journal = Journal(self._path, read_only=True)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._journal.close()

    async def ask(self, call: Call) -> Answer:
        """What the model answered then.

        Raises:
            CallFailed: it had failed then, or was never asked.
        """
        history = self._journal.history(call.request.key)
        if history.answer is not None:
            return Answer(history.answer)
        raise CallFailed(
            history.failure or Failure("not_in_journal", f"{self._path} has no answer to it")
        )
