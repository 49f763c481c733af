"""A person at the keyboard as a player."""

from collections.abc import Sequence

from jaxconv.data.conversation import Message


class TerminalPlayer:
    """Shows what the agent hears and asks for its words; Ctrl-D or Ctrl-C leaves the program."""

    def __init__(self):
        from rich.console import Console

        self._console = Console()
        self._agent = self._rules = ""

    def sit_down(self, agent: str, rules: str) -> "TerminalPlayer":
        """Speaks for `agent` from now on; the rules are shown below its brief."""
        self._agent, self._rules = agent, rules
        return self

    def act(self, messages: Sequence[Message]) -> str:
        for message in messages:
            if message.role == "system":
                self.read(message.content)
                if self._rules not in message.content:
                    self.read(self._rules)
            else:
                self.hear(message.name or "", message.content)
        return self._console.input(f"[bold green]{_shown(self._agent)} (you):[/] ").strip()

    def hear(self, name: str, text: str) -> None:
        """Shows what somebody said."""
        self._console.print(f"[bold]{_shown(name)}:[/] {_shown(text)}")

    def read(self, text: str) -> None:
        """Shows lines that nobody said."""
        for line in text.splitlines():
            self._console.print(_shown(line))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """A person remembers."""


def _shown(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))


def printable(text: str) -> str:
    """`text` without what moves the cursor or changes the terminal: control characters become ?."""
    return "".join(c if c.isprintable() or c == " " else "?" for c in text)
