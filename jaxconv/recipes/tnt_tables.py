"""Phase 1 of TnT-LLM: how a table of labels comes about.

A table is to documents what a model is to data: a first one is generated from a minibatch, and with
each other minibatch an answer rates it (the loss), says what to change (the gradient) and gives the
next one (the step). Every few updates it is compared with the best so far on documents kept apart.
Chains, and the tables inside labels, are made side by side.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxconv.errors import Failed
from jaxconv.recipes.asking import Asking, Chain, NoAnswer, once
from jaxconv.recipes.tnt_rules import TopicRules
from jaxconv.recipes.tnt_tasks import (
    GENERATION,
    REVIEW,
    SELECTION,
    UPDATE,
    Label,
    SelectionInput,
    TableInput,
    Update,
)


@dataclass(frozen=True)
class Step:
    """A table on the way to the taxonomy.

    Attributes:
        place: "" for the first level, else the label that it is inside of.
        chain, number: which chain, and which table of it, from 0.
        kind: "generate", "update" or "review".
        rating, explanation, edits: of an update or a review, about the table before.
        labels: the table.
        chosen: whether it was the best so far when it was compared; None where it was not.
    """

    place: str
    chain: int
    number: int
    kind: str
    rating: int | None
    explanation: str
    edits: Sequence[str]
    labels: Sequence[Label]
    chosen: bool | None = None


@dataclass(frozen=True)
class Place:
    """What a table is made from.

    Attributes:
        summaries: of the documents.
        apart: summaries that compare tables; where there are none, some of `summaries` do.
        most: labels.
        chains: tables, of which the best is taken.
    """

    summaries: Sequence[str]
    apart: Sequence[str]
    most: int
    chains: int


@dataclass
class TableMaker:
    """Makes tables, and remembers how.

    Attributes:
        steps: all tables so far.
        notes: chains that ended without a table, and why.
    """

    config: object
    asked: Asking
    rules: TopicRules
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tables(self, places: Mapping[str, Place]) -> dict[str, list[Label]]:
        """The best table of each place, by its name: "" for the first level, else the label that it
        is inside of. A place all of whose chains end without an answer is not there."""
        chains = {
            f"{place + ', ' if place else ''}chain {i}": (place, i)
            for place, given in places.items()
            for i in range(given.chains)
        }
        made = self.asked.in_step(
            {name: self._chain(place, i, places[place]) for name, (place, i) in chains.items()}
        )
        candidates: dict[str, list[list[Label]]] = {}
        for name, table in made.items():
            if isinstance(table, NoAnswer):
                self.notes.append(f"Left out, {name}: {table}.")
            else:
                candidates.setdefault(chains[name][0], []).append(table)
        votes = self.asked.in_step(
            {
                f"{place + ', ' if place else ''}chains": self._vote(own, places[place])
                for place, own in candidates.items()
            }
        )
        order = {place: i for i, place in enumerate(dict.fromkeys(s.place for s in self.steps))}
        self.steps.sort(key=lambda step: (order[step.place], step.chain, step.number))
        return {
            place: own[best or 0]
            for (place, own), best in zip(candidates.items(), votes.values(), strict=True)
        }

    def _chain(self, place: str, chain: int, given: Place) -> Chain[list[Label]]:
        """Generate, update with each minibatch, review; the best table of the way."""
        if not given.summaries:
            raise Failed("no document has a summary; nothing can be sorted")
        select = self.config.select
        first, *others = self._minibatches(chain, given.summaries)
        task = dataclasses.replace(GENERATION, rules=self.rules.generate)
        table = yield from once(task, "first", self._input(given.most, documents=first))
        labels = best = table.labels
        self._note(place, chain, 0, "generate", None, labels)
        number = worse = 0
        for number, batch in enumerate(others, 1):
            task = dataclasses.replace(UPDATE, rules=self.rules.update)
            shown = self._input(given.most, documents=batch, labels=labels)
            update = yield from once(task, f"update {number}", shown)
            labels, chosen = update.labels, None
            if number % select.every == 0:
                best, chosen = yield from self._better(best, labels, given, f"after {number}")
                worse = {True: 0, False: worse + 1, None: worse}[chosen]
            self._note(place, chain, number, "update", update, labels, chosen)
            if worse >= select.patience:
                break
        if number % select.every:
            best, _ = yield from self._better(best, labels, given, "at the end")
        task = dataclasses.replace(REVIEW, rules=self.rules.update)
        review = yield from once(task, "review", self._input(given.most, labels=best))
        self._note(place, chain, number + 1, "review", review, review.labels)
        return review.labels

    def _minibatches(self, chain: int, summaries: Sequence[str]) -> list[list[str]]:
        t = self.config.taxonomy
        rng = np.random.default_rng((self.config.seed, 2, chain))
        found = []
        for _ in range(t.epochs):
            order = [summaries[i] for i in rng.permutation(len(summaries))]
            found += [order[i : i + t.batch] for i in range(0, len(order), t.batch)]
        return found

    def _better(
        self, best: list[Label], labels: list[Label], given: Place, name: str
    ) -> Chain[tuple[list[Label], bool | None]]:
        """(the better table, whether it is the second one); None where nobody can tell."""
        if labels == best:
            return best, False
        vote = yield from self._vote([best, labels], given, name)
        return (labels if vote == 1 else best), None if vote is None else vote == 1

    def _vote(
        self, candidates: Sequence[list[Label]], given: Place, name: str = "vote"
    ) -> Chain[int | None]:
        """Which of them most answers choose, the first of several; None without a valid answer.
        Each answer sees them in another order, so that a favourite place decides nothing."""
        if all(labels == candidates[0] for labels in candidates):
            return 0
        documents = list(given.apart or given.summaries)[: self.config.select.documents]
        orders = {f"{name}, order {i}": own for i, own in enumerate(self._orders(len(candidates)))}
        task = dataclasses.replace(SELECTION, rules=self.rules.select)
        results = yield (
            task,
            {
                id: SelectionInput(
                    use_case=self.config.taxonomy.use_case,
                    candidates=[candidates[i] for i in order],
                    documents=documents,
                )
                for id, order in orders.items()
            },
        )
        votes = Counter(orders[id][r.value.best - 1] for id, r in results.items() if r.ok)
        if not votes:
            return None
        return max(range(len(candidates)), key=lambda i: (votes[i], -i))

    def _orders(self, count: int) -> list[tuple[int, ...]]:
        """Different orders, each with its reverse beside it: as many as are asked for, or there
        are."""
        rng = np.random.default_rng((self.config.seed, 3, count))
        most = min(self.config.select.orders, math.factorial(count))
        found: list[tuple[int, ...]] = []
        while len(found) < most:
            order = tuple(rng.permutation(count).tolist())
            found += [own for own in (order, order[::-1]) if own not in found]
        return found[:most]

    def _input(self, most: int, **more) -> TableInput:
        t = self.config.taxonomy
        return TableInput(
            use_case=t.use_case,
            max_labels=most,
            name_words=t.name_words,
            description_words=t.description_words,
            explanation_words=t.explanation_words,
            **more,
        )

    def _note(
        self,
        place: str,
        chain: int,
        number: int,
        kind: str,
        update: Update | None,
        labels: list[Label],
        chosen: bool | None = None,
    ) -> None:
        said = (
            (None, "", ()) if update is None else (update.rating, update.explanation, update.edits)
        )
        self.steps.append(Step(place, chain, number, kind, *said, labels, chosen))
