"""Training a sentence encoder on queries with their documents, in the loop of every stage."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv.data.loader import Loader
from jaxconv.data.query_documents import QueryAssembler, QueryBatch, QueryDocuments, plan_queries
from jaxconv.errors import Refused
from jaxconv.models.encoder import Encoder
from jaxconv.models.pooling import cut, pool_rows
from jaxconv.models.sentence_encoder import SentenceEncoder
from jaxconv.models.sharding import DATA
from jaxconv.objectives.metrics import Metrics
from jaxconv.objectives.similarity import (
    listwise_kl_loss,
    margin_mse_loss,
    multiple_negatives_loss,
)
from jaxconv.train.loop import Loop, LoopSettings, Outcome
from jaxconv.train.mesh import data_mesh, share_of
from jaxconv.train.optimizer import make_optimizer, make_schedule, rates
from jaxconv.train.state import TrainState
from jaxconv.train.supervised import Supervised
from jaxconv.train.update import make_update
from jaxconv.train.workdir import Workdir

LOSSES = ("multiple_negatives", "margin_mse", "listwise_kl")


@dataclasses.dataclass(frozen=True)
class RetrieverSettings:
    """Attributes:
    loss: one of `LOSSES`; the last two learn from a teacher's scores.
    scale: of cosines: the inverse of a temperature.
    steps: updates.
    batch: queries an update; devices share them, and each query meets the documents of all.
    learning_rate, warmup, schedule, optimizer, b2, weight_decay, clip_norm: see
        `make_schedule` and `make_optimizer`.
    checkpoint_every, keep, evaluate_every: see `LoopSettings`.
    keep_best: whether the weights are those with the lowest held-out loss.
    seed: of the order.
    """

    loss: str = "multiple_negatives"
    scale: float = 20.0
    steps: int = 1000
    batch: int = 64
    learning_rate: float = 2e-5
    warmup: int = 100
    schedule: str = "linear"
    optimizer: str = "adamw"
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    checkpoint_every: int = 500
    keep: int = 2
    evaluate_every: int = 100
    keep_best: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise Refused(f"loss is {self.loss!r}; it may be {', '.join(LOSSES)}")


@dataclasses.dataclass(frozen=True)
class RetrievalObjective:
    """The loss of a micro-batch of queries with their documents.

    Attributes:
        loss: one of `LOSSES`. Cosines times `scale` are what it compares.
        scale: see `RetrieverSettings`.
        pooling: of the tokens of a text.
        dim: numbers of an embedding that are compared; None: all.
    """

    loss: str
    scale: float
    pooling: str
    dim: int | None

    def __call__(
        self, model: Encoder, batch: QueryBatch, *, axis_name: str | None = DATA
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sum over the queries; `axis_name` is that of the devices that share a batch."""
        documents, lengths = batch.documents, batch.document_lengths
        queries_BD = self._embed(model, batch.queries, batch.query_lengths)
        flat_MD = self._embed(
            model, documents.reshape(-1, documents.shape[-1]), lengths.reshape(-1)
        )
        documents_BND = flat_MD.reshape(*lengths.shape, -1)
        if self.loss == "multiple_negatives":
            return multiple_negatives_loss(
                queries_BD, documents_BND, scale=self.scale, axis_name=axis_name
            )
        queries_BD = self.scale * queries_BD
        if self.loss == "listwise_kl":
            return listwise_kl_loss(queries_BD, documents_BND, batch.teacher)
        margins_BN = batch.teacher[:, :1] - batch.teacher[:, 1:]
        return margin_mse_loss(queries_BD, documents_BND, margins_BN)

    def _embed(self, model: Encoder, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
        inside_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
        hidden_BTD = model(tokens_BT, segment_ids_BT=inside_BT.astype(jnp.int32))
        return cut(pool_rows(hidden_BTD, length_B, self.pooling), self.dim, normalize=True)


def fit_retriever(
    sentences: SentenceEncoder,
    train: QueryDocuments,
    held_out: QueryDocuments,
    settings: RetrieverSettings,
    workdir: Workdir,
    *,
    name: str = "retriever",
) -> tuple[SentenceEncoder, Outcome]:
    """Trains all weights of an encoder; goes on where a stopped or killed run was.

    Args:
        sentences: to start from; it stays as it is. Cosines are what is learned, whether or not it
            normalizes.
        train: at least `settings.batch` queries.
        held_out: at least one; their loss is measured, in batches of `settings.batch` at most.
        settings: how.
        workdir: of the run.
        name: of the stage in checkpoints and metrics.

    Returns:
        (the encoder that came out, how the stage ended).

    Raises:
        Refused: too few queries, or an odd setting.
    """
    s = settings
    for what, queries, least in (("train", train, s.batch), ("held_out", held_out, 1)):
        if len(queries) < least:
            raise Refused(f"{what} has {len(queries)} queries; it must have at least {least}")
    mesh = data_mesh(s.batch)
    objective = RetrievalObjective(s.loss, s.scale, sentences.pooling, sentences.dim)
    schedule = make_schedule(s.learning_rate, kind=s.schedule, steps=s.steps, warmup=s.warmup)
    optimizer = make_optimizer(
        schedule, kind=s.optimizer, b2=s.b2, weight_decay=s.weight_decay, clip_norm=s.clip_norm
    )
    # Updates use the weights up.
    state = TrainState.create(jax.tree.map(jnp.copy, sentences.encoder), optimizer, mesh=mesh)
    placements = plan_queries(len(train), batch=s.batch, seed=s.seed, steps=s.steps)
    loop = LoopSettings(
        name,
        s.steps,
        checkpoint_every=s.checkpoint_every,
        keep=s.keep,
        evaluate_every=s.evaluate_every,
        best="held_out/loss" if s.keep_best else "",
        dtype=sentences.encoder.config.dtype,
    )
    with Loader(placements, QueryAssembler(train, share_of(mesh, s.batch))) as loader:
        work = Supervised(
            make_update(objective, optimizer, mesh),
            _means,
            loader,
            mesh,
            evaluate=_evaluation(objective, held_out, s.batch),
            evaluated=held_out.tokens,
            flops=lambda lengths: 0.0,  # unknown: utilization is not reported
            rates=rates(schedule, s.steps),
        )
        outcome = Loop(work, state, loop, workdir).run()
    encoder = jax.device_put(outcome.model, jax.local_devices()[0])
    return dataclasses.replace(sentences, encoder=encoder), outcome


def _means(metrics: Metrics, denominator: jax.Array) -> dict[str, jax.Array]:
    return metrics.means(denominator)


def _evaluation(
    objective: RetrievalObjective, held_out: QueryDocuments, batch: int
) -> Callable[[Any], Mapping[str, float]]:
    """Weights to the means of the loss and its metrics over held-out queries."""
    compiled = jax.jit(functools.partial(objective, axis_name=None))
    whole = len(held_out) // batch * batch
    parts = [np.arange(i, i + batch) for i in range(0, whole, batch)]
    if not parts:
        parts = [np.arange(len(held_out))]

    def evaluate(model: Encoder) -> dict[str, float]:
        model = jax.device_put(model, jax.local_devices()[0])
        found = [compiled(model, held_out.take(part))[1:] for part in parts]
        total, metrics = found[0]
        for denominator, more in found[1:]:
            total, metrics = total + denominator, metrics.merge(more)
        return {name: float(x) for name, x in metrics.means(total).items()}

    return evaluate
