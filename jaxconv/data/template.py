"""How a conversation becomes one append-only token stream.

A chat template is a Jinja program over the whole history. A stream cannot be rendered again at
every turn: the ids that the model sampled must stay as sampled. So the template is taken apart
once, by rendering probe conversations, into what stands before and after the words of each role.
That works for templates that *concatenate*: rendering one message more only appends. Families known
not to (Qwen3 strips the thinking out of its history) get a concatenating form of the same markup;
any other is refused by name.
"""

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from jaxconv.data import template_parts, template_tools
from jaxconv.data.conversation import Message
from jaxconv.data.template_parts import FoldedSystem, Parts, Unlike
from jaxconv.data.template_tools import ToolRendering, Tools, has_tools
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

Piece = tuple[int, ...] | str
"""Ids of markup, or text that is to be encoded."""


@dataclasses.dataclass(frozen=True)
class Markup:
    """What stands around the words of one role.

    Text next to the words is encoded together with them, as the template's rendering would be.

    Attributes:
      before, after: ids up to and from a special token.
      prefix, suffix: text between those and the words.
      trims: whether the template takes white space off both ends of the words.
    """

    before: tuple[int, ...]
    prefix: str
    suffix: str
    after: tuple[int, ...]
    trims: bool

    def around(self, words: str) -> list[Piece]:
        return [self.before, self.prefix + words + self.suffix, self.after]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Token ids around each role's words, for one tokenizer; safe in several threads.

    Attributes:
      tokenizer: as it was given.
      name: the tokenizer's, for messages to people.
      opening: ids at the beginning of a conversation without a system message: the
        beginning-of-sequence marker, a default system message.
      system: around a system message, the beginning-of-sequence marker included; or how it is
        folded into the first user message; or, in one line, why the template has none.
      user: around a user message.
      reply: ids of the generation prompt, after which the model speaks.
      said: around what the model says, the end marker not included.
      end: the id that the model samples to end its turn.
      after_end: ids that follow `end` before the next message (a newline in ChatML).
      opens: whether the assistant may speak first.
      doubles: whether it may speak twice in a row.
      backend: a copy of the tokenizer's that reads no markup, for text that follows a special
        token; and
      said_backend: for what is said, which follows the generation prompt.
      tools: how calls of tools and their answers are shown; or, in one line, why they are not.
    """

    tokenizer: Any
    name: str
    opening: tuple[int, ...]
    system: Markup | FoldedSystem | str
    user: Markup
    reply: tuple[int, ...]
    said: Markup
    end: int
    after_end: tuple[int, ...]
    opens: bool
    doubles: bool
    backend: Any
    said_backend: Any
    tools: ToolRendering | str

    def __getstate__(self):
        # The backend's switch that keeps words from being read as markup does not survive a copy.
        raise TypeError("a ChatTemplate is not copied; take the tokenizer apart again")

    def render(self, messages: Sequence[Message], *, begins: bool = False) -> list[int]:
        """Ids of the messages that reach a speaker between two turns of its own.

        A system message comes first; what several others said becomes one user message, one line a
        speaker, because many templates refuse two user messages in a row. A conversation `begins`
        with these messages, also if that is not said, when a system message is among them. Folded
        system words that no user message follows are a user message of their own.

        Raises: Refused: there is a system message and the template has none; a tool's message,
          which is read in `turns` alone.
        """
        (ids,) = _ids(self.backend, [self._heard(messages, begins)])
        return ids

    def render_view(self, view: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of one agent's whole conversation, and which of them it said itself.

        The ids are those of the stream that the same turns would have made one by one. Messages
        after its last own turn are not in it.
        """
        ids: list[int] = []
        own: list[bool] = []
        for read, said in self.turns(view):
            ids += read + said
            own += [False] * len(read) + [True] * len(said)
        return ids, own

    def turns(
        self, view: Sequence[Message], tools: Tools = ()
    ) -> list[tuple[list[int], list[int]]]:
        """Ids of one agent's conversation by its own turns: (what it read before, what it said).

        What it read ends with the generation prompt, what it said with the end marker. Definitions
        of `tools` are read where the template shows tools at all.

        Raises: Refused: as `render`; tools take part and the template does not show them.
        """
        if has_tools(view) or (tools and isinstance(self.tools, ToolRendering)):
            return self._turns_with_tools(view, tools)
        read: list[list[Piece]] = []
        said: list[list[Piece]] = []
        heard: list[Message] = []
        for message in view:
            if message.role != "assistant":
                heard.append(message)
                continue
            before = [self.after_end] if read else []
            read.append([*before, *self._heard(heard, not read), self.reply])
            said.append([*self.said.around(_trimmed(self.said, message.content)), (self.end,)])
            heard = []
        ids = (_ids(self.backend, read), _ids(self.said_backend, said))
        return list(zip(*ids, strict=True))

    def _turns_with_tools(
        self, view: Sequence[Message], tools: Tools
    ) -> list[tuple[list[int], list[int]]]:
        if isinstance(self.tools, str):
            raise Refused(
                f"the chat template of tokenizer {self.name!r} does not show tool calls and tool "
                f"messages ({self.tools}); leave such conversations out, or start from a "
                "checkpoint whose template shows them"
            )
        try:
            return self.tools.turns(view, tools)
        except Unlike as unlike:
            raise Refused(
                f"the chat template of tokenizer {self.name!r} cannot show this use of tools: "
                f"{unlike}"
            ) from None

    def check_order(self, messages: Sequence[Message]) -> None:
        """Raises `Refused` where the template refuses the order of the roles.

        Several users' messages in a row are no matter: they become one.
        """
        roles = [message.role for message in messages]
        spoken = [role for role in roles if role != "system"]
        if spoken[:1] == ["assistant"] and not (
            self.opens and not ("system" in roles and isinstance(self.system, FoldedSystem))
        ):
            raise Refused(
                f"the chat template of tokenizer {self.name!r} wants a user message before the "
                "assistant's first"
            )
        if not self.doubles and ("assistant", "assistant") in itertools.pairwise(spoken):
            raise Refused(
                f"the chat template of tokenizer {self.name!r} wants a user message between two of "
                "the assistant's"
            )

    def encode(self, words: str) -> list[int]:
        """Ids of plain words: markup in them is text like any other, so that nobody can forge
        another's turn. (Where a family's markup is itself plain text, as "[INST]" once was, nothing
        tells the two apart.)
        """
        return self.said_backend.encode(words, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The words of a sampled turn without its end marker; any other special token is shown as
        it is.
        """
        ids = list(ids)
        if ids and ids[-1] == self.end:
            ids = ids[:-1]
        return self.backend.decode(ids, skip_special_tokens=False).strip()

    def _heard(self, messages: Sequence[Message], begins: bool) -> list[Piece]:
        if any(message.role == "tool" for message in messages):
            raise Refused("messages of tools are rendered with the turns around them alone")
        systems = [m.content for m in messages if m.role == "system"]
        heard = [
            f"{m.name}: {m.content}" if m.name else m.content for m in messages if m.role == "user"
        ]
        words = _trimmed(self.user, "\n".join(heard))
        if not systems:
            opening = [self.opening] if begins else []
            return [*opening, *self.user.around(words)] if heard else opening
        if isinstance(self.system, str):
            raise Refused(
                f"the chat template of tokenizer {self.name!r} has no system message: {self.system}"
            )
        brief = _trimmed(self.system, "\n".join(systems))
        if isinstance(self.system, FoldedSystem):
            folded = brief + self.system.joint + words if heard else brief
            return [self.opening, *self.user.around(folded)]
        return [*self.system.around(brief), *(self.user.around(words) if heard else ())]


def _ids(backend: Any, streams: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """Ids of several streams, all their texts encoded in one call."""
    texts = [piece for stream in streams for piece in stream if isinstance(piece, str)]
    encoded = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
    return [
        [i for piece in stream for i in (next(encoded).ids if isinstance(piece, str) else piece)]
        for stream in streams
    ]


def _trimmed(markup: Markup | FoldedSystem, words: str) -> str:
    return words.strip() if markup.trims else words


def take_apart(tokenizer: Any, *, needs_system: bool = True) -> ChatTemplate:
    """Finds the pieces of a tokenizer's chat template.

    A template of a family that strips thinking is replaced on the tokenizer, with a log line that
    says so.

    Args:
      tokenizer: a `transformers` tokenizer of the fast kind.
      needs_system: whether a template without a system message is refused here; if not, it is when
        a system message is to be rendered.

    Raises: Refused: the tokenizer has no chat template, its turns do not end with a special token,
      the template does not concatenate, or ids in a stream would not be those of its rendering.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            f"tokenizer {name!r} has no chat template; it must have one to take part in a talk"
        )
    try:
        parts = template_parts.find_parts(_renderer(tokenizer))
    except Unlike as unlike:
        if not _strips_thinking(tokenizer.chat_template):
            raise Refused(
                f"chat template of tokenizer {name!r} does not concatenate: {unlike}"
            ) from None
        logging.getLogger(__name__).warning(
            "the chat template of %s strips thinking from its history: "
            "using its concatenating, non-thinking form",
            name,
        )
        tokenizer.chat_template = template_tools.empty_think(tokenizer) or CHATML_EMPTY_THINK
        parts = template_parts.find_parts(_renderer(tokenizer))
    if needs_system and isinstance(parts.system, str):
        raise Refused(f"chat template of tokenizer {name!r} does not concatenate: {parts.system}")
    template = _encoded(tokenizer, name, parts)
    _check_ids(template)
    return template


def _strips_thinking(template: str) -> bool:
    return "<|im_start|>" in template and "</think>" in template


def _renderer(tokenizer: Any) -> template_parts.Render:
    import jinja2

    def render(*words: str, prompt: bool = False) -> str:
        messages = [
            {"role": template_parts.ROLES[word.strip()[0]], "content": word} for word in words
        ]
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise Unlike(f"it refuses a turn: {' '.join(str(error).split())}") from None

    return render


def _encoded(tokenizer: Any, name: str, parts: Parts) -> ChatTemplate:
    """The parts as ids, cut where a special token stands."""
    texts = [parts.opening, parts.user.before, parts.user.after, parts.prompt, parts.reply.after]
    if isinstance(parts.system, template_parts.Around):
        texts += [parts.system.before, parts.system.after]
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    markers = re.compile(
        "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or "$^"
    )
    used = {marker for text in texts for marker in markers.findall(text)}
    backend = _own_backend(tokenizer, used, begins=True)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(backend.encode(text, add_special_tokens=False).ids)

    def markup(around: template_parts.Around) -> Markup:
        ends = [marker.end() for marker in markers.finditer(around.before)]
        begins = [marker.start() for marker in markers.finditer(around.after)]
        cut = ends[-1] if ends else 0
        resume = begins[0] if begins else len(around.after)
        return Markup(
            before=ids(around.before[:cut]),
            prefix=around.before[cut:],
            suffix=around.after[:resume],
            after=ids(around.after[resume:]),
            trims=around.trims,
        )

    said = markup(parts.reply)
    if not said.after or said.suffix.strip():
        raise Refused(
            f"chat template of tokenizer {name!r} ends an assistant turn with "
            f"{parts.reply.after!r}; it must begin with one special token, such as '<|im_end|>'"
        )
    is_around = isinstance(parts.system, template_parts.Around)
    # A special token right before what is said ends the text before it.
    before_reply = parts.user.after + parts.prompt
    begins = any(marker.end() == len(before_reply) for marker in markers.finditer(before_reply))
    template = ChatTemplate(
        tokenizer=tokenizer,
        name=name,
        opening=ids(parts.opening),
        system=markup(parts.system) if is_around else parts.system,
        user=markup(parts.user),
        reply=ids(parts.prompt),
        said=dataclasses.replace(said, after=()),
        end=said.after[0],
        after_end=said.after[1:],
        opens=parts.opens,
        doubles=parts.doubles,
        backend=backend,
        said_backend=_own_backend(tokenizer, used, begins=begins),
        tools=template_tools.find(
            tokenizer, next(t for t, i in added.items() if i == said.after[0])
        ),
    )
    backend.encode_special_tokens = True
    template.said_backend.encode_special_tokens = True
    return template


def _own_backend(tokenizer: Any, markers: set[str], *, begins: bool) -> Any:
    """A copy of the tokenizer's backend for pieces of a text.

    Every marker of the template counts as special in it, so that the switch covers it. Tokenizers
    in SentencePiece's way put a space before a text; some do it after each special token, which is
    where a piece `begins`, but none inside the text.
    """
    import tokenizers

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in markers
    splitter = state["pre_tokenizer"] or {}
    for step in splitter.get("pretokenizers", [splitter]):
        if step.get("prepend_scheme") == "first" or ("prepend_scheme" in step and not begins):
            step["prepend_scheme"] = "never"
    normalizer = state["normalizer"] or {}
    if not begins and "normalizers" in normalizer:
        steps = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
        normalizer["normalizers"] = steps
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_ids(template: ChatTemplate) -> None:
    """Refuses a tokenizer to which a text is not the sum of its parts."""
    words = template_parts.TALK
    if not isinstance(template.system, str):
        words = (template_parts.SYSTEM, *words)
    rendering = _renderer(template.tokenizer)(*words)
    expected = template.tokenizer.encode(rendering, add_special_tokens=False)
    view = [Message(template_parts.ROLES[word[0]], word) for word in words]
    ids, _ = template.render_view(view)
    if [*ids, *template.after_end] != expected:
        raise Refused(
            f"tokenizer {template.name!r} gives other ids to a conversation than to its turns one "
            "by one; its markup must be special tokens"
        )
