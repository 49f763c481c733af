"""How fast calls may go, and how much they may take."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from jaxconv.errors import Refused


class Pace:
    """Spreads amounts evenly over time, at most so much a minute.

    In no minute there is more than the limit and the last amount in it; of single requests never
    more than the limit. Whoever comes first goes first, and the pace stays the same for as long as
    it is kept up.

    Args:
        per_minute: the limit; 0 is none.
        clock, sleep: of seconds.
    """

    def __init__(
        self,
        per_minute: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free = 0.0  # when the next one may go

    async def take(self, amount: float = 1.0) -> None:
        """Returns when `amount` may go."""
        now = self._clock()
        start = max(now, self._free)
        self._free = start + amount * self._seconds
        if start > now:
            await self._sleep(start - now)

    def give_back(self, amount: float) -> None:
        """Of what was taken, so much was not used; below 0, so much more was."""
        self._free -= amount * self._seconds


class BudgetSpent(Exception):
    """What a call could take at most is more than what is left."""


class Budget:
    """Hard caps. The most that a call can take is reserved before it is made.

    Args:
        usd, tokens: the caps; 0 is none.
        spent_usd, spent_tokens: before now, with what is unknown at its most.

    Attributes:
        spent_usd, spent_tokens: so far.
    """

    def __init__(
        self,
        usd: float = 0.0,
        tokens: int = 0,
        *,
        spent_usd: float = 0.0,
        spent_tokens: int = 0,
    ):
        if usd < 0 or tokens < 0:
            raise Refused(f"budget of {usd} USD and {tokens} tokens; it must be 0 (none) or more")
        self.usd, self.tokens = usd, tokens
        self.spent_usd, self.spent_tokens = spent_usd, spent_tokens
        self._reserved_usd, self._reserved_tokens, self._calls = 0.0, 0, 0
        self._settled = asyncio.Condition()

    def left(self) -> str:
        """What is left, for people."""
        parts = []
        if self.usd:
            parts.append(f"{max(0.0, self.usd - self.spent_usd):.6g} of {self.usd:.6g} USD")
        if self.tokens:
            parts.append(f"{max(0, self.tokens - self.spent_tokens):,} of {self.tokens:,} tokens")
        return " and ".join(parts) or "no limit"

    async def reserve(self, usd: float, tokens: int) -> None:
        """Returns when that much is set apart; waits while calls under way may leave enough.

        Raises:
            BudgetSpent: they cannot.
        """
        if not (self.usd or self.tokens):
            return
        async with self._settled:
            while not self._fits(usd, tokens):
                if not self._calls or not self._fits(usd, tokens, reserved=False):
                    raise BudgetSpent(
                        f"the call could take {tokens:,} tokens and {usd:.6g} USD; "
                        f"the budget has {self.left()} left"
                    )
                await self._settled.wait()
            self._calls += 1
            self._reserved_usd += usd
            self._reserved_tokens += tokens

    def adopt(self, usd: float, tokens: int) -> None:
        """Reserves what was counted as spent before now, of a call that goes on where it was."""
        self.spent_usd -= usd
        self.spent_tokens -= tokens
        if self.usd or self.tokens:
            self._calls += 1
            self._reserved_usd += usd
            self._reserved_tokens += tokens

    def _fits(self, usd: float, tokens: int, *, reserved: bool = True) -> bool:
        usd += self.spent_usd + (self._reserved_usd if reserved else 0.0)
        tokens += self.spent_tokens + (self._reserved_tokens if reserved else 0)
        return (not self.usd or usd <= self.usd * (1 + 1e-12)) and (
            not self.tokens or tokens <= self.tokens
        )

    async def settle(
        self, usd: float, tokens: int, *, used_usd: float | None, used_tokens: int | None
    ) -> None:
        """Ends a reservation of `usd` and `tokens`; None is unknown and counts as all of it."""
        self.spent_usd += usd if used_usd is None else used_usd
        self.spent_tokens += tokens if used_tokens is None else used_tokens
        if not (self.usd or self.tokens):
            return
        async with self._settled:
            self._calls -= 1
            self._reserved_tokens -= tokens
            # What was added in another order does not subtract to nothing.
            self._reserved_usd = self._reserved_usd - usd if self._calls else 0.0
            self._settled.notify_all()
