"""A model in this process that says what a test tells it to."""

import asyncio

from jaxconv.llm.backends.base import Answer, Call


class Scripted:
    """`script(call)` returns a text, an `Answer` or an error to raise, or raises it itself."""

    model, is_model = "scripted", True

    def __init__(self, script, price=None):
        self._script, self.price = script, price
        self.calls: list[Call] = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    async def ask(self, call):
        self.calls.append(call)
        await asyncio.sleep(0)
        said = self._script(call)
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Answer) else Answer(said, False, 10, 5)
