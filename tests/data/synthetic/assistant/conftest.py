"""Training conversations of the help desk, drawn once."""

import pytest

from jaxconv.data.synthetic import assistant


@pytest.fixture(scope="session")
def corpus():
    return assistant.conversations(0, 2000)


@pytest.fixture(scope="session")
def exchanges(corpus):
    """(prompt, gold reply, kind of question) of every exchange."""
    return [
        (messages, c.messages[len(messages)].content, kind)
        for c in corpus
        for messages, kind in zip(assistant.prompts(c), c.meta["kinds"], strict=True)
    ]
