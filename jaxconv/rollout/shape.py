"""The sizes that are compiled into an engine, and the distribution that it draws from."""

import dataclasses

from jaxconv.errors import Refused


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that a turn is drawn from; its log-prob is what is recorded.

    Attributes:
        temperature: at least 0, which is greedy.
        top_k: at least 0, which is off.
        top_p: above 0, at most 1, which is off.
        min_p: from 0, which is off, to 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for field, fits, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise _refusal(field, getattr(self, field), expected)


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """Sizes that are compiled into an engine.

    Attributes:
        slots: rows of the cache.
        lengths: cache lengths, ascending. The cache grows from one to the next when a stream gets
            there; the last one is where a stream ends.
        burst: most tokens that one dispatch decodes in a slot.
        leave: fraction of the slots speaking at the start of a burst after whose end the burst
            leaves early; above 0, at most 1.
        prefill_rows: row counts of a prefill, ascending. More slots take several prefills.
        prefill_tokens: token counts of a prefill, ascending; longer pieces take several.
    """

    slots: int = 64
    lengths: tuple[int, ...] = (128, 256)
    burst: int = 32
    leave: float = 0.75
    prefill_rows: tuple[int, ...] = (16, 64)
    prefill_tokens: tuple[int, ...] = (16, 64)

    def __post_init__(self):
        for field in ("slots", "burst"):
            if getattr(self, field) < 1:
                raise _refusal(field, getattr(self, field), "at least 1")
        for field in ("lengths", "prefill_rows", "prefill_tokens"):
            sizes = getattr(self, field)
            if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
                raise _refusal(field, sizes, "sizes of at least 1 that ascend")
        if not 0 < self.leave <= 1:
            raise _refusal("leave", self.leave, "above 0 and at most 1")


def _refusal(field: str, value: object, expected: str) -> Refused:
    return Refused(f"rollout.{field}={value}; it must be {expected}")
