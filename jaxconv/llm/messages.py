"""What a model is told of its wrong answers, and how many tokens messages may take."""

from collections.abc import Sequence

from jaxconv.llm.failures import ANSWERS, Failure
from jaxconv.llm.prompt import ChatMessage

_SHOWN = 4000  # characters of a wrong answer that the model is shown again


def feedback(tried: Sequence[Failure]) -> list[ChatMessage]:
    """What the model is told of its last wrong answer."""
    wrong = next((failure for failure in reversed(tried) if failure.kind in ANSWERS), None)
    if wrong is None:
        return []
    shown = (wrong.raw or "")[:_SHOWN] or "(nothing)"
    return [
        {"role": "assistant", "content": shown},
        {
            "role": "user",
            "content": f"That is not a valid answer: {wrong.message}. Answer again, with one JSON "
            "object that fits the schema and nothing else.",
        },
    ]


def size_of(messages: Sequence[ChatMessage]) -> int:
    """Bytes of their words."""
    return sum(len(message["content"].encode()) for message in messages)


def most_tokens(messages: Sequence[ChatMessage], max_tokens: int) -> int:
    """Tokens that a call can take at most: no tokenizer makes more of a text than it has bytes, and
    the schema, which is in the first message, may be sent a second time."""
    return size_of(messages) + 64 * len(messages) + size_of(messages[:1]) + max_tokens


def about_tokens(messages: Sequence[ChatMessage]) -> int:
    """Tokens of messages, about: four bytes each."""
    return size_of(messages) // 4 + 1
