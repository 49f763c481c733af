"""SOTOPIA's episode logs (Zhou et al., ICLR 2024): a conversation for each agent's view."""

import re
from collections.abc import Mapping
from typing import Any

from jaxconv.data.conversation import Conversation, Invalid, Message, take, typed
from jaxconv.data.readers.chat import rest, row_id

ENVIRONMENT = "Environment"
NOTHING = "did nothing"

_SAID = re.compile(r'said: "(.*)"', re.DOTALL)


def read_sotopia(row: Mapping[str, Any], name: str) -> list[Conversation]:
    """An `EpisodeLog`: `messages` by turn, each (sender, receiver, text), the briefs first.

    What the environment tells an agent in the first turn is its brief, the system message. After
    that an agent's own turns are the assistant's and those of the others the user's, with their
    names; words stand without the `said: "…"` around them, other actions as they are, and "did
    nothing" is nobody's message. The environment's later messages repeat what was said and are not
    read. Agents that said nothing have no view. `meta` holds the other fields, `agent`, and as
    `reward` the agent's own of `rewards`.
    """
    turns = [
        [_message(message, f"messages[{i}][{j}]") for j, message in enumerate(turn)]
        for i, turn in enumerate(_lists(take(row, "messages", list)))
    ]
    if not turns:
        raise Invalid("messages", "empty_conversation", "it has no messages")
    briefs = {receiver: text for sender, receiver, text in turns[0] if sender == ENVIRONMENT}
    if not briefs:
        raise Invalid("messages[0]", "no_brief", f"no message is from {ENVIRONMENT!r}")
    said = []
    for i, turn in enumerate(turns):
        for j, (sender, _, text) in enumerate(turn):
            if sender == ENVIRONMENT or text == NOTHING:
                continue
            if sender not in briefs:
                raise Invalid(f"messages[{i}][{j}]", "no_brief", f"{sender!r} was given none")
            words = _SAID.fullmatch(text)
            said.append((sender, words[1] if words else text))
    if not said:
        raise Invalid("messages", "no_assistant_message", "no agent said anything")

    rewards = row.get("rewards")
    rewards = [] if rewards is None else typed(rewards, list, "rewards")
    identity = row_id(row, ("id", "pk"), name)
    views = []
    for seat, (agent, brief) in enumerate(briefs.items()):
        if all(sender != agent for sender, _ in said):
            continue
        talk = [
            Message("assistant", words) if sender == agent else Message("user", words, sender)
            for sender, words in said
        ]
        meta = rest(row, "id", "pk", "messages", "rewards") | {
            "agent": agent,
            "reward": rewards[seat] if seat < len(rewards) else None,
        }
        views.append(Conversation(f"{identity}/{agent}", (Message("system", brief), *talk), meta))
    return views


def _lists(turns: list[Any]) -> list[list[Any]]:
    return [typed(turn, list, f"messages[{i}]") for i, turn in enumerate(turns)]


def _message(message: Any, where: str) -> tuple[str, str, str]:
    """(sender, receiver, text)."""
    typed(message, list, where)
    if len(message) != 3:
        raise Invalid(where, "wrong_type", f"it has {len(message)} entries; it must have 3")
    sender, receiver, text = (typed(x, str, f"{where}[{k}]") for k, x in enumerate(message))
    return sender, receiver, text
