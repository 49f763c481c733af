"""How to ask."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxconv.errors import Refused
from jaxconv.llm.failures import TRANSIENT, Failure

_LONGEST_ASKED_S = 600.0  # a row ends in an error, not in a run that sleeps for a day
EXECUTORS = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to ask.

    Attributes:
        concurrency: calls at a time.
        max_attempts: at a row; those that were interrupted do not count.
        timeout_s: of a call, in seconds.
        backoff_s, max_backoff_s: the pause after a first transient error, in seconds, which doubles
            with each, and its most. From half of it to all of it is waited, by `seed` and row, on
            top of what the server asks for, of which ten minutes count at most.
        requests_per_minute, tokens_per_minute: limits; 0 is none.
        budget_usd, budget_tokens: hard caps on all that the journal holds; 0 is none.
        max_answer_bytes: a longer answer is a failure, of which so much is kept.
        max_failure_rate: when more of the rows fail, the run ends.
        grace_s: seconds for calls under way when the run is asked to stop.
        seed: of the pauses.
        executor: "local" asks from this process, "ray" from workers on a Ray cluster.
        workers: of a Ray cluster, which share the limits; 0 is one for each node.
    """

    concurrency: int = 16
    max_attempts: int = 5
    timeout_s: float = 120.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    budget_usd: float = 0.0
    budget_tokens: int = 0
    max_answer_bytes: int = 1 << 20
    max_failure_rate: float = 1.0
    grace_s: float = 10.0
    seed: int = 0
    executor: str = "local"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_attempts", "max_answer_bytes"):
            if (value := getattr(self, name)) < 1:
                raise Refused(f"{name}={value}; it must be at least 1")
        if not self.timeout_s > 0:
            raise Refused(f"timeout_s={self.timeout_s}; it must be above 0")
        if self.executor not in EXECUTORS:
            raise Refused(f"executor={self.executor!r}; it may be {', '.join(EXECUTORS)}")
        if self.workers < 0:
            raise Refused(f"workers={self.workers}; it must be 0 (one for each node) or more")

    def backoff(
        self, key: str, tried: Sequence[Failure], retry_after: float | None = None
    ) -> float:
        """Seconds to wait after one more transient error of the request `key`, which has failed as
        in `tried` before, when the server asks to wait `retry_after`."""
        before = sum(failure.kind in TRANSIENT for failure in tried)
        longest = min(self.max_backoff_s, self.backoff_s * 2.0**before)
        part = 0.5 + 0.5 * random.Random(f"{self.seed}:{key}:{len(tried)}").random()
        return min(retry_after or 0.0, _LONGEST_ASKED_S) + longest * part
