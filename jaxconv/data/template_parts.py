"""What a chat template puts around the words of each role, found by rendering probes.

Only text is handled here; `jaxconv.data.template` makes token ids of it.
"""

import dataclasses
from collections.abc import Callable, Sequence

TALK = ("USER1", "REPLY2", "USER3", "REPLY4")
SYSTEM = "SYSTEM0"

ROLES = {"S": "system", "U": "user", "R": "assistant"}

Render = Callable[..., str]
"""(words of the messages, one after the other; prompt=False) -> the rendering; `Unlike` where the
template raises an error."""


class Unlike(Exception):
    """Why a template cannot be taken apart."""


@dataclasses.dataclass(frozen=True)
class Around:
    """Text before and after a role's words, and whether white space is taken off their ends."""

    before: str
    after: str
    trims: bool


@dataclasses.dataclass(frozen=True)
class FoldedSystem:
    """System words at the beginning of the first user message, and the text that joins the two."""

    joint: str
    trims: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """A template's text.

    Attributes:
      opening: at the beginning of a conversation without a system message.
      system: around a system message with which a conversation begins; or folded; or why there is
        none.
      user: around a user message.
      prompt: the generation prompt.
      reply: around what the assistant says, after the generation prompt.
      opens: whether the assistant may speak first.
      doubles: whether it may speak twice in a row.
    """

    opening: str
    system: Around | FoldedSystem | str
    user: Around
    prompt: str
    reply: Around
    opens: bool
    doubles: bool


def find_parts(render: Render) -> Parts:
    """Takes a template apart.

    Raises:
        Unlike: a longer conversation does not begin as the shorter one does, words are changed, or
            the generation prompt is not how an assistant's turn begins.
    """
    rendered = [render(*TALK[:count]) for count in range(1, len(TALK) + 1)]
    around = _around_each(TALK, rendered)
    (first_before, first_after), reply, user, later_reply = around
    later = first_before.endswith(user[0]) and first_after == user[1] and reply == later_reply
    if not later:
        raise Unlike("a role is rendered differently later in the conversation")
    opening = first_before.removesuffix(user[0])

    prompts = [
        render(*TALK[:count], prompt=True).removeprefix(rendered[count - 1]) for count in (1, 3)
    ]
    lead = reply[0].removeprefix(prompts[0])
    if prompts[0] + lead != reply[0] or lead.strip() or prompts[0] != prompts[1]:
        raise Unlike(f"its generation prompt is not how an assistant turn begins ({reply[0]!r})")

    return Parts(
        opening=opening,
        system=_system(render, opening, user, rendered),
        user=Around(*user, trims=_trims(render, TALK[:1], 0)),
        prompt=prompts[0],
        reply=Around(lead, reply[1], trims=_trims(render, TALK[:2], 1)),
        opens=_renders(render, TALK[1:2], opening + TALK[1].join(reply)),
        doubles=_renders(render, (*TALK[:2], TALK[3]), rendered[1] + TALK[3].join(reply)),
    )


def _around_each(words: Sequence[str], rendered: Sequence[str]) -> list[tuple[str, str]]:
    """Text before and after each of `words`, each rendering having one message more."""
    around = []
    before = ""
    for word, now in zip(words, rendered, strict=True):
        if not now.startswith(before):
            raise Unlike(f"adding {word} changes what stood before it")
        head, found, tail = now[len(before) :].partition(word)
        if not found:
            raise Unlike(f"the words {word} are not rendered as they are")
        around.append((head, tail))
        before = now
    return around


def _system(
    render: Render, opening: str, user: tuple[str, str], rendered: Sequence[str]
) -> Around | FoldedSystem | str:
    try:
        one, whole = render(SYSTEM, TALK[0]), render(SYSTEM, *TALK)
        trims = _trims(render, (SYSTEM, TALK[0]), 0)
    except Unlike as unlike:
        return f"it refuses a system message ({unlike})"
    head, found, rest = one.partition(SYSTEM)
    if not found:
        return f"the words {SYSTEM} are not rendered as they are"
    between, _, tail = rest.partition(TALK[0])
    if tail != user[1] or whole != one + rendered[-1][len(rendered[0]) :]:
        return "a system message changes how later messages are rendered"
    if between.endswith(user[0]):
        return Around(head, between.removesuffix(user[0]), trims)
    if head == opening + user[0]:
        return FoldedSystem(between, trims)
    return "a system message changes how the first user message is rendered"


def _trims(render: Render, words: Sequence[str], which: int) -> bool:
    """Whether white space around one of the words is taken off."""
    word = words[which]
    padded = f" \n{word}\n "
    plain = render(*words)
    found = render(*words[:which], padded, *words[which + 1 :])
    if found not in (plain, plain.replace(word, padded)):
        raise Unlike(f"the words {word} are not rendered as they are")
    return found == plain


def _renders(render: Render, words: Sequence[str], expected: str) -> bool:
    try:
        return render(*words) == expected
    except Unlike:
        return False
