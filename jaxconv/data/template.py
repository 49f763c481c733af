"""How a conversation becomes one append-only token stream.

A chat template is a Jinja program over the whole history. A stream cannot be rendered again at
every turn: the ids that the model sampled must stay as sampled. So the template is taken apart
once, by rendering probe conversations, into what stands before and after the words of each role.
That works for templates that *concatenate*: rendering one message more only appends. Families known
not to (Qwen3 strips the thinking out of its history) get a concatenating form of the same markup;
any other is refused by name.
"""

import dataclasses
import logging
from collections.abc import Sequence

from jaxconv.data.conversation import Message
from jaxconv.errors import Refused

CHATML_EMPTY_THINK = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    "{%- endif -%}"
)
"""Qwen3's markup in its non-thinking form, every turn rendered alike."""

PROBES = (
    ("system", "SYSTEM0"),
    ("user", "USER1"),
    ("assistant", "REPLY2"),
    ("user", "USER3"),
    ("assistant", "REPLY4"),
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Token ids around each role's words, for one tokenizer.

    Attributes:
      system: ids (before, after) a system message, the beginning-of-sequence marker included.
      user: ids (before, after) a user message.
      reply: ids of the generation prompt, after which the model speaks.
      end: the id that the model samples to end its turn.
      after_end: ids that follow `end` before the next message (a newline in ChatML).
    """

    tokenizer: object
    system: tuple[tuple[int, ...], tuple[int, ...]]
    user: tuple[tuple[int, ...], tuple[int, ...]]
    reply: tuple[int, ...]
    end: int
    after_end: tuple[int, ...]

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the messages that reach a speaker between two turns of its own.

        System messages come first. What several others said becomes one user message, one line a
        speaker, because many templates refuse two user messages in a row.
        """
        ids: list[int] = []
        for message in messages:
            if message.role == "system":
                ids += [*self.system[0], *self.encode(message.content), *self.system[1]]
        heard = [m for m in messages if m.role == "user"]
        if heard:
            text = "\n".join(f"{m.name}: {m.content}" if m.name else m.content for m in heard)
            ids += [*self.user[0], *self.encode(text), *self.user[1]]
        return ids

    def render_view(self, view: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of one agent's whole conversation, and which of them it said itself.

        The ids are those of the stream that the same turns would have made one by one.
        """
        ids: list[int] = []
        own: list[bool] = []
        heard: list[Message] = []
        for message in view:
            if message.role != "assistant":
                heard.append(message)
                continue
            read = [*(self.after_end if ids else ()), *self.render(heard), *self.reply]
            said = [*self.encode(message.content), self.end]
            ids += read + said
            own += [False] * len(read) + [True] * len(said)
            heard = []
        return ids, own

    def encode(self, words: str) -> list[int]:
        """Ids of plain words: markup in them is text like any other, so that nobody can forge
        another's turn.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            return backend.encode(words, add_special_tokens=False).ids
        finally:
            backend.encode_special_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """The words of a sampled turn without its end marker; any other special token is shown as
        it is.
        """
        ids = list(ids)
        if ids and ids[-1] == self.end:
            ids = ids[:-1]
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False).strip()


def take_apart(tokenizer) -> ChatTemplate:
    """Finds the pieces of a tokenizer's chat template.

    A template of a family that strips thinking is replaced on the tokenizer, with a log line that
    says so.

    Raises: Refused: the tokenizer has no chat template, its turns do not end with a special token,
      or the template does not concatenate.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            f"tokenizer {name!r} has no chat template; it must have one to take part in a talk"
        )
    pieces = _pieces(tokenizer, tokenizer.chat_template)
    if isinstance(pieces, str) and _strips_thinking(tokenizer.chat_template):
        logging.getLogger(__name__).warning(
            "the chat template of %s strips thinking from its history: "
            "using its concatenating, non-thinking form",
            name,
        )
        tokenizer.chat_template = CHATML_EMPTY_THINK
        pieces = _pieces(tokenizer, CHATML_EMPTY_THINK)
    if isinstance(pieces, str):
        raise Refused(f"chat template of tokenizer {name!r} does not concatenate: {pieces}")

    before_system, after_system, before_user, after_user, before_reply, after_reply = (
        tuple(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces
    )
    if not after_reply or after_reply[0] not in tokenizer.added_tokens_decoder:
        raise Refused(
            f"chat template of tokenizer {name!r} ends an assistant turn with {pieces[-1]!r}; "
            "it must begin with one special token, such as '<|im_end|>'"
        )
    return ChatTemplate(
        tokenizer=tokenizer,
        system=(before_system, after_system),
        user=(before_user, after_user),
        reply=before_reply,
        end=after_reply[0],
        after_end=after_reply[1:],
    )


def _strips_thinking(template: str) -> bool:
    return "<|im_start|>" in template and "</think>" in template


def _pieces(tokenizer, template: str) -> tuple[str, ...] | str:
    """What stands around system, user and assistant words, or one line on where the template fails
    to concatenate.
    """
    import jinja2

    def render(count: int, prompt: bool = False) -> str:
        messages = [{"role": role, "content": word} for role, word in PROBES[:count]]
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    try:
        rendered = [render(count) for count in range(1, len(PROBES) + 1)]
        prompted = [render(count, prompt=True) for count in (1, 2, 4)]
    except (jinja2.TemplateError, ValueError) as error:
        return f"it refuses a system message or a turn ({error})"

    around = []
    before = ""
    for (_, word), now in zip(PROBES, rendered, strict=True):
        if not now.startswith(before):
            return f"adding {word} changes what stood before it"
        head, found, tail = now[len(before) :].partition(word)
        if not found:
            return f"the words {word} are not rendered as they are"
        around.append((head, tail))
        before = now
    system, user, reply, later_user, later_reply = around
    if user != later_user or reply != later_reply:
        return "a role is rendered differently later in the conversation"
    for count, prompt in zip((1, 2, 4), prompted, strict=True):
        if prompt != rendered[count - 1] + reply[0]:
            return f"its generation prompt is not how an assistant turn begins ({reply[0]!r})"
    return (*system, *user, *reply)
