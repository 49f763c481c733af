"""Training on examples: an objective, a loader of packed batches, and how far one has come."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxconv.data.loader import Loader
from jaxconv.objectives.metrics import Metrics
from jaxconv.train import clock
from jaxconv.train.loop import Pending
from jaxconv.train.memory import announce
from jaxconv.train.mesh import replicate, share_rows
from jaxconv.train.state import TrainState
from jaxconv.train.update import tensor_names


class Supervised:
    """The work of a stage that trains on a loader's batches; see `loop.Work`.

    Args:
        update: of `make_update`.
        finish: (merged metrics, denominator) to scalars by name.
        loader: of `data.batches.Update`s.
        mesh: whose devices share the rows.
        constants: what the loss reads besides, such as the base of an adapter.
        evaluate: weights to numbers on held-out data.
        evaluated: tokens that an evaluation scores.
        flops: lengths of an update's streams to the model FLOPs that it takes.
        rates: learning rate of every update, to log.
    """

    def __init__(
        self,
        update: Callable[..., Any],
        finish: Callable[[Metrics, jax.Array], Mapping[str, jax.Array]],
        loader: Loader,
        mesh: Mesh,
        *,
        constants: tuple[Any, ...] = (),
        evaluate: Callable[[Any], Mapping[str, float]],
        evaluated: int,
        flops: Callable[[np.ndarray], float],
        rates: np.ndarray,
    ):
        self._update, self._finish = update, jax.jit(finish)
        self._loader, self._mesh, self._constants = loader, mesh, constants
        self._evaluate, self._evaluated = evaluate, evaluated
        self._flops, self._rates = flops, rates
        self._names: list[str] = []

    def step(
        self, state: TrainState, done: int, save: Callable[[], None]
    ) -> tuple[TrainState, Pending]:
        with clock.spending(clock.DATA):
            update = next(self._loader)
        batch = share_rows(update.batch, self._mesh)
        count = replicate(np.int32(update.count), self._mesh)
        if not self._names:
            announce(self._update, state, batch, count, *self._constants)
        state, updated = self._update(state, batch, count, *self._constants)
        if not self._names:
            self._names = tensor_names(updated.metrics, state)
        metrics = dict(self._finish(updated.metrics, updated.denominator))
        metrics["learning_rate"] = self._rates[done]
        metrics["tokens"] = update.tokens
        metrics["fill"] = update.tokens / update.cells
        flops = self._flops(update.lengths)
        return state, Pending(metrics, updated.finite, self._names, update.tokens, flops)

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        with clock.spending(clock.EVALUATION) as span:
            found = {name: float(x) for name, x in self._evaluate(state.averaged).items()}
        speed = {"speed/evaluated_tokens_per_s": self._evaluated / max(span.seconds, 1e-9)}
        return {f"held_out/{name}": x for name, x in found.items()} | speed

    def verdict(self, step: int, metrics: Mapping[str, float]) -> str | None:
        return None

    def snapshot(self) -> tuple[Any, dict[str, Any]]:
        return {}, {"position": self._loader.position}

    def like(self, host: dict[str, Any]) -> Any:
        return {}

    def restore(self, arrays: Any, host: dict[str, Any]) -> None:
        self._loader.seek(host["position"])
