"""What became of rows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic

from jaxconv.errors import Failed
from jaxconv.llm.failures import Failure
from jaxconv.llm.task import Output

_JUDGED = 20  # rows before a rate of failures says anything


@dataclass(frozen=True)
class Result(Generic[Output]):
    """What became of one row: a value, or an error.

    Attributes:
        id: of the input.
        key: of the request; "" where the input was none.
        value: None where there is an error.
        error: None where there is a value.
        raw: the answer as it was written, where there was one.
        attempts: that were made at it now; 0 for what the journal had.
        tokens, usd: that they took, as far as it is known.
    """

    id: str
    key: str
    value: Output | None
    error: Failure | None
    raw: str | None
    attempts: int = 0
    tokens: int = 0
    usd: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error is None


def count_by_cause(results: Iterable[Result]) -> dict[str, int]:
    """How many rows failed, by kind, the most frequent first."""
    counts = Counter(result.error.kind for result in results if result.error is not None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass
class Tally:
    """Counts the rows of a run, which ends when too many of them fail.

    Attributes:
        task: its name.
        allowed: the share of rows that may fail.
        finished: rows so far.
        causes: how many failed, by kind. Rows that the budget was not enough for are none.
    """

    task: str
    allowed: float
    finished: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        """Counts one more.

        Raises:
            Failed: more than allowed have failed.
        """
        self.finished += 1
        if result.error is not None and result.error.kind != "budget":
            self.causes[result.error.kind] += 1
        failed = self.causes.total()
        if self.finished >= _JUDGED and failed > self.allowed * self.finished:
            said = ", ".join(f"{kind} {count}" for kind, count in self.causes.most_common())
            raise Failed(
                f"task {self.task}: {failed} of {self.finished} rows failed ({said}); "
                f"llm.max_failure_rate={self.allowed} allows fewer"
            )
