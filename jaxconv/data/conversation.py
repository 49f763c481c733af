"""Conversations and preference pairs, as chat models know them, and their own form on disk.

A record is one line of JSON: `{"id", "messages", "meta"}` or `{"id", "prompt", "chosen",
"rejected", "meta"}`, a message `{"role", "content"}` with `name` and `tool_calls` where it has any.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxconv.durable import publish
from jaxconv.errors import Refused

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant asks for: `arguments` is the JSON text as the model wrote it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    `role` is "system", "user", "assistant" or "tool", seen from the one who reads the conversation:
    its own words are the assistant's. `name` tells speakers of the same role apart (None where
    there is only one).
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. `meta` is JSON-able and is carried along, never read by training."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two ways to go on after the same `prompt`: `chosen` was preferred to `rejected`.

    `prompt` may be empty; `chosen` and `rejected` begin with an assistant's message and are not
    empty.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Record = Conversation | PreferencePair


class Invalid(ValueError):
    """A row that is no record.

    Attributes:
        field: where in the row, such as "messages[2].content"; "" for the row as a whole.
        reason: a short name to count by.
    """

    def __init__(self, field: str, reason: str, explanation: str):
        super().__init__(f"{field or 'the row'}: {explanation}")
        self.field, self.reason = field, reason


# ---------------------------------------------------------------- what a record must be


def check(record: Record) -> None:
    """Raises `Invalid` where a record breaks a rule.

    A conversation has a message of the assistant's, and none of those is without both words and
    tool calls: nothing could be learned from it. In a preference pair an empty answer is a fair
    alternative, so words may be empty there; but the two must differ, each ends with the
    assistant's words, and each begins with them, so that both answer the same prompt.
    """
    if isinstance(record, Conversation):
        _check_messages(record.messages, "messages")
        if not record.messages:
            raise Invalid("messages", "empty_conversation", "it has no messages")
        own = [(i, m) for i, m in enumerate(record.messages) if m.role == "assistant"]
        if not own:
            raise Invalid("messages", "no_assistant_message", "no message is the assistant's")
        for i, message in own:
            if not message.content.strip() and not message.tool_calls:
                where = f"messages[{i}].content"
                raise Invalid(where, "empty_assistant_message", "it has no words, no tool calls")
        return
    for name in ("chosen", "rejected"):
        answer = getattr(record, name)
        _check_messages(record.prompt + answer, "prompt", len(record.prompt), name)
        if not answer:
            raise Invalid(name, "empty_answer", "it has no messages")
        if answer[0].role != "assistant":
            raise Invalid(
                f"{name}[0].role", "different_prompts", f"it is {answer[0].role!r}, not 'assistant'"
            )
        if answer[-1].role != "assistant":
            last = f"{name}[{len(answer) - 1}].role"
            raise Invalid(last, "no_answer", f"the last role is {answer[-1].role!r}")
    if record.chosen == record.rejected:
        raise Invalid("chosen", "no_preference", "it equals rejected")


def _check_messages(
    messages: Sequence[Message], field: str, head: int | None = None, rest: str = ""
) -> None:
    """Rules for any messages; those from `head` on are in field `rest`."""
    systems = 0
    for i, message in enumerate(messages):
        in_head = head is None or i < head
        where = f"{field}[{i}]" if in_head else f"{rest}[{i - head}]"
        if message.role not in ROLES:
            allowed = ", ".join(ROLES)
            raise Invalid(
                f"{where}.role", "unknown_role", f"it is {message.role!r}; it may be {allowed}"
            )
        if message.role == "system":
            if systems:
                raise Invalid(f"{where}.role", "two_system_messages", "it is the second 'system'")
            if i:
                raise Invalid(f"{where}.role", "system_not_first", "'system' must come first")
            systems += 1
        if message.tool_calls and message.role != "assistant":
            raise Invalid(
                f"{where}.tool_calls", "misplaced_tool_calls", "only the assistant calls tools"
            )


# ---------------------------------------------------------------- records as rows of JSON

_NAMES = {str: "text", list: "a list", dict: "an object", int: "a whole number", bool: "a bool"}


def take(row: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
    """`row[key]`, which must be there and be a `kind`; `where` is the row's own place."""
    field = f"{where}.{key}" if where else key
    if key not in row:
        raise Invalid(field, "missing_field", "it is not there")
    return typed(row[key], kind, field)


def typed(value: Any, kind: type, field: str) -> Any:
    """`value`, which must be a `kind`."""
    if not isinstance(value, kind):
        found = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
        raise Invalid(field, "wrong_type", f"it is {found}; it must be {_NAMES[kind]}")
    return value


def to_row(record: Record) -> dict[str, Any]:
    """The record as an object of JSON; `from_row` is the inverse."""
    parts = ("messages",) if isinstance(record, Conversation) else ("prompt", "chosen", "rejected")
    row: dict[str, Any] = {"id": record.id}
    for part in parts:
        row[part] = [_message_row(message) for message in getattr(record, part)]
    return row | {"meta": record.meta}


def _message_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        row["name"] = message.name
    if message.tool_calls:
        row["tool_calls"] = [dataclasses.asdict(call) for call in message.tool_calls]
    return row


def from_row(row: Mapping[str, Any]) -> Record:
    """The record that `to_row` made this of.

    Raises:
        Invalid: it is not one.
    """
    name, meta = take(row, "id", str), take(row, "meta", dict)
    if "messages" in row:
        record: Record = Conversation(name, _messages(row, "messages"), meta)
    else:
        parts = (_messages(row, part) for part in ("prompt", "chosen", "rejected"))
        record = PreferencePair(name, *parts, meta)
    check(record)
    return record


def _messages(row: Mapping[str, Any], part: str) -> tuple[Message, ...]:
    found = []
    for i, message in enumerate(take(row, part, list)):
        where = f"{part}[{i}]"
        typed(message, dict, where)
        calls = typed(message.get("tool_calls", []), list, f"{where}.tool_calls")
        found.append(
            Message(
                take(message, "role", str, where),
                take(message, "content", str, where),
                take(message, "name", str, where) if "name" in message else None,
                tuple(_call(c, f"{where}.tool_calls[{j}]") for j, c in enumerate(calls)),
            )
        )
    return tuple(found)


def _call(call: Any, where: str) -> ToolCall:
    typed(call, dict, where)
    return ToolCall(
        take(call, "name", str, where),
        take(call, "arguments", str, where),
        take(call, "id", str, where) if call.get("id") is not None else None,
    )


def parse_line(line: bytes) -> dict[str, Any]:
    """The object of one line of JSON.

    Strict where Python is not: no NaN, no infinity, and no half of a surrogate pair, which no
    tokenizer takes.

    Raises:
        Invalid: it is not one.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise Invalid("", "invalid_utf8", f"byte {error.start} is not UTF-8") from None
    try:
        row = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Invalid("", "invalid_json", f"it is not JSON ({error})") from None
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Invalid("", "invalid_unicode", "it holds half of a surrogate pair") from None
    return typed(row, dict, "")


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _no_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too large")
    return value


def to_line(record: Record) -> str:
    """The record as one line of JSON, without the newline; NaN and the like are a `ValueError`."""
    return json.dumps(to_row(record), ensure_ascii=False, allow_nan=False)


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Writes records one a line and returns how many; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(to_line(record) + "\n")
            count += 1
    publish(partial, path)
    return count


def read_jsonl(path: Path) -> Iterator[Record]:
    """The records that `write_jsonl` wrote, one after the other.

    Raises:
        Refused: a line is no record; it names the file, the line and the field.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = from_row(parse_line(line))
            except Invalid as invalid:
                raise Refused(f"{path}, line {number}, {invalid}") from None
            yield record
