"""What can go wrong with a row, by kind, and what is done about it."""

from dataclasses import dataclass

TRANSIENT = ("rate_limited", "server_error", "timeout", "connection", "no_answer")
"""Asked again after a pause."""

ANSWERS = (
    "truncated",
    "oversized",
    "invalid_json",
    "wrong_schema",
    "outside_labels",
    "failed_check",
)
"""Asked again, with what was wrong with the answer."""

FINAL = ("refused_request", "content_filter", "rule_error", "check_error", "backend_error")
"""Would go wrong again in the same way."""

UNASKED = ("invalid_input", "budget", "not_in_journal")
"""Nothing was asked, so nothing is in the journal: another run asks."""


@dataclass(frozen=True)
class Failure:
    """Why a row has no value.

    Attributes:
        kind: one of the names above.
        message: one sentence.
        raw: the answer as the model wrote it, None where there was none. Half of a surrogate pair,
            which cannot be written down, stands there as an escape; so in `message`.
    """

    kind: str
    message: str
    raw: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", writable(self.message))
        object.__setattr__(self, "raw", None if self.raw is None else writable(self.raw))


def writable(text: str) -> str:
    """`text` with an escape for what UTF-8 cannot hold."""
    return text.encode(errors="backslashreplace").decode()


NO_TOKENS = (0, 0)
"""Of a call that a server refused before a model read it."""


class CallFailed(Exception):
    """A call of a backend that brought no answer.

    Attributes:
        failure: why.
        retry_after: seconds that the server asks to wait, None where it does not say.
        tokens: (input, output) that were paid for all the same; None where nobody knows, which
            counts as the most that the call could take.
    """

    def __init__(
        self,
        failure: Failure,
        retry_after: float | None = None,
        *,
        tokens: tuple[int, int] | None = None,
    ):
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure, self.retry_after, self.tokens = failure, retry_after, tokens


class InvalidAnswer(Exception):
    """An answer that does not fit its task."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class InvalidInput(Exception):
    """An input that is not of its task's type."""
