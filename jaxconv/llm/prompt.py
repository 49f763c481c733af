"""Prompts: Markdown files with slots, known by the hash of their text."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxconv.errors import Refused
from jaxconv.llm.failures import InvalidInput

ChatMessage = dict[str, str]
"""`{"role", "content"}`, as chat completions take it."""

_HEADING = re.compile(r"^# (System|User|Assistant)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A template of Jinja in Markdown; `# System`, `# User` and `# Assistant` begin a message.

    Text without such a heading is the user's. `{{ field }}` is a field of the task's input.
    Whatever a slot puts in has its `&`, `<` and `>` escaped, so a template may put a conversation
    between tags and nothing said in it can end them.

    Attributes:
        name: what errors call it.
        text: of the template.
    """

    name: str
    text: str

    @classmethod
    def load(cls, path: str | Path) -> "Prompt":
        """The prompt in a file.

        Raises:
            Refused: there is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise Refused(f"prompt {path}: no such file; it must be a Markdown file")
        return cls(path.name, path.read_text(encoding="utf-8"))

    @property
    def version(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def check(self, fields: Sequence[str]) -> None:
        """Refuses a template that is none, and one with a slot that no field fills."""
        from jinja2 import TemplateSyntaxError, meta

        try:
            found = meta.find_undeclared_variables(_environment().parse(self.text))
            slots = found - set(_environment().globals)
        except TemplateSyntaxError as error:
            raise Refused(f"prompt {self.name}, line {error.lineno}: {error.message}") from None
        if unknown := sorted(slots - set(fields)):
            raise Refused(
                f"prompt {self.name}: no field fills the slot {unknown[0]!r}; "
                f"it may be {', '.join(fields)}"
            )

    def render(self, fields: Mapping[str, Any]) -> list[ChatMessage]:
        """The messages, with the slots filled.

        Raises:
            InvalidInput: they cannot be, with these fields.
        """
        from jinja2 import TemplateError

        try:
            return [
                {"role": role, "content": part if isinstance(part, str) else part.render(fields)}
                for role, part in _compiled(self.text)
            ]
        except TemplateError as error:
            raise InvalidInput(f"prompt {self.name}: {error.message}") from None
        except Exception as error:  # of an expression in it, with these fields
            message = f"prompt {self.name}: {type(error).__name__}: {error}"
            raise InvalidInput(message) from error


def escape(text: str) -> str:
    """`text` so that nothing in it ends or begins a tag; `unescape` is the inverse."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def unescape(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def is_quoted(quote: str, text: str) -> bool:
    """Whether `quote` stands in `text`, as it is or as a prompt shows it. Spaces, capitals and the
    form of quotation marks and dashes do not matter, nor do quotation marks around it all."""
    words = _plain(text)
    forms = [_plain(quote), _plain(unescape(quote))]
    return any(form and form in words for own in forms for form in (own, own.strip("\"'")))


_FORMS = str.maketrans("‘’‚‛′“”„‟″«»‐‑–—−", "'" * 5 + '"' * 7 + "-" * 5)


def _plain(text: str) -> str:
    return " ".join(text.translate(_FORMS).casefold().split())


class _Safe(str):
    """Text that has been escaped already."""


def _transcript(turns: Sequence[Any]) -> _Safe:
    """Turns (`number`, `role`, `content`) between tags, a line each."""
    return _Safe(
        "\n".join(
            f'<turn number="{turn.number}" role="{escape(turn.role)}">{escape(turn.content)}</turn>'
            for turn in turns
        )
    )


def _label_list(labels: Sequence[Any]) -> _Safe:
    """Labels (`name`, `description`), a line each."""
    return _Safe(
        "\n".join(
            escape(f"- {label.name}: {label.description}".removesuffix(": ")) for label in labels
        )
    )


@functools.cache
def _environment():
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, _Safe) else escape(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"transcript": _transcript, "label_list": _label_list}
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[tuple[str, Any], ...]:
    """(role, template) of each message, or its words where nothing is filled in. Taken apart before
    anything is: no input can begin a message."""
    before, *parts = _HEADING.split(text)
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    if before.strip():
        pairs.insert(0, ("User", before))
    make = _environment().from_string
    return tuple(
        (role.lower(), make(body.strip()) if "{" in body else body.strip()) for role, body in pairs
    )
