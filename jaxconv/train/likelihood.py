"""How likely a decoder finds packed streams, and the objectives that are made of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxconv_kernels import linear_logprob

from jaxconv.data.batches import StreamBatch
from jaxconv.data.packing import TokenBatch, microbatches, pack_tokens
from jaxconv.data.plan import Placement, plan_once
from jaxconv.data.token_store import TokenStore
from jaxconv.models.decoder import Decoder
from jaxconv.models.lora import AdaptedDecoder
from jaxconv.models.sharding import for_host, reshape_like
from jaxconv.objectives import masked
from jaxconv.objectives.dpo import REFERENCE_FREE, dpo_loss
from jaxconv.objectives.metrics import Metrics
from jaxconv.objectives.segments import PairLogprobs, pair_logprobs, split_pairs
from jaxconv.objectives.sft import sft_loss
from jaxconv.train.mesh import (
    ROWS,
    WHOLE,
    on,
    over_rows,
    place,
    share_of,
    share_rows,
)
from jaxconv.train.trainable import join


def token_logprobs(
    model: Decoder | AdaptedDecoder, batch: TokenBatch, dropout_seeds: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(log-prob of each target, entropy before it), float32 [R, W], nats.

    Args:
        model: the decoder.
        batch: packed rows [R, W].
        dropout_seeds: uint32 [R], of an adapter's dropout; None drops nothing.
    """
    options = {"dropout_seeds": dropout_seeds} if isinstance(model, AdaptedDecoder) else {}
    hidden_RWD = model(batch.tokens, batch.positions, batch.segment_ids, **options)
    with jax.named_scope("head"):
        logprob_N, entropy_N = linear_logprob(
            hidden_RWD.reshape(-1, hidden_RWD.shape[-1]),
            model.head(),
            batch.targets.reshape(-1),
            softcap=model.config.final_softcap,
        )
    return reshape_like(logprob_N, batch.targets), reshape_like(entropy_N, batch.targets)


def sft_objective(
    trained: Any, batch: StreamBatch, resting: Decoder | None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Negative log-likelihood of the tokens to be learned; see `objectives.sft`."""
    logprob, entropy = token_logprobs(join(trained, resting), batch.tokens, batch.dropout_seeds)
    total, denominator, metrics = sft_loss(logprob, batch.tokens.mask)
    entropy = jax.lax.stop_gradient(masked.masked_sum(entropy, batch.tokens.mask))
    return total, denominator, Metrics({**metrics.sums, "entropy": entropy})


@dataclasses.dataclass(frozen=True)
class DPOObjective:
    """A preference loss over packed pairs; the fields are those of `objectives.dpo.dpo_loss`.

    sft_weight: of the negative log-likelihood of the chosen answer, nats a token, added to the loss
        of its pair (Pang et al. 2024, arXiv 2404.19733), so that the chosen answer does not get
        less likely together with the rejected one.
    """

    beta: float
    kind: str
    label_smoothing: float = 0.0
    gamma: float = 0.0
    sft_weight: float = 0.0

    def __call__(
        self,
        trained: Any,
        batch: StreamBatch,
        resting: Decoder | None,
        reference: Decoder | None = None,
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sum over the pairs of a micro-batch.

        The reference log-probs are those in the batch; where it has none they are computed now, by
        `reference`, or by `resting`, which is what an adapter starts from.
        """
        pairs = self._pairs(join(trained, resting), batch, batch.dropout_seeds)
        if self.kind in REFERENCE_FREE:
            ref_chosen = ref_rejected = None
        elif batch.reference is not None:
            ref_chosen, ref_rejected = split_pairs(batch.reference)
        else:
            live = self._pairs(resting if reference is None else reference, batch, None)
            ref_chosen, ref_rejected = live.chosen, live.rejected
        total, denominator, metrics = dpo_loss(
            pairs.chosen,
            pairs.rejected,
            ref_chosen,
            ref_rejected,
            beta=self.beta,
            kind=self.kind,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
            mask=pairs.present,
            chosen_tokens=pairs.chosen_tokens,
            rejected_tokens=pairs.rejected_tokens,
        )
        if self.sft_weight:
            each = -pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1.0)
            nll = masked.masked_sum(each, pairs.present)
            total += self.sft_weight * nll
            sums = {**metrics.sums, "chosen_nll": nll, "loss": total}
            metrics = jax.lax.stop_gradient(Metrics(sums, metrics.maxima))
        return total, denominator, metrics

    def _pairs(self, model, batch: StreamBatch, dropout_seeds) -> PairLogprobs:
        logprob, _ = token_logprobs(model, batch.tokens, dropout_seeds)
        return pair_logprobs(logprob, batch.tokens.mask, batch.tokens.segment_ids)


class Scorer:
    """Summed log-probs of every stream of a store.

    Args:
        mesh: whose devices share the rows.
        rows, width: of a compiled batch.
    """

    def __init__(self, mesh: Mesh, *, rows: int, width: int):
        self._mesh, self._rows, self._width = mesh, rows, width
        # By the store's identity, which lasts as long as the store that is kept beside the plan.
        self._plans: dict[int, tuple[TokenStore, list[Placement]]] = {}

    def __call__(
        self,
        trained: Any,
        resting: Decoder | None,
        store: TokenStore,
        watch: Callable[[], None] = lambda: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(sum of the log-probs, number) of the tokens to be learned: float64, int [n, streams].

        `watch` is called between batches; it may raise to stop.
        """
        streams = len(store) * store.streams
        sums, counts = np.zeros(streams), np.zeros(streams, int)

        def take(placement: Placement, mask: np.ndarray, logprob: jax.Array) -> None:
            learned = np.where(mask, jax.device_get(logprob).reshape(mask.shape), 0)
            gather = placement.packing.gather
            sums[placement.records] = [p.sum(dtype=np.float64) for p in gather(learned)]
            counts[placement.records] = [p.sum() for p in gather(mask)]

        trained, resting = place((trained, resting), self._mesh)
        held = share_of(self._mesh, self._rows).own
        under_way = None
        for placement in self._plan(store):
            watch()
            parts = [store.stream(i) for i in placement.records]
            batch = pack_tokens(
                placement.packing, [p.tokens for p in parts], [p.mask for p in parts]
            )
            own = jax.tree.map(lambda x: x[:, held], microbatches(batch, self._rows))
            logprob = _score(trained, resting, share_rows(own, self._mesh), mesh=self._mesh)
            logprob = for_host(logprob)
            # The numbers of a batch are fetched when the device has the next one to work on.
            if under_way:
                take(*under_way)
            under_way = placement, batch.mask, logprob
        if under_way:
            take(*under_way)
        return sums.reshape(-1, store.streams), counts.reshape(-1, store.streams)

    def _plan(self, store: TokenStore) -> list[Placement]:
        if id(store) not in self._plans:
            lengths = store.stream_lengths.reshape(-1)
            placements = plan_once(lengths, rows=self._rows, width=self._width)
            self._plans[id(store)] = store, placements
        return self._plans[id(store)][1]


@functools.partial(jax.jit, static_argnames="mesh")
def _score(trained: Any, resting: Any, batches: TokenBatch, *, mesh: Mesh) -> jax.Array:
    """Log-prob of every target, float32 [M, R, W]."""

    def local(trained, resting, batches):
        model = join(trained, resting)
        return jax.lax.map(lambda batch: token_logprobs(model, batch)[0], batches)

    with on(mesh):
        run = over_rows(local, mesh, (WHOLE, WHOLE, ROWS), ROWS)
        return run(trained, resting, batches)
