"""The token stores of a run: conversations and pairs through one template, each of them once."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxconv import processes
from jaxconv.data import token_store
from jaxconv.data.conversation import Conversation, PreferencePair
from jaxconv.data.examples import Outcome, PairExample, TokenExample, encode, encode_pair
from jaxconv.data.fingerprint import difference, digest
from jaxconv.data.template import ChatTemplate
from jaxconv.data.token_store import TokenStore
from jaxconv.errors import Refused

Made = Iterator[tuple[int, Sequence[TokenExample]]]
Note = Callable[[Conversation | PreferencePair, Outcome], None]
"""Takes down what became of a record."""

IDS = 1000
"""Of the records of a store that one thing became of, so many are named in a file, and"""
SHOWN = 3
"""so many in a line for people."""


class Stores:
    """Makes stores in a folder, or finds those that a run before made there.

    Args:
        folder: of all stores.
        template: of the model's tokenizer.
        max_length: tokens that an example may have: one stream, or both of a pair.
        policy: what becomes of longer ones; see `examples`.
        made_of: fingerprint of the files that the records come from.
        watch: called between records; it may raise to stop.
    """

    def __init__(
        self,
        folder: Path,
        template: ChatTemplate,
        *,
        max_length: int,
        policy: str,
        made_of: Mapping[str, str] = MappingProxyType({}),
        watch: Callable[[], None] = lambda: None,
    ):
        self._folder, self.template, self._watch = folder, template, watch
        self._max_length, self._policy = max_length, policy
        self._made_of = {**made_of, **_fingerprint(template)}
        self._made: dict[str, TokenStore] = {}

    def conversations(
        self, name: str, records: Sequence[Conversation], *, derived: bool = False
    ) -> TokenStore:
        """One example of every conversation, or several where it was split.

        `derived`: the recipe made them out of the user's, so none of them refuses the run.
        """
        policy = self._policy_of(derived)

        def make(note: Note) -> Made:
            for i, record in enumerate(records):
                self._watch()
                examples, outcome = encode(
                    record, self.template, max_length=self._max_length, policy=policy
                )
                note(record, outcome)
                for example in examples:
                    yield i, [example]

        return self._store(name, make, streams=1)

    def pairs(
        self, name: str, records: Sequence[PreferencePair], *, derived: bool = False
    ) -> TokenStore:
        """One example of every pair: the chosen stream and the rejected one.

        `derived`: as of `conversations`; these are only scored, so that each stream may have
        `max_length` tokens by itself.
        """
        policy = self._policy_of(derived)
        length = self._max_length * (2 if derived else 1)

        def make(note: Note) -> Made:
            for i, record in enumerate(records):
                self._watch()
                pair, outcome = encode_pair(record, self.template, max_length=length, policy=policy)
                if pair is not None and self._is_too_long(pair):
                    pair, outcome = None, Outcome.LEFT_OUT
                note(record, outcome)
                if pair is not None:
                    yield i, [pair.chosen, pair.rejected]

        return self._store(name, make, streams=2)

    def _policy_of(self, derived: bool) -> str:
        return "leave_out" if derived and self._policy == "refuse" else self._policy

    def _is_too_long(self, pair: PairExample) -> bool:
        return max(len(pair.chosen.tokens), len(pair.rejected.tokens)) > self._max_length

    def _store(self, name: str, make: Callable[[Note], Made], *, streams: int) -> TokenStore:
        folder = self._folder / name
        with processes.process_0_first(f"store {name}"):
            if not folder.is_dir():
                self._build(folder, make, streams=streams)
        store = token_store.load(folder)
        if store.made_of and (changed := difference(store.made_of, self._made_of)):
            raise Refused(
                f"store {folder} was made of other data: {changed}; --overwrite starts anew"
            )
        self._made[name] = store
        if not len(store):
            raise Refused(
                f"{name}: no example is left of {sum(store.counts.values())} records "
                f"({_listed(store.counts)}); config.batch.width={self._max_length} may be too small"
            )
        return store

    def _build(self, folder: Path, make: Callable[[Note], Made], *, streams: int) -> None:
        counts: collections.Counter = collections.Counter()
        ids: dict[str, list[str]] = {}

        def note(record: Conversation | PreferencePair, outcome: Outcome) -> None:
            counts[outcome] += 1
            if outcome is not Outcome.WHOLE and counts[outcome] <= IDS:
                ids.setdefault(outcome, []).append(record.id)

        made = make(note)
        token_store.build(folder, made, counts, ids, streams=streams, made_of=self._made_of)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Of each thing but `whole` that became of records: why, and of how many in which store,
        with the ids of the first `IDS`."""
        found = {}
        for outcome in Outcome:
            stores = {
                name: {
                    "count": store.counts[outcome],
                    "of": sum(store.counts.values()),
                    "ids": list(store.ids.get(outcome, ())),
                }
                for name, store in self._made.items()
                if outcome is not Outcome.WHOLE and outcome in store.counts
            }
            if stores:
                found[outcome.value] = {"why": self._why(outcome), "stores": stores}
        return found

    def _why(self, outcome: Outcome) -> str:
        too_long = f"longer than config.batch.width={self._max_length} tokens"
        cut = self._policy in ("truncate_left", "split")
        return {
            Outcome.TRUNCATED: f"{too_long}, so their oldest exchanges were dropped",
            Outcome.SPLIT: f"{too_long}, so each became several examples",
            Outcome.SPLIT_IN_PART: f"{too_long}, as are exchanges alone, which are in no example",
            Outcome.LEFT_OUT: too_long + (" even when cut down to one exchange" if cut else ""),
            Outcome.NOTHING_SAID: "no message is the assistant's",
        }[outcome]

    def notes(self, place: str) -> list[str]:
        """One line for people on each of `outcomes`; `place` is where they find the rest."""
        lines = []
        for outcome, about in self.outcomes().items():
            stores = about["stores"]
            counts = ", ".join(f"{name} {s['count']} of {s['of']}" for name, s in stores.items())
            ids = list(dict.fromkeys(i for s in stores.values() for i in s["ids"]))
            shown = ", ".join([*ids[:SHOWN], *(["…"] if len(ids) > SHOWN else [])])
            what = outcome.replace("_", " ").capitalize()
            lines.append(f"{what} ({about['why']}): {counts}; ids {shown}, see {place}.")
        return lines


def _fingerprint(template: ChatTemplate) -> dict[str, str]:
    parts = {
        "the tokenizer": template.backend.to_str(),
        "its chat template": str(template.tokenizer.chat_template),
    }
    return {name: f"sha256 {digest(text)}" for name, text in parts.items()}


def _listed(counts) -> str:
    return ", ".join(f"{n} {outcome.replace('_', ' ')}" for outcome, n in sorted(counts.items()))
