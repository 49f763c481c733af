"""Dialogues whose turns annotators have rated, as sets of user satisfaction are published.

A dialogue is a block of lines, which a blank line ends. A line has four cells with a tab between
them: role, text, action, ratings; the last two may be empty or left out. Ratings are whole numbers
with commas between them, one an annotator. In the last line of a block `OVERALL` may stand as role
or as text: its ratings are of the dialogue as a whole.

The label rule. A set of ratings is "sat" where its mean is above the neutral rating, "dsat" where
it is below, and "neutral" where it is exactly that. The label of a dialogue is that of its OVERALL
line. Where it has none, it is that of its turns: the first that is not neutral, since what follows
a contradiction is not counted; "neutral" where all are; and there is no label where nothing is
rated.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from jaxconv.data.conversation import Conversation, Invalid, Message, take

NEUTRAL = 3
"""Of ratings from 1 to 5, which published sets have."""

LABELS = ("sat", "dsat", "neutral")
OVERALL = "OVERALL"
ROLES = {"USER": "user", "SYSTEM": "assistant", "AGENT": "assistant", "ASSISTANT": "assistant"}


def label_of(ratings: Sequence[int], neutral: float = NEUTRAL) -> str | None:
    """The label of ratings of the same thing, exactly; None where there is none."""
    if not ratings:
        return None
    total, middle = Fraction(sum(ratings)), Fraction(neutral) * len(ratings)
    return "neutral" if total == middle else "sat" if total > middle else "dsat"


def dialogue_label(
    overall: Sequence[int], turns: Sequence[Sequence[int]], neutral: float = NEUTRAL
) -> str | None:
    """The label of a dialogue by the rule above.

    Args:
        overall: ratings of all of it.
        turns: ratings of each turn, in order.
        neutral: what stands between satisfied and dissatisfied.
    """
    if overall:
        return label_of(overall, neutral)
    labels = [label for label in (label_of(ratings, neutral) for ratings in turns) if label]
    return next((label for label in labels if label != "neutral"), labels[0] if labels else None)


def read_rated(row: Mapping[str, Any], name: str) -> list[Conversation]:
    """A block of lines, by their numbers in the file.

    `meta` holds `label` (by `dialogue_label` with `NEUTRAL`; left out where nothing is rated),
    `overall` (ratings), `ratings` (of each message, in order) and `actions` (of each message).
    """
    messages, ratings, actions, overall = [], [], [], []
    lines = list(take(row, "block", dict).items())
    for i, (number, cells) in enumerate(lines):
        where = f"line {number}"
        if not 2 <= len(cells) <= 4:
            raise Invalid(
                where,
                "wrong_cells",
                f"it has {len(cells)} cells; it must have role, text, action and ratings",
            )
        role, text, action, given = (*cells, "", "")[:4]
        rated = _ratings(given, where)
        if OVERALL in (role.strip(), text.strip()):
            if i != len(lines) - 1:
                raise Invalid(where, "early_overall", f"{OVERALL} must be the dialogue's last line")
            overall = rated
            continue
        if role.strip().upper() not in ROLES:
            raise Invalid(
                f"{where}, role", "unknown_role", f"it is {role!r}; it may be {', '.join(ROLES)}"
            )
        messages.append(Message(ROLES[role.strip().upper()], text.strip()))
        ratings.append(rated)
        actions.append(action.strip())
    label = dialogue_label(overall, ratings)
    meta = {"overall": overall, "ratings": ratings, "actions": actions}
    return [Conversation(name, tuple(messages), meta | ({"label": label} if label else {}))]


def _ratings(cell: str, where: str) -> list[int]:
    found = [part.strip() for part in cell.split(",") if part.strip()]
    for part in found:
        if not re.fullmatch(r"-?[0-9]+", part):
            raise Invalid(
                f"{where}, ratings", "not_a_rating", f"it has {part!r}; it must be whole numbers"
            )
    return [int(part) for part in found]
