"""Conversations with tools, rendered turn by turn by the chat template itself.

How a call looks and where a tool's answer stands (in a turn of its own, or in a user's) differs
between families. So nothing is taken apart here: what the assistant says is what a rendering has
more than the generation prompt before it, and what it reads is the rest.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxconv.data.conversation import Message, ToolCall
from jaxconv.data.template_parts import Unlike

Tools = Sequence[Mapping[str, Any]]
"""Definitions of tools in OpenAI's form: functions with JSON schemas of their parameters."""

CALL = ToolCall("tool_2", '{"key": "VALUE3"}', "call00001")
TALK = (
    Message("user", "USER1"),
    Message("assistant", "", None, (CALL,)),
    Message("tool", "RESULT4", CALL.name),
    Message("assistant", "REPLY5"),
)
DEFINITION = {
    "type": "function",
    "function": {
        "name": CALL.name,
        "description": "DESCRIPTION6",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


def has_tools(view: Sequence[Message]) -> bool:
    """Whether a tool is called or answers."""
    return any(message.role == "tool" or message.tool_calls for message in view)


@dataclasses.dataclass(frozen=True)
class ToolRendering:
    """A chat template that shows calls and answers of tools.

    Attributes:
        tokenizer: whose template it is.
        end: the marker that ends what the assistant says.
        defines: whether the template shows definitions of tools.
    """

    tokenizer: Any
    end: str
    defines: bool

    def turns(self, view: Sequence[Message], tools: Tools) -> list[tuple[list[int], list[int]]]:
        """Ids by the assistant's turns, as `ChatTemplate.turns` gives them.

        Raises:
            Unlike: the template does not show this conversation as it is: it changes what stood
                before a message, drops words or raises an error; or words hold its markup.
        """
        if tools and not self.defines:
            raise Unlike("it shows no definitions of tools")
        self._check_words(view, tools)
        return [
            (self._ids(read), self._ids(said)) for read, said in self._texts(messages(view), tools)
        ]

    def _texts(self, talk: Sequence[dict[str, Any]], tools: Tools) -> Iterator[tuple[str, str]]:
        before, heard = "", 0
        for i, message in enumerate(talk):
            if message["role"] != "assistant":
                continue
            prompt, whole = render(self.tokenizer, talk[:i], tools, prompt=True), ""
            if prompt.startswith(before):
                whole = render(self.tokenizer, talk[: i + 1], tools)
            if not whole.startswith(prompt):
                raise Unlike(f"adding message {i + 1} changes what stood before it")
            said, end, _ = whole[len(prompt) :].rpartition(self.end)
            if not end:
                raise Unlike(f"message {i + 1} does not end with {self.end!r}")
            for words in (word for m in talk[heard:i] for word in _words(m)):
                _check_shown(words, prompt[len(before) :])
            for words in _words(message):
                _check_shown(words, said)
            yield prompt[len(before) :], said + end
            before, heard = prompt + said + end, i + 1

    def _check_words(self, view: Sequence[Message], tools: Tools) -> None:
        markers = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        texts = [text for m in view for text in (m.content, m.name or "", *_calls(m))]
        for text in (*texts, *(json.dumps(tool, ensure_ascii=False) for tool in tools)):
            for marker in (self.end, *markers):
                if marker in text:
                    raise Unlike(f"the markup {marker!r} stands in its words")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def find(tokenizer: Any, end: str) -> ToolRendering | str:
    """How a tokenizer's template shows tools; or, in one line, why it does not.

    Args:
        tokenizer: its ids of a text are those of its turns one by one, or it is no good here.
        end: the marker that ends what the assistant says.
    """
    try:
        defined = render(tokenizer, messages(TALK[:1]), [DEFINITION])
        found = ToolRendering(tokenizer, end, defines=_is_defined(defined))
        said = "".join(text for _, text in found._texts(messages(TALK), ()))
        for words in ("key", "VALUE3"):
            _check_shown(words, said)
        ids = [i for turn in found.turns(TALK, ()) for part in turn for i in part]
        whole = found._ids(render(tokenizer, messages(TALK), ()))
    except Unlike as unlike:
        return f"of a call that was tried, {unlike}"
    if whole[: len(ids)] != ids:
        return "its tokenizer gives other ids to a conversation than to its turns one by one"
    return found


def empty_think(tokenizer: Any) -> str | None:
    """Qwen3's template in its non-thinking form, every turn rendered alike, with tools.

    How tools are defined is taken from the tokenizer's own template. Without the empty thoughts all
    else must be what that one makes of a history; where it is not, this is None.
    """
    system, user = Message("system", "SYSTEM0"), TALK[0]
    try:
        defined = render(tokenizer, messages([system, user]), [DEFINITION])
        before, definition, after = defined.partition(json.dumps(DEFINITION, ensure_ascii=False))
        head = before.removeprefix("<|im_start|>system\nSYSTEM0\n\n").removesuffix("\n")
        foot = after.removesuffix("<|im_start|>user\nUSER1<|im_end|>\n")
        template = EMPTY_THINK_TOOLS
        for place, text in (("HEAD", head), ("FOOT", foot)):
            template = template.replace(place, json.dumps(text, ensure_ascii=False))
        for talk in ((*TALK, user), (system, *TALK, TALK[2], TALK[2], *TALK, user)):
            for tools in ((), (DEFINITION, DEFINITION)):
                ours = render(tokenizer, messages(talk), tools, chat_template=template)
                if ours.replace(EMPTY_THINK, "") != render(tokenizer, messages(talk), tools):
                    return None
    except Unlike:
        return None
    return template if definition else None


EMPTY_THINK = "<think>\n\n</think>\n\n"
EMPTY_THINK_TOOLS = (
    "{%- if tools -%}"
    "{{ '<|im_start|>system\n' }}"
    "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] + '\n\n' }}{%- endif -%}"
    "{{ HEAD }}{%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}{{ FOOT }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}"
    "{{ '<|im_start|>user' }}"
    "{%- endif -%}"
    "{{ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- elif not (tools and loop.first and message['role'] == 'system') -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ message['content'] }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- if message['content'] or not loop.first -%}{{ '\n' }}{%- endif -%}"
    "{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] }}"
    "{{ '\", \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}"
    "{%- endfor -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    "{%- endif -%}"
)
"""HEAD and FOOT stand for strings around the definitions of tools."""


def _is_defined(text: str) -> bool:
    return CALL.name in text and "DESCRIPTION6" in text


def messages(view: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates take them; what several users say becomes one message, as it does where
    there are no tools."""
    talk: list[dict[str, Any]] = []
    for message in view:
        words = message.content
        if message.role == "user" and message.name:
            words = f"{message.name}: {words}"
        if message.role == "user" and talk and talk[-1]["role"] == "user":
            talk[-1]["content"] += f"\n{words}"
            continue
        talk.append({"role": message.role, "content": words})
        if message.role == "tool" and message.name:
            talk[-1]["name"] = message.name
        if message.tool_calls:
            talk[-1]["tool_calls"] = [_call(call) for call in message.tool_calls]
    return talk


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise Unlike(f"the arguments of its call to {call.name!r} are not an object of JSON")
    identity = {} if call.id is None else {"id": call.id}
    function = {"name": call.name, "arguments": arguments}
    return {**identity, "type": "function", "function": function}


def render(
    tokenizer: Any,
    talk: Sequence[dict[str, Any]],
    tools: Tools,
    *,
    prompt: bool = False,
    chat_template: str | None = None,
) -> str:
    """What the tokenizer's template, or another, makes of `messages`; `Unlike` where it raises an
    error."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(talk),
            tools=list(tools) or None,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise Unlike(f"it refuses a turn: {' '.join(str(error).split())}") from None


def _words(message: Mapping[str, Any]) -> list[str]:
    calls = message.get("tool_calls", ())
    return [message["content"], *(call["function"]["name"] for call in calls)]


def _calls(message: Message) -> Iterator[str]:
    for call in message.tool_calls:
        yield from (call.name, call.arguments)


def _check_shown(words: str, text: str) -> None:
    """Words as they are, or as a string of JSON, in which Llama 3 puts what a tool answers."""
    words = words.strip()
    if words not in text and json.dumps(words, ensure_ascii=False)[1:-1] not in text:
        shown = words if len(words) <= 40 else f"{words[:40]}…"
        raise Unlike(f"{shown!r} is not rendered as it is")
