"""One PPO iteration on finished conversations: score, credit, then several epochs of updates."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxconv.data.packing import Packing, TokenBatch, first_fit, microbatches, pack_tokens, shift
from jaxconv.data.trajectories import Trajectories
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic
from jaxconv.models.sharding import for_host
from jaxconv.objectives.advantages import hierarchical_advantages, token_gae, turn_advantages
from jaxconv.objectives.importance import truncated_importance_weights
from jaxconv.objectives.kl import kl_token_rewards
from jaxconv.objectives.masked import masked_mean, masked_std
from jaxconv.objectives.metrics import Metrics
from jaxconv.objectives.ppo import PPOBatch, PPOCoefficients, finish_metrics, ppo_loss
from jaxconv.objectives.whitening import MODES, team_moments, whiten
from jaxconv.perf.flops import stream_flops, stream_training_flops
from jaxconv.train.actor_critic import evaluate_tokens, score
from jaxconv.train.memory import announce
from jaxconv.train.mesh import data_mesh, placed, placed_rows, replicate, share_whole
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import join
from jaxconv.train.update import make_update, tensor_names

ESTIMATORS = ("hierarchical", "token")


@dataclasses.dataclass(frozen=True)
class Credit:
    """How rewards become advantages; see `hierarchical_advantages`, `token_gae` and `whiten`.

    Attributes:
        estimator: "hierarchical", or "token" for plain GAE over all action tokens, which reads
            `gamma_token` and `lam_token` alone and has a turn's reward on its last token.
        gamma_turn, lam_turn, gamma_token, lam_token: discounts and traces of the two levels.
        anchor: "first" or "last", where a turn's value is read.
        deposit: "return" or "seed", how a turn's advantage reaches its last token.
        whitening: "whiten", "center" or "none", within each team.
        importance_cap: largest weight of trainer against sampler.
        reward_kl: KL to the reference as a token reward, per nat.
        flagged: advantage, after whitening, of every token of a turn that the quality filter
            flagged. Below 0 makes it cost; with 0 its tokens leave the loss and its denominator, so
            that nothing pulls on them, entropy bonus included.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    estimator: str = "hierarchical"
    gamma_turn: float = 1.0
    lam_turn: float = 0.95
    gamma_token: float = 1.0
    lam_token: float = 1.0
    anchor: str = "first"
    deposit: str = "return"
    whitening: str = "whiten"
    importance_cap: float = 2.0
    reward_kl: float = 0.0
    flagged: float = 0.0

    def __post_init__(self):
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator={self.estimator!r}; it may be 'hierarchical' or 'token'")
        if self.whitening not in MODES:
            raise ValueError(f"whitening={self.whitening!r}; it may be {', '.join(MODES)}")
        if not self.importance_cap >= 1.0:
            raise ValueError(f"importance_cap={self.importance_cap}; it must be at least 1")
        if not self.reward_kl >= 0.0:
            raise ValueError(f"reward_kl={self.reward_kl}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class Minibatching:
    """How a batch is gone through.

    Attributes:
        epochs: passes over the batch.
        minibatches: updates a pass.
        rows: packed rows a micro-batch.
        width: tokens a row.
        capacity: micro-batches are padded to a multiple of this; padding is skipped.
    """

    epochs: int = 2
    minibatches: int = 2
    rows: int = 8
    width: int = 256
    capacity: int = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOTokens:
    """Packed rows and what the loss reads at each of their targets."""

    tokens: TokenBatch
    ppo: PPOBatch


class PPO:
    """The update of one run: coefficients, compiled steps, and what they need.

    Args:
        optimizer: of the actor-critic.
        coefficients: of the loss.
        credit: rewards to advantages.
        minibatching: sizes.
        temperature: of the sampler.
        value_gradient: factor on the critic's gradient into the trunk.
        teams: number of teams.
        mesh: where training lies; devices of this process with whole models if not given.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        *,
        coefficients: PPOCoefficients,
        credit: Credit,
        minibatching: Minibatching,
        temperature: float,
        value_gradient: float,
        teams: int,
        mesh: Mesh | None = None,
    ):
        self.credit, self.sizes, self.temperature, self.teams = (
            credit,
            minibatching,
            temperature,
            teams,
        )
        self._reads_reference = coefficients.kl_coef > 0 or credit.reward_kl > 0

        def loss(trained: ActorCritic, batch: PPOTokens, learn_policy: jax.Array, resting):
            logprob, entropy, value = evaluate_tokens(
                join(trained, resting),
                batch.tokens,
                temperature=temperature,
                value_gradient=value_gradient,
            )
            return ppo_loss(logprob, entropy, value, batch.ppo, coefficients=coefficients)

        def rest_policy(tree: ActorCritic, learn_policy: jax.Array, resting) -> ActorCritic:
            """While the critic warms up only its own head moves."""
            decoder = jax.tree.map(lambda x: x * learn_policy, tree.decoder)
            return ActorCritic(decoder, tree.value_head)

        self.tensor_names: list[str] = []  # known after the first update
        self.mesh = mesh or data_mesh(minibatching.rows)
        self._update = make_update(loss, optimizer, self.mesh, rest_policy)

    @functools.partial(jax.profiler.annotate_function, name="train")
    def iterate(
        self,
        state: TrainState,
        trajectories: Trajectories,
        *,
        reference: ActorCritic | None,
        learn_policy: bool,
        seed: Sequence[int],
        resting: Decoder | None = None,
    ) -> tuple[TrainState, dict[str, float], np.ndarray]:
        """Trains on one batch of finished streams.

        Returns the new state, metrics to log, and whether each tensor of `tensor_names` was finite
        in every update.

        Args:
            state: donated; its arrays are on every device of `mesh`.
            trajectories: what was said and earned.
            reference: frozen policy for the KL terms.
            learn_policy: False trains the critic's head alone.
            seed: of the order of the minibatches.
            resting: the base, where an adapter is trained.
        """
        t = trajectories
        streams = len(t.tokens)
        model = join(state.model, resting)
        old_logprob, old_value, final_value = self._score(model, t.tokens, t.turn_ids)
        ref_logprob = None
        if self._reads_reference:
            ref_logprob = self._score(reference, t.tokens, t.turn_ids)[0]
        arrays = (
            t.value,
            t.turn_rewards,
            t.turn_ids,
            t.keep_turns,
            t.team,
            t.logprob,
            old_logprob,
            ref_logprob,
            np.where(t.truncated, final_value, 0).astype(np.float32),
        )
        per_token, metrics = _credit_tokens(
            *jax.device_put(arrays), credit=self.credit, teams=self.teams
        )
        per_token = jax.device_get(per_token)
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        metrics["drift/value_abs_mean"] = float(np.abs(old_value - t.value)[t.turn_ids >= 0].mean())

        rng = np.random.default_rng(list(seed))
        learn = replicate(np.float32(learn_policy), self.mesh)
        totals: tuple[jax.Array, Metrics] | None = None
        finite: list[jax.Array] = []
        tokens = cells = 0
        for _ in range(self.sizes.epochs):
            for chosen in np.array_split(rng.permutation(streams), self.sizes.minibatches):
                batch, used = self._pack(t.tokens, t.turn_ids, per_token, chosen)
                count = replicate(np.int32(used), self.mesh)
                tokens += sum(len(t.tokens[i]) for i in chosen)
                cells += used * self.sizes.rows * self.sizes.width
                if not self.tensor_names:
                    announce(self._update, state, batch, count, learn, resting)
                state, updated = self._update(state, batch, count, learn, resting)
                part = updated.denominator, updated.metrics
                totals = part if totals is None else (totals[0] + part[0], totals[1].merge(part[1]))
                finite.append(updated.finite)
                if not self.tensor_names:
                    self.tensor_names = tensor_names(updated.metrics, state)
        metrics["minibatch/fill"] = tokens / cells
        denominator, merged = totals
        finished, finite = jax.device_get((_finish(merged, denominator), finite))
        metrics |= {name: float(x) for name, x in finished.items()}
        return state, metrics, np.all(finite, axis=0)

    def lower(
        self, state: TrainState, resting: Decoder | None, microbatches: int
    ) -> "jax.stages.Lowered":
        """Traces the update of so many micro-batches, with shapes in the place of arrays.

        Args:
            state, resting: of `TrainState.shapes` and `placed` on `mesh`.
            microbatches: of a minibatch.
        """
        shape = (microbatches, self.sizes.rows, self.sizes.width)
        ids, number, flag = (jax.ShapeDtypeStruct(shape, t) for t in (np.int32, np.float32, bool))
        reference = number if self._reads_reference else None
        batch = PPOTokens(
            TokenBatch(ids, ids, ids, ids, flag),
            PPOBatch(number, reference, number, number, number, number, flag),
        )
        count, learn = placed((np.int32(0), np.float32(0)), self.mesh)
        return self._update.lower(state, placed_rows(batch, self.mesh), count, learn, resting)

    def flops(
        self, config: DecoderConfig, lengths: Sequence[int], *, trains_weights: bool = True
    ) -> float:
        """Model FLOPs of `iterate` on streams of these lengths: scoring and every epoch."""
        scored = 1 + self._reads_reference
        trained = stream_training_flops(config, lengths, trains_weights=trains_weights)
        return scored * stream_flops(config, lengths) + self.sizes.epochs * trained

    def _score(self, model: ActorCritic, tokens: Sequence[Sequence[int]], turn_ids: np.ndarray):
        """Log-prob of and value before each token, and the value after the last, as [B, T], [B]."""
        packing = self._packing([len(ids) for ids in tokens])
        batch = pack_tokens(packing, tokens, [np.zeros(len(ids), bool) for ids in tokens])
        scored = score(
            model,
            share_whole(microbatches(batch, self.sizes.rows), self.mesh),
            replicate(np.int32(packing.used(self.sizes.rows)), self.mesh),
            temperature=self.temperature,
            mesh=self.mesh,
        )
        logprob, value = jax.device_get(for_host(scored))
        out_logprob = np.zeros(turn_ids.shape, np.float32)
        out_value = np.zeros(turn_ids.shape, np.float32)
        final = np.zeros(len(turn_ids), np.float32)
        pairs = zip(packing.gather(logprob), packing.gather(value), strict=True)
        for i, (p, v) in enumerate(pairs):
            out_logprob[i, 1 : len(p)] = p[:-1]
            out_value[i, 1 : len(v)] = v[:-1]
            final[i] = v[-1]
        mask = turn_ids >= 0
        return np.where(mask, out_logprob, 0), np.where(mask, out_value, 0), final

    def _packing(self, lengths: Sequence[int]) -> Packing:
        return first_fit(
            lengths, self.sizes.width, rows_multiple=self.sizes.rows * self.sizes.capacity
        )

    def _pack(self, tokens, turn_ids, per_token: PPOBatch, chosen) -> tuple[PPOTokens, int]:
        lengths = [len(tokens[i]) for i in chosen]
        packing = self._packing(lengths)

        def packed(array_BT, dtype):
            return packing.scatter(
                [shift(array_BT[i, :n]) for i, n in zip(chosen, lengths, strict=True)], dtype
            )

        mask_BT = per_token.mask
        batch = PPOTokens(
            tokens=pack_tokens(
                packing,
                [tokens[i] for i in chosen],
                [mask_BT[i, :n] for i, n in zip(chosen, lengths, strict=True)],
            ),
            ppo=jax.tree.map(lambda x: packed(x, x.dtype), per_token),
        )
        batches = share_whole(microbatches(batch, self.sizes.rows), self.mesh)
        return batches, packing.used(self.sizes.rows)


_finish = jax.jit(finish_metrics)


@functools.partial(jax.jit, static_argnames=("credit", "teams"))
def _credit_tokens(
    value_BT,
    turn_rewards_BN,
    turn_ids_BT,
    keep_turns_BN,
    team_B,
    behaviour_BT,
    old_logprob_BT,
    ref_logprob_BT,
    bootstrap_B,
    *,
    credit: Credit,
    teams: int,
) -> tuple[PPOBatch, dict[str, jax.Array]]:
    """Advantages, critic targets and importance weights of every action token, and metrics."""
    mask_BT = turn_ids_BT >= 0
    token_rewards_BT = jnp.zeros_like(value_BT)
    if credit.reward_kl > 0:
        token_rewards_BT = kl_token_rewards(
            old_logprob_BT, ref_logprob_BT, mask_BT, coefficient=credit.reward_kl
        )
    advantages_BT, targets_BT = _advantages(
        value_BT,
        turn_rewards_BN,
        token_rewards_BT,
        turn_ids_BT,
        keep_turns_BN,
        bootstrap_B,
        credit,
    )
    weights_BT, drift = truncated_importance_weights(
        old_logprob_BT, behaviour_BT, mask_BT, cap=credit.importance_cap
    )
    moments = team_moments(advantages_BT, mask_BT, team_B, teams)
    metrics = {f"drift/{name}": x for name, x in drift.items()}
    for team in range(teams):
        metrics[f"advantage/mean_team_{team}"] = moments.mean[team]
        metrics[f"advantage/std_team_{team}"] = moments.std[team]
    tokens = jnp.maximum(mask_BT.sum(), 1)
    metrics["advantage/abs_mean"] = jnp.abs(advantages_BT).sum() / tokens
    metrics["advantage/zero_fraction"] = ((advantages_BT == 0) & mask_BT).sum() / tokens
    # Moments are those of the turns that count; centring would praise or blame the others.
    kept_BT = jnp.take_along_axis(keep_turns_BN, jnp.maximum(turn_ids_BT, 0), axis=1)
    flagged_BT = mask_BT & ~kept_BT
    whitened_BT = whiten(
        advantages_BT, mask_BT & kept_BT, team_B, num_groups=teams, mode=credit.whitening
    )
    turns = turn_advantages(
        value_BT,
        turn_rewards_BN,
        turn_ids_BT,
        mask_BT,
        bootstrap_B,
        gamma_turn=credit.gamma_turn,
        lam_turn=credit.lam_turn,
        anchor=credit.anchor,
        keep_turns=keep_turns_BN,
    )
    counted_BN = turns.present & keep_turns_BN
    turn_std = masked_std(turns.advantage, counted_BN)
    metrics["advantage/turn_mean"] = masked_mean(turns.advantage, counted_BN)
    metrics["advantage/turn_std"] = turn_std
    metrics["advantage/turn_abs_mean"] = masked_mean(jnp.abs(turns.advantage), counted_BN)
    target_std = masked_std(turns.target, counted_BN)
    explained = 1.0 - jnp.square(turn_std / jnp.where(target_std > 0, target_std, 1.0))
    metrics["critic/explained_variance_turn"] = jnp.where(target_std > 0, explained, jnp.nan)
    batch = PPOBatch(
        old_logprob=old_logprob_BT,
        ref_logprob=ref_logprob_BT,
        advantage=jnp.where(flagged_BT, credit.flagged, whitened_BT),
        value_target=targets_BT,
        old_value=value_BT,
        is_weight=weights_BT,
        mask=mask_BT & kept_BT if credit.flagged == 0.0 else mask_BT,
    )
    return batch, metrics


def _advantages(
    value_BT,
    turn_rewards_BN,
    token_rewards_BT,
    turn_ids_BT,
    keep_turns_BN,
    bootstrap_B,
    credit: Credit,
) -> tuple[jax.Array, jax.Array]:
    """(advantages, critic targets) of every action token by the estimator of `credit`."""
    mask_BT = turn_ids_BT >= 0
    if credit.estimator == "hierarchical":
        return hierarchical_advantages(
            value_BT,
            turn_rewards_BN,
            token_rewards_BT,
            turn_ids_BT,
            mask_BT,
            bootstrap_B,
            gamma_turn=credit.gamma_turn,
            lam_turn=credit.lam_turn,
            gamma_token=credit.gamma_token,
            lam_token=credit.lam_token,
            anchor=credit.anchor,
            deposit=credit.deposit,
            keep_turns=keep_turns_BN,
        )
    turn_BT = jnp.maximum(turn_ids_BT, 0)
    # Something is read before every turn, so a turn ends where the next token has another id.
    next_BT = jnp.pad(turn_ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    at_end_BT = mask_BT & (next_BT != turn_ids_BT)
    earned_BT = jnp.take_along_axis(turn_rewards_BN, turn_BT, axis=1)
    advantages_BT, targets_BT = token_gae(
        value_BT,
        token_rewards_BT + jnp.where(at_end_BT, earned_BT, 0.0),
        mask_BT,
        bootstrap_B,
        gamma=credit.gamma_token,
        lam=credit.lam_token,
    )
    kept_BT = jnp.take_along_axis(keep_turns_BN, turn_BT, axis=1)
    return jnp.where(kept_BT, advantages_BT, 0.0), jnp.where(kept_BT, targets_BT, value_BT)
