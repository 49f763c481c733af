"""A person at the keyboard as a player."""

from collections.abc import Sequence

from jaxconv.data.conversation import Message


class TerminalPlayer:
    """Shows what the agent hears and asks for its words; Ctrl-D or Ctrl-C leaves the program."""

    def __init__(self, agent: str):
        self._agent = agent

    def act(self, messages: Sequence[Message]) -> str:
        from rich.console import Console
        from rich.markup import escape

        console = Console()
        for message in messages:
            who = (
                ""
                if message.role == "system"
                else f"[bold]{escape(printable(message.name or ''))}:[/] "
            )
            console.print(f"{who}{escape(printable(message.content))}")
        return console.input(f"[bold green]{escape(self._agent)} (you):[/] ").strip()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """A person remembers."""


def printable(text: str) -> str:
    """`text` without what moves the cursor or changes the terminal: control characters become ?."""
    return "".join(c if c.isprintable() or c == " " else "?" for c in text)
