"""Conversations as inputs of tasks."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from jaxconv.data.conversation import Conversation
from jaxconv.llm.shortlist import Shortlist


class Turn(BaseModel):
    """One message; `number` counts from 1."""

    number: int
    role: str
    content: str


class Label(BaseModel):
    name: str
    description: str


class ConversationInput(BaseModel):
    """A conversation, and the labels that may be given to it, by the output's field.

    In a prompt `{{ transcript(turns) }}` shows the turns between tags, and
    `{{ label_list(labels.NAME) }}` the labels of a field with what they mean.
    """

    turns: list[Turn]
    labels: dict[str, list[Label]] = {}

    def text(self, role: str | None = None) -> str:
        """What was said, by one role or all, a line a turn."""
        return "\n".join(t.content for t in self.turns if role is None or t.role == role)


def input_of(
    conversation: Conversation, shortlists: Mapping[str, tuple[Shortlist, int]] | None = None
) -> ConversationInput:
    """The input for a conversation.

    Args:
        conversation: whose messages become turns. Tool calls are told as text.
        shortlists: by field, labels and how many of them to offer: those likeliest by their words;
            0 offers all.
    """
    turns = [
        Turn(
            number=number,
            role=message.role,
            content="\n".join(
                [
                    *([message.content] if message.content or not message.tool_calls else []),
                    *(f"[calls {call.name}({call.arguments})]" for call in message.tool_calls),
                ]
            ),
        )
        for number, message in enumerate(conversation.messages, 1)
    ]
    input = ConversationInput(turns=turns)
    offered = {
        field: shortlist.top(input.text("user"), k) if k else shortlist.names
        for field, (shortlist, k) in (shortlists or {}).items()
    }
    input.labels = {
        field: _described(names, shortlists[field][0]) for field, names in offered.items()
    }
    return input


def _described(names: Sequence[str], shortlist: Shortlist) -> list[Label]:
    return [Label(name=name, description=shortlist.descriptions[name]) for name in names]
