"""TnT-LLM without a language model: clusters of texts, named by their keyphrases.

A table of labels stands for a spherical Gaussian mixture over embeddings, or over words that occur
together where the encoder has no weights (`tnt_mixture.py`): `generate` fits one to a minibatch,
`update` goes on with everything seen so far, and splits and merges clusters as long as what is kept
apart becomes more likely. Names and descriptions are the phrases with the largest class-based
TF-IDF (Grootendorst 2022, arXiv 2203.05794). Which cluster a label means is remembered by its
table; so these are the rules of one run, which makes its tables again from the beginning. A table
of somebody else, which a dry run may have of a model, stands for the texts with the words of its
labels.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxconv.llm.conversations import Turn
from jaxconv.recipes.tnt_mixture import (
    Mixture,
    distinct,
    fit_mixture,
    floor_of,
    kmeans,
    nearest_pair,
    nearness,
    smoothed,
)
from jaxconv.recipes.tnt_tasks import (
    OTHER,
    OTHER_ID,
    Assignment,
    AssignmentInput,
    Choice,
    ChoiceInput,
    Label,
    Named,
    Relevance,
    RelevanceInput,
    Selection,
    SelectionInput,
    Summary,
    SummaryInput,
    Table,
    TableInput,
    Update,
    is_latin,
    is_vague,
)

_APART = 5  # of so many texts one is kept apart
_TRIES = 3  # proposals without success, then no more are made
_ALSO = 0.25  # so probable a label applies beside the primary one
_PHRASES = 6  # of a description
_MOST_PHRASES = 50_000  # that are counted
_WORD = re.compile(r"[^\W\d_]{2,}")


def user_text(turns: Sequence[Turn]) -> str:
    """What the user says, a line a turn."""
    return "\n".join(turn.content for turn in turns if turn.role == "user")


def summarise(input: SummaryInput) -> Summary:
    """The first words of what the user says."""
    words = user_text(input.turns).split() or ["nothing"]
    return Summary(summary=" ".join(words[: input.words]), explanation="what the user says first")


@dataclass(frozen=True)
class _Phrases:
    """Attributes:
    names: words and pairs of words that training texts have.
    counts: sparse [texts, names], whether a text has it.
    loose: bool [names], whether it begins or ends with a stop word.
    """

    names: np.ndarray
    counts: Any
    loose: np.ndarray


class TopicRules:
    """The rules of all tables of a run. Nothing is computed before a rule is asked.

    Args:
        texts: that may be asked about.
        vectors: float32 [texts, D], what tells how near they are.
        among: indices of those that may be learned from, which those to test on are not.
        summaries: of what tables are made from: the text that each is of.
        seed: of k-means.
    """

    def __init__(
        self,
        texts: Sequence[str],
        vectors: np.ndarray,
        among: Sequence[int],
        summaries: Mapping[str, str],
        *,
        seed: int,
    ):
        self._texts, self._vectors, self._among = texts, vectors, among
        self._row = {text: i for i, text in enumerate(texts)}
        self._of_summary = {s: self._row[text] for s, text in summaries.items()}
        self._seed = seed
        self._mixtures: dict[tuple[str, ...], Mixture] = {}

    @functools.cached_property
    def averaged(self) -> np.ndarray:
        """float32 [texts, D], vectors averaged with their nearest ones."""
        return smoothed(self._vectors, self._among)

    @functools.cached_property
    def _words(self) -> _Phrases | None:
        """None where no text has a word."""
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

        own = [self._texts[i] for i in self._among]
        if not any(_WORD.search(text) for text in own):
            return None
        counter = CountVectorizer(
            ngram_range=(1, 2),
            binary=True,
            token_pattern=r"(?u)\b[^\W\d_]{2,}\b",
            max_features=_MOST_PHRASES,
        ).fit(own)
        names = counter.get_feature_names_out()
        ends = ({name.split()[0], name.split()[-1]} for name in names)
        loose = np.array([bool(words & ENGLISH_STOP_WORDS) for words in ends])
        return _Phrases(names, counter.transform(self._texts), loose)

    # ------------------------------------------------------------ tables

    def generate(self, input: TableInput) -> Table:
        """The mixture whose number of clusters makes what is kept apart most likely."""
        rows = self._rows(input.documents)
        most = min(input.max_labels, distinct(self.averaged[rows]))
        tried = sorted({most, *(max(2, round(most * s)) for s in (0.15, 0.3, 0.5, 0.75))})
        fitted = [(self._apart(rows, k), k) for k in tried if k <= most]
        best = max(fitted, key=lambda found: found[0])[1]
        return Table(labels=self._table(self._fit(rows, best), input))

    def update(self, input: TableInput) -> Update:
        """Goes on with a minibatch more."""
        before = self._mixture(input.labels)
        if not input.documents:
            said = f"{len(before.weights)} clusters of {len(before.seen)} texts"
            rating = self._rating(before, before.seen)
            return Update(rating=rating, explanation=said, edits=[], labels=input.labels)
        new = self._rows(input.documents)
        rows = np.union1d(before.seen, new)
        mixture, edits = self._improved(
            self._fit(rows, before.centers[: len(rows)]), input.max_labels
        )
        labels = self._table(mixture, input)
        return Update(
            rating=self._rating(before, new),
            explanation="mean cosine of the new texts to their clusters",
            edits=edits,
            labels=labels,
        )

    def select(self, input: SelectionInput) -> Selection:
        """The table that makes a validation batch most likely."""
        x_ND = self.averaged[self._rows(input.documents)]
        found = [self._mixture(labels).likelihood(x_ND) for labels in input.candidates]
        best = int(np.argmax(found))
        said = ", ".join(f"{value:.4g}" for value in found)
        return Selection(reason=f"log-likelihoods {said}", best=best + 1)

    def _mixture(self, labels: Sequence[Label]) -> Mixture:
        """That the table stands for."""
        if _key(labels) not in self._mixtures:
            self._mixtures[_key(labels)] = self._by_words(labels)
        return self._mixtures[_key(labels)]

    def _by_words(self, labels: Sequence[Label]) -> Mixture:
        """Each training text is of the label whose words it has most of, rare ones counting more; a
        label that no text is of lies in the middle of all."""
        rows = np.asarray(self._among)
        x_ND = self.averaged[rows]
        shared_NK = np.zeros((len(rows), len(labels)))
        if self._words is not None:
            column = {name: i for i, name in enumerate(self._words.names)}
            counts = self._words.counts[rows]
            rarity_P = np.log1p(len(rows) / np.maximum(np.asarray(counts.sum(0)).ravel(), 1.0))
            for k, label in enumerate(labels):
                words = set(_WORD.findall(f"{label.name} {label.description}".lower()))
                own = sorted(column[word] for word in words & column.keys())
                shared_NK[:, k] = counts[:, own] @ rarity_P[own]
        own_N = np.where(shared_NK.max(1) > 0, shared_NK.argmax(1), -1)
        sizes = np.array([(own_N == k).sum() for k in range(len(labels))])
        centers = np.stack(
            [(x_ND[own_N == k] if sizes[k] else x_ND).mean(0) for k in range(len(labels))]
        )
        spread = (x_ND - centers[own_N]) ** 2
        variance = float(spread[own_N >= 0].mean() if sizes.any() else x_ND.var())
        weights = (sizes + 1) / (sizes + 1).sum()
        return Mixture(centers, weights, max(variance, 1e-8), floor_of(centers, x_ND), rows)

    def _rows(self, summaries: Iterable[str]) -> np.ndarray:
        return np.unique([self._of_summary[summary] for summary in summaries])

    def _fit(self, rows: np.ndarray, start: int | np.ndarray) -> Mixture:
        return fit_mixture(self.averaged, rows, start, seed=self._seed)

    def _halves(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        apart = np.random.default_rng(self._seed).permutation(len(rows)) % _APART == 0
        if len(rows) < 2 * _APART:
            return rows, rows
        return rows[~apart], rows[apart]

    def _apart(self, rows: np.ndarray, start: int | np.ndarray) -> float:
        """Likelihood of what is kept apart, of a mixture that is fitted to the rest."""
        own, apart = self._halves(rows)
        if (start if isinstance(start, int) else len(start)) > len(own):
            return -np.inf
        return self._fit(own, start).likelihood(self.averaged[apart])

    def _improved(self, mixture: Mixture, most: int) -> tuple[Mixture, list[str]]:
        """Splits and merges clusters while what is kept apart becomes more likely."""
        best, edits, failed = self._apart(mixture.seen, mixture.centers), [], 0
        skipped: set[int] = set()
        while failed < _TRIES:
            names = self._names(mixture)
            split, halves = self._widest(mixture, skipped)
            if halves is None:
                break
            centers = np.concatenate([np.delete(mixture.centers, split, axis=0), halves])
            said = f"split {names[split]!r}"
            if len(centers) > most:
                one, two = nearest_pair(np.delete(mixture.centers, split, axis=0))
                kept = np.delete(np.arange(len(mixture.centers)), split)
                said = f"merge {names[kept[one]]!r} and {names[kept[two]]!r}, and {said}"
                centers[one] = (centers[one] + centers[two]) / 2
                centers = np.delete(centers, two, axis=0)
            found = self._apart(mixture.seen, centers)
            if found > best:
                best, mixture, failed = found, self._fit(mixture.seen, centers), 0
                skipped = set()
                edits.append(said)
            else:
                failed += 1
                skipped.add(split)
        return mixture, edits

    def _widest(self, mixture: Mixture, skipped: set[int]):
        """(the cluster whose texts lie farthest apart in sum, centers of its halves)."""
        x_ND = self.averaged[mixture.seen]
        own = mixture.scores(x_ND).argmax(1)
        spread = np.bincount(
            own, ((x_ND - mixture.centers[own]) ** 2).sum(1), minlength=len(mixture.weights)
        )
        for cluster in np.argsort(-spread):
            members = x_ND[own == cluster]
            if int(cluster) not in skipped and len(np.unique(members, axis=0)) >= 2:
                halves = kmeans(members, 2, starts=2, seed=self._seed)
                return int(cluster), halves.cluster_centers_.astype(np.float32)
        return 0, None

    def _rating(self, mixture: Mixture, rows: np.ndarray) -> int:
        near = float(nearness(mixture.centers, self.averaged[rows]).mean())
        return int(np.clip(round(100 * near), 0, 100))

    # ------------------------------------------------------------ names

    def _table(self, mixture: Mixture, input: TableInput) -> list[Label]:
        """Labels of the clusters, named within the guards of a table."""
        labels: list[Label] = []
        for phrases in self._keyphrases(mixture):
            taken = {label.name.casefold() for label in labels}
            name = next(
                (n for n in _names_of(phrases, input.name_words) if n.casefold() not in taken),
                f"group{' ' if input.name_words > 1 else ''}{len(labels) + 1}",
            )
            said: list[str] = []
            for phrase in phrases:
                if len(" ".join([*said, phrase]).split()) < input.description_words:
                    said.append(phrase)
            labels.append(Label(name=name, description=f"about {', '.join(said)}" if said else ""))
        self._mixtures[_key(labels)] = mixture
        return labels

    def _names(self, mixture: Mixture) -> list[str]:
        return [", ".join(phrases[:2]) for phrases in self._keyphrases(mixture)]

    def _keyphrases(self, mixture: Mixture) -> list[list[str]]:
        """Of each cluster, the phrases with the largest class-based TF-IDF, none inside another."""
        count = len(mixture.weights)
        if self._words is None:
            return [[] for _ in range(count)]
        own = mixture.scores(self.averaged[mixture.seen]).argmax(1)
        texts = self._words.counts[mixture.seen]
        table_KP = np.stack(
            [np.asarray(texts[own == k].sum(0)).ravel() for k in range(count)]
        ).astype(np.float64)
        average = table_KP.sum() / count
        weights_KP = table_KP * np.log1p(average / np.maximum(table_KP.sum(0), 1.0))
        # A name says what is of its cluster: no phrase of all clusters, and no half of one.
        share_KP = table_KP / np.maximum(np.bincount(own, minlength=count), 1)[:, None]
        overall_P = table_KP.sum(0) / len(mixture.seen)
        weights_KP *= np.log(np.maximum(share_KP, 1e-12) / np.maximum(overall_P, 1e-12)).clip(0)
        weights_KP[:, self._words.loose] = 0.0
        found = []
        for row in weights_KP:
            chosen: list[str] = []
            for i in np.argsort(-row, kind="stable")[: 10 * _PHRASES]:
                words = set(self._words.names[i].split())
                if row[i] > 0 and not any(words & set(phrase.split()) for phrase in chosen):
                    chosen.append(str(self._words.names[i]))
                if len(chosen) == _PHRASES:
                    break
            found.append(chosen)
        return found

    # ------------------------------------------------------------ assignment and judgements

    def assign(self, input: AssignmentInput) -> Assignment:
        """The most probable cluster, and all that are at least a quarter as probable as it."""
        mixture = self._mixture(input.labels)
        text = user_text(input.turns)
        row = self._row[text]
        x_1D = self.averaged[row : row + 1]
        if nearness(mixture.centers, x_1D)[0] < mixture.floor or not _WORD.search(text):
            other = Named(id=OTHER_ID, name=OTHER)
            return Assignment(primary=other, applicable=[other])
        scores = mixture.scores(x_1D)[0]
        probable = np.exp(scores - scores.max())
        order = [int(k) for k in np.argsort(-probable, kind="stable") if probable[k] >= _ALSO]
        named = [Named(id=input.labels[k].id, name=input.labels[k].name) for k in order]
        return Assignment(primary=named[0], applicable=named)


def choose(input: ChoiceInput) -> Choice:
    """The label more of whose words the user says; the first of two that are equal."""
    first, second = (_shared(input.turns, label) for label in (input.first, input.second))
    return Choice(better="first" if first >= second else "second")


def relevant(input: RelevanceInput) -> Relevance:
    """Whether the user says a word of the label."""
    return Relevance(relevant=_shared(input.turns, input.label) > 0)


def _shared(turns: Sequence[Turn], label: Label) -> float:
    words = set(_WORD.findall(f"{label.name} {label.description.removeprefix('about ')}".lower()))
    return len(words & set(_WORD.findall(user_text(turns).lower()))) / max(len(words), 1)


def _names_of(phrases: Sequence[str], most: int) -> Iterator[str]:
    """Names that a table may have, of at most so many words, the best first; one word alone is the
    last resort."""
    own = [phrase for phrase in phrases if is_latin(phrase)]
    names = [", ".join(own[:n]) for n in range(1, len(own) + 1)]
    for name in sorted((*names, *own[1:]), key=lambda name: " " not in name):
        if len(name.split()) <= most and not is_vague(name):
            yield name


def is_placeholder(name: str) -> bool:
    """Whether it is what a cluster is called that no phrase names."""
    return re.fullmatch(r"group ?\d+", name) is not None


def _key(labels: Sequence[Label]) -> tuple[str, ...]:
    return tuple(f"{label.name}\0{label.description}" for label in labels)
