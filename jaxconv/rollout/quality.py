"""Which turns are degenerate: OMAR's mitigation of reward hacking, turn-level filtering.

A flagged turn earns no turn advantage, neither praise nor blame, while the turns before it keep
their credit (`hierarchical_advantages(keep_turns=…)`). Here rules decide; a judge may be asked too.
"""

import dataclasses
from collections.abc import Sequence

from jaxconv.rollout.selfplay import Played


@dataclasses.dataclass(frozen=True)
class QualityRules:
    """What makes a turn degenerate.

    Attributes:
        repeated_ngram: this many words in a row that occur `repeats` times in one turn.
        repeats: at least 2.
        min_logprob: mean log-prob of the turn's tokens, nats, below which it is gibberish.
    """

    repeated_ngram: int = 3
    repeats: int = 3
    min_logprob: float = -4.0


REASONS = ("empty", "repetition", "gibberish")


def degenerate(text: str, logprobs: Sequence[float], rules: QualityRules) -> str | None:
    """One of `REASONS`, or None for a turn that passes.

    A turn that was cut at its budget passes: what it costs in the environment has to be felt. With
    the unfinished ones left out, long turns would be credited whenever they come to an end and
    never blamed, and grow.

    Args:
        text: the words.
        logprobs: of the sampled tokens, nats.
        rules: thresholds.
    """
    words = text.split()
    if not words:
        return "empty"
    n = rules.repeated_ngram
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if any(grams.count(gram) >= rules.repeats for gram in set(grams)):
        return "repetition"
    if sum(logprobs) / len(logprobs) < rules.min_logprob:
        return "gibberish"
    return None


def review(
    games: Sequence[Played], end_token: int, rules: QualityRules
) -> tuple[list[list[list[bool]]], dict[str, float]]:
    """Verdicts [game][seat][turn] on every sampled turn, and the share of turns per reason and of
    those that were cut ("unfinished"), which pass."""
    counts = dict.fromkeys((*REASONS, "unfinished"), 0)
    turns = 0
    verdicts = []
    for game in games:
        seats = []
        for seat, stream in enumerate(game.streams):
            kept = []
            for turn in range(stream.turns):
                at = [i for i, t in enumerate(stream.turn) if t == turn]
                reason = degenerate(
                    game.texts[seat][turn],
                    [stream.logprob[i] for i in at],
                    rules,
                )
                turns += 1
                counts["unfinished"] += stream.tokens[at[-1]] != end_token
                kept.append(reason is None)
                if reason:
                    counts[reason] += 1
            seats.append(kept)
        verdicts.append(seats)
    return verdicts, {reason: count / max(turns, 1) for reason, count in counts.items()}
