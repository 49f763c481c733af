"""Conversations: OpenAI's, ShareGPT's and WildChat's rows, and TRL's prompts with completions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxconv.data.conversation import Conversation, Invalid, Message, ToolCall, take, typed

Row = Mapping[str, Any]

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


# ---------------------------------------------------------------- OpenAI


def read_openai(row: Row, name: str) -> list[Conversation]:
    """`{"messages": [{"role", "content", …}], …}`, OpenAI's chat and fine-tuning form.

    What the row holds besides messages and id becomes `meta`, and so does what it holds under
    `meta` or `metadata`. A tool's answer gets the name of the
    tool whose call it answers. A `weight` of 0, which takes an answer out of the loss, is not
    supported.
    """
    messages = openai_messages(take(row, "messages", list), "messages")
    meta = rest(row, "id", "messages")
    for field in ("metadata", "meta"):
        if isinstance(meta.get(field), dict):
            meta = {**meta.pop(field), **meta}
    return [Conversation(row_id(row, ("id",), name), messages, meta)]


def openai_messages(found: Sequence[Any], field: str) -> tuple[Message, ...]:
    """Messages of OpenAI's form; `field` is where they stand in the row."""
    messages: list[Message] = []
    tools: dict[str, str] = {}  # tool by id of the call
    for i, message in enumerate(found):
        where = f"{field}[{i}]"
        typed(message, dict, where)
        role = _role(take(message, "role", str, where), OPENAI_ROLES, f"{where}.role")
        if message.get("weight") not in (None, 1):
            raise Invalid(
                f"{where}.weight", "unsupported_weight", f"it is {message['weight']!r}, not 1"
            )
        calls = _tool_calls(message, where)
        tools |= {call.id: call.name for call in calls if call.id is not None}
        speaker = message.get("name")
        if speaker is not None:
            typed(speaker, str, f"{where}.name")
        elif role == "tool" and "tool_call_id" in message:
            answered = take(message, "tool_call_id", str, where)
            if answered not in tools:
                raise Invalid(
                    f"{where}.tool_call_id", "unknown_tool_call", f"no call before has {answered!r}"
                )
            speaker = tools[answered]
        messages.append(Message(role, _content(message, where, bool(calls)), speaker, calls))
    return tuple(messages)


def _content(message: Row, where: str, may_be_null: bool) -> str:
    """Words that are a string or a list of parts; null beside tool calls."""
    content, field = message.get("content"), f"{where}.content"
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        return take(message, "content", str, where)
    words = []
    for i, part in enumerate(content):
        typed(part, dict, f"{field}[{i}]")
        kind = take(part, "type", str, f"{field}[{i}]")
        if kind != "text":
            raise Invalid(
                f"{field}[{i}].type", "unsupported_part", f"it is {kind!r}; it must be 'text'"
            )
        words.append(take(part, "text", str, f"{field}[{i}]"))
    return "".join(words)


def _tool_calls(message: Row, where: str) -> tuple[ToolCall, ...]:
    """`tool_calls`, or the `function_call` that they replaced."""
    if message.get("function_call") is not None:
        call = typed(message["function_call"], dict, f"{where}.function_call")
        return (_function(call, f"{where}.function_call", None),)
    calls = message.get("tool_calls")
    found = []
    for i, call in enumerate(typed([] if calls is None else calls, list, f"{where}.tool_calls")):
        field = f"{where}.tool_calls[{i}]"
        typed(call, dict, field)
        identity = take(call, "id", str, field) if call.get("id") is not None else None
        found.append(_function(take(call, "function", dict, field), f"{field}.function", identity))
    return tuple(found)


def _function(function: Row, where: str, identity: str | None) -> ToolCall:
    """Arguments are JSON text; some files hold the object itself, which is written as JSON."""
    name, arguments = take(function, "name", str, where), function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name, typed(arguments, str, f"{where}.arguments"), identity)


# ---------------------------------------------------------------- ShareGPT


def read_sharegpt(row: Row, name: str) -> list[Conversation]:
    """`{"conversations": [{"from", "value"}], …}`; a string `system` beside it comes first."""
    messages = []
    if row.get("system"):
        messages.append(Message("system", take(row, "system", str)))
    for i, turn in enumerate(take(row, "conversations", list)):
        where = f"conversations[{i}]"
        typed(turn, dict, where)
        speaker, words = take(turn, "from", str, where), take(turn, "value", str, where)
        role = _role(speaker, SHAREGPT_ROLES, f"{where}.from")
        if speaker == "function_call":
            messages.append(Message(role, "", None, (_called(words, f"{where}.value"),)))
        else:
            messages.append(Message(role, words))
    meta = rest(row, "id", "conversations", "system")
    return [Conversation(row_id(row, ("id",), name), tuple(messages), meta)]


def _called(words: str, where: str) -> ToolCall:
    try:
        call = json.loads(words)
    except ValueError:
        raise Invalid(where, "invalid_tool_call", "it is not JSON") from None
    return _function(typed(call, dict, where), where, None)


# ---------------------------------------------------------------- WildChat


def read_wildchat(row: Row, name: str) -> list[Conversation]:
    """A row of WildChat (Zhao et al., ICLR 2024): `conversation` with metadata of each message.

    `meta` holds all other fields of the row (`language`, `toxic`, `redacted`, `model`, …) and, as
    `messages`, those of each message.
    """
    messages, details = [], []
    for i, message in enumerate(take(row, "conversation", list)):
        where = f"conversation[{i}]"
        typed(message, dict, where)
        role = _role(take(message, "role", str, where), OPENAI_ROLES, f"{where}.role")
        messages.append(Message(role, take(message, "content", str, where)))
        details.append(rest(message, "role", "content"))
    identity = row_id(row, ("conversation_hash", "conversation_id"), name)
    meta = rest(row, "conversation", "conversation_hash", "conversation_id")
    return [Conversation(identity, tuple(messages), meta | {"messages": details})]


# ---------------------------------------------------------------- TRL


def read_completion(row: Row, name: str) -> list[Conversation]:
    """`{"prompt", "completion"}`, each a list of messages or a string.

    A string is what the user (`prompt`) or the assistant (`completion`) says: there is no text
    outside a chat template. What the assistant says in the prompt is learned too. A `label` of
    false, as unpaired preferences have it, says that nobody wants this completion.
    """
    if row.get("label") is False:
        raise Invalid("label", "unwanted_completion", "it is false; only wanted ones are learned")
    completion = said(row, "completion", "assistant")
    if all(message.role != "assistant" for message in completion):
        raise Invalid("completion", "no_answer", "no message is the assistant's")
    messages = said(row, "prompt", "user") + completion
    meta = rest(row, "id", "prompt", "completion")
    return [Conversation(row_id(row, ("id",), name), messages, meta)]


# ---------------------------------------------------------------- shared with other readers


def said(row: Row, key: str, role: str) -> tuple[Message, ...]:
    """Messages of OpenAI's form, or a string that one of `role` says; an empty one of the user's
    is no message."""
    if not isinstance(row.get(key), str):
        return openai_messages(take(row, key, list), key)
    return (Message(role, row[key]),) if row[key] or role == "assistant" else ()


def row_id(row: Row, keys: Sequence[str], name: str) -> str:
    """The row's own id, a string or a number; `name` where it has none."""
    for key in keys:
        if row.get(key) is not None:
            found = row[key]
            return str(found) if isinstance(found, int) else typed(found, str, key)
    return name


def rest(row: Row, *taken: str) -> dict[str, Any]:
    """What a row holds besides the fields that were `taken`."""
    return {key: value for key, value in row.items() if key not in taken}


def _role(found: str, roles: Mapping[str, str], field: str) -> str:
    if found not in roles:
        raise Invalid(
            field, "unknown_role", f"it is {found!r}; it may be {', '.join(sorted(roles))}"
        )
    return roles[found]
