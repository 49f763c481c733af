"""One append-only token stream: everything that one agent of one conversation reads and says."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Stream:
    """Ids and what belongs to each of them, in lockstep; every list has one entry a token.

    Attributes:
        tokens: ids; sampled ones stay as they were sampled.
        turn: index of the own turn that a token belongs to, -1 for what the agent read.
        logprob: log-prob under the distribution that the token was sampled from, 0 for read tokens.
        value: critic before the token, 0 for read tokens.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    turn: list[int] = dataclasses.field(default_factory=list)
    logprob: list[float] = dataclasses.field(default_factory=list)
    value: list[float] = dataclasses.field(default_factory=list)
    turns: int = 0

    def hear(self, tokens: Sequence[int]) -> None:
        """Appends tokens that the agent did not choose."""
        self.tokens += tokens
        self.turn += [-1] * len(tokens)
        self.logprob += [0.0] * len(tokens)
        self.value += [0.0] * len(tokens)

    def say(
        self, tokens: Sequence[int], logprobs: Sequence[float], values: Sequence[float]
    ) -> None:
        """Appends one turn of the agent's own, as sampled."""
        if not len(tokens) == len(logprobs) == len(values):
            raise ValueError(
                f"{len(tokens)} tokens, {len(logprobs)} log-probs, {len(values)} values"
            )
        self.tokens += tokens
        self.turn += [self.turns] * len(tokens)
        self.logprob += logprobs
        self.value += values
        self.turns += 1
