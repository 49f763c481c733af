"""One message of a conversation, as chat models know it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    `role` is "system", "user" or "assistant", seen from the one who reads the conversation: its own
    words are the assistant's. `name` tells speakers of the same role apart (None where there is
    only one).
    """

    role: str
    content: str
    name: str | None = None
