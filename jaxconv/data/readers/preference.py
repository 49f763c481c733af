"""Preference pairs: TRL's forms, plain strings, and the dialogues of hh-rlhf."""

import re
from collections.abc import Mapping
from typing import Any

from jaxconv.data.conversation import Invalid, Message, PreferencePair, take
from jaxconv.data.readers.chat import rest, row_id, said

Row = Mapping[str, Any]
Messages = tuple[Message, ...]

HH_ROLES = {"Human": "user", "Assistant": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_preference(row: Row, name: str) -> list[PreferencePair]:
    """`{"chosen", "rejected"}`, with or without a `prompt`.

    Each is a list of messages or a string; a string is what the user (`prompt`) or the assistant
    (`chosen`, `rejected`) says. Answers that begin with the assistant follow the prompt; others are
    whole conversations, and what they share must hold the given prompt. In any case the pair's
    prompt is all that both share.
    """
    prompt = () if row.get("prompt") is None else said(row, "prompt", "user")
    answers = [_answer(row, "chosen"), _answer(row, "rejected")]
    if all(answer[0].role == "assistant" for answer in answers):
        answers = [prompt + answer for answer in answers]
    shared, chosen, rejected = split_at_difference(*answers)
    if any(message not in shared for message in prompt):
        raise Invalid("prompt", "different_prompts", "chosen and rejected do not share it")
    return [_pair(row, name, shared, chosen, rejected)]


def _answer(row: Row, key: str) -> Messages:
    messages = said(row, key, "assistant")
    if not messages:
        raise Invalid(key, "empty_answer", "it has no messages")
    return messages


def read_hh_rlhf(row: Row, name: str) -> list[PreferencePair]:
    """`{"chosen", "rejected"}`, dialogues in one string (Bai et al., 2022).

    A turn begins at two newlines and "Human:" or "Assistant:"; the space after that is markup and
    all else is its words. Two turns of the same speaker in a row stay two messages; an answer may
    be empty; where one dialogue goes on longer than the other, its answer has more messages.
    """
    dialogues = (_dialogue(take(row, key, str), key) for key in ("chosen", "rejected"))
    return [_pair(row, name, *split_at_difference(*dialogues))]


def _dialogue(text: str, field: str) -> Messages:
    before, *turns = HH_TURN.split(text)
    if before or not turns:
        raise Invalid(field, "no_turns", r"it does not begin with '\n\nHuman:' or '\n\nAssistant:'")
    return tuple(
        Message(HH_ROLES[speaker], words.removeprefix(" "))
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    )


def split_at_difference(chosen: Messages, rejected: Messages) -> tuple[Messages, ...]:
    """(prompt, chosen, rejected): both conversations up to their first difference, and from there.

    Where one of them is the beginning of the other, its last message counts as an answer.
    """
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair(row: Row, name: str, *parts: Messages) -> PreferencePair:
    meta = rest(row, "id", "prompt", "chosen", "rejected")
    return PreferencePair(row_id(row, ("id", "prompt_id"), name), *parts, meta)
