"""Understands what bargainers say: deterministic, sentence by sentence, tolerant of case, spaces
and a name called at either end.

Two steps. `meaning` reads one sentence without knowing the game; `understand` puts the sentences of
an utterance into their game, where "the rest" becomes numbers.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from jaxconv.envs.bargaining.language import ABOUT, FIXED, Act
from jaxconv.envs.bargaining.scenario import ISSUES, ITEMS, NAMES, NUMBERS, OPTIONS, Offer, Setting

MAX_CHARACTERS = 240
MAX_SENTENCES = 3

_ALL = -1
_COUNTS = {word: number for number, word in enumerate(NUMBERS[:10])}
_COUNTS |= {str(number): number for number in range(10)}
_COUNTS |= {"a": 1, "an": 1, "the": _ALL, "all": _ALL, "all the": _ALL, "all of the": _ALL}
_COUNTS |= {"both": 2, "both the": 2, "no": 0, "": _ALL}
_POINTS = {word: number for number, word in enumerate(NUMBERS)}
_POINTS |= {str(number): number for number in range(len(NUMBERS))}

_BREAK = re.compile(r"(?<=[.!?])\s+")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_LEAD = re.compile(r"^(?:(?:so|then|okay|ok|well|how about|what if|let us say|and)\b,? )+")
_COMMA = re.compile(r",? and |, ?|; ?")
_ITEM = re.compile(
    rf"^(|an?|the|all(?: of)?(?: the)?|both(?: the)?|no|\w+) ?\b({'|'.join(ITEMS)})s?$"
)
_MINE = re.compile(
    r"^(?:i (?:take|want|get|keep|have|need|would like|would take|will take)|i'll take|i'd like|"
    r"give me|let me have) (.+)$"
)
_YOURS = re.compile(
    r"^(?:you (?:take|get|keep|have|can have|may have|can take)|i(?: can)? give you|"
    r"i offer you) (.+)$"
)
_NAMED = re.compile(rf"^({'|'.join(NAMES).casefold()}) (?:takes|gets|keeps|has|can have) (.+)$")
_TERMS = re.compile(
    r"^(?:i (?:propose|want|suggest|offer)|can we agree on|my offer is|let us agree on) (.+)$"
)
_TERM = re.compile(
    rf"^(?:an? |the )?(?:(?P<o1>{'|'.join(OPTIONS)}) (?P<t1>{'|'.join(ISSUES)})"
    rf"|(?P<t2>{'|'.join(ISSUES)}) (?P<o2>{'|'.join(OPTIONS)}))$"
)
_LIMIT_WORD = re.compile(r"\b(?:limit|minimum|least|below|under|points?|secret|less)\b")
_SPOKEN_NUMBER = re.compile(rf"\b(?:{'|'.join(_POINTS)})\b")


def _about(kind: str, blank: str) -> list[tuple[str, re.Pattern]]:
    return [
        (kind, re.compile(re.escape(bare(frame)).replace(r"\{\}", blank))) for frame in ABOUT[kind]
    ]


@dataclass(frozen=True, slots=True)
class Utterance:
    """What an utterance means.

    `acts` are those of the sentences that were understood, also when the utterance as a whole is
    not; then `reason` says why, else it is None. `key` is the text without case and punctuation.
    """

    acts: tuple[Act, ...]
    reason: str | None
    key: str


def clean(text: str) -> str:
    """Text as others hear it: each run of blanks and controls one space, cut to length."""
    if text.isascii():
        if text.isprintable() and "  " not in text:  # the common case, ten times as fast
            return text[:MAX_CHARACTERS].strip(" ")
    else:
        text = text.encode("utf-8", "replace").decode()
    return _BLANK.sub(" ", text).strip()[:MAX_CHARACTERS].rstrip()


def bare(text: str) -> str:
    """Text without case, outer blanks, final punctuation and typographic apostrophes."""
    return _BLANK.sub(" ", text.casefold().replace("’", "'")).strip().rstrip(".!? ")


_FIXED = {bare(text): Act(kind) for kind, texts in FIXED.items() for text in texts}
_WORD = r"(?P<topic>[a-z]+)"
_NUMBER = r"(?P<number>[a-z]+|\d+)"
_ABOUT = _about("most", _WORD) + _about("least", _WORD) + _about("limit", _NUMBER)
_TOPICS = {name: name for name in ISSUES + ITEMS} | {f"{name}s": name for name in ITEMS}


def meaning(sentence: str) -> Act | None:
    """The act of one sentence, None if it is not understood.

    An offer comes as Act("division", clauses) with clauses ((who, share), ...), `who` being "me",
    "you" or a name and `share` "rest" or ((item, count), ...), or as Act("terms", {issue: option}).
    """
    text = bare(sentence)
    act = _FIXED.get(text) or _FIXED.get(_without_name(text))
    if act:
        return act
    for kind, pattern in _ABOUT:
        if found := pattern.fullmatch(text):
            if kind == "limit":
                number = _POINTS.get(found["number"])
                return None if number is None else Act("limit", number)
            topic = _TOPICS.get(found["topic"])
            return None if topic is None else Act(kind, topic)
    text = _LEAD.sub("", _without_name(text))
    return _terms(text) or _division(text)


def _without_name(text: str) -> str:
    """Text without a name called at its beginning ("bob, ...") or end ("... , bob")."""
    for name in NAMES:
        name = name.casefold()
        if text.endswith(f" {name}") and text not in (name, f"and {name}"):
            text = text[: -len(name) - 1].rstrip(",")
        if text.startswith(f"{name}, "):
            text = text[len(name) + 2 :]
    return text


def _terms(text: str) -> Act | None:
    if found := _TERMS.match(text):
        text = found[1]
    options: dict[str, int] = {}
    for piece in _COMMA.split(text):
        found = _TERM.match(piece)
        if not found:
            return None
        topic = found["t1"] or found["t2"]
        if topic in options:
            return None
        options[topic] = OPTIONS.index(found["o1"] or found["o2"])
    return Act("terms", tuple(options.items()))


def _division(text: str) -> Act | None:
    clauses: list[tuple[str, str | tuple]] = []
    for piece in _COMMA.split(text):
        for who, pattern in (("me", _MINE), ("you", _YOURS), (None, _NAMED)):
            if found := pattern.match(piece):
                subject = who or found[1]
                if any(subject == earlier for earlier, _ in clauses):
                    return None
                clauses.append((subject, ()))
                piece = found[1] if who else found[2]
                break
        if not clauses:
            return None
        who, share = clauses[-1]
        if piece in ("the rest", "rest", "everything", "all", "nothing"):
            if share != ():
                return None
            whole = tuple((item, _ALL) for item in ITEMS)
            share = {"nothing": "nothing", "everything": whole, "all": whole}.get(piece, "rest")
        else:
            found = _ITEM.match(piece)
            if not found or found[1] not in _COUNTS or isinstance(share, str):
                return None
            if any(item == found[2] for item, _ in share):
                return None
            share = (*share, (found[2], _COUNTS[found[1]]))
        clauses[-1] = (who, share)
    return Act("division", tuple(clauses))


@lru_cache(maxsize=65536)
def _read(text: str) -> tuple[str, tuple[Act | None, ...]]:
    """The bare text and what each of its sentences means."""
    text = clean(text)
    return bare(text), tuple(meaning(sentence) for sentence in _BREAK.split(text))


def understand(setting: Setting, seat: int, text: str) -> Utterance:
    """What `text`, said from `seat`, means in this game.

    Reasons for not being understood: "empty", "long" (more than 3 sentences), "unknown" (a
    sentence that means nothing), "topic" (one that is not on the table), "impossible" (an offer of
    things that are not there), "incomplete" (an offer that leaves something open), "conflict" (two
    acts that exclude each other, or a sentence said twice).
    """
    key, meanings = _read(text)
    if not key:
        return Utterance((), "empty", key)
    reason = "long" if len(meanings) > MAX_SENTENCES else None
    acts: list[Act] = []
    for act in meanings:
        if act is None:
            reason = reason or "unknown"
            continue
        kind = act.kind
        if kind in ("division", "terms"):
            resolved = _offer(setting, seat, act)
            if isinstance(resolved, str):
                reason = reason or resolved
                continue
            act = Act("propose", resolved)
        elif kind in ("most", "least") and act.detail not in setting.topics:
            reason = reason or "topic"
            continue
        acts.append(act)
    if reason is None and len(acts) > 1 and _conflict(acts):
        reason = "conflict"
    return Utterance(tuple(acts), reason, key)


def _conflict(acts: list[Act]) -> bool:
    kinds = [act.kind for act in acts]
    closing = sum(kind in ("propose", "accept", "leave") for kind in kinds)
    return closing > 1 or ("accept" in kinds and "reject" in kinds) or len(set(acts)) < len(acts)


@lru_cache(maxsize=4096)
def _offer(setting: Setting, seat: int, act: Act) -> Offer | str:
    """The offer that an act means in this game, or the reason why it means none."""
    if act.kind == "terms":
        if setting.counts:
            return "topic"
        named = dict(act.detail)
        if named.keys() != set(setting.topics):
            return "incomplete" if named.keys() < set(setting.topics) else "topic"
        return tuple(named[topic] for topic in setting.topics)
    if not setting.counts:
        return "topic"
    players = len(setting.agents)
    shares: list[list[int] | None] = [None] * players
    rest = None
    for who, share in act.detail:
        if who == "me":
            at = seat
        elif who == "you":
            if players > 2:
                return "unknown"  # who is "you" among several?
            at = 1 - seat
        else:
            at = next((i for i, name in enumerate(setting.agents) if name.casefold() == who), -1)
            if at < 0:
                return "topic"
        if shares[at] is not None or rest == at:
            return "conflict"
        if share == "rest":
            if rest is not None:
                return "conflict"
            rest = at
            continue
        shares[at] = [0] * len(setting.topics)
        if share != "nothing":
            for item, count in share:
                topic = setting.topics.index(item)
                shares[at][topic] = setting.counts[topic] if count == _ALL else count
    left = [
        count - sum(share[topic] for share in shares if share is not None)
        for topic, count in enumerate(setting.counts)
    ]
    if min(left) < 0:
        return "impossible"
    silent = [at for at in range(players) if shares[at] is None and at != rest]
    if rest is None and any(left):
        if len(silent) != 1:
            return "incomplete"
        rest = silent[0]
    return tuple(
        tuple(left) if at == rest else (0,) * len(left) if share is None else tuple(share)
        for at, share in enumerate(shares)
    )


def tells_number(text: str, number: int) -> bool:
    """Whether a text not understood still speaks of `number` as points or as a limit."""
    text = bare(text)
    return bool(_LIMIT_WORD.search(text)) and any(
        _POINTS[word] == number for word in _SPOKEN_NUMBER.findall(text)
    )
