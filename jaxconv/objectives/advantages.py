"""Advantages over a conversation: per token, or hierarchical (per turn, then per token).

Layout. One row is the token stream of ONE agent in one episode: what it was shown and what it said.
Its own words are *action tokens*; everything else (its brief, other agents' words, forced markers)
is environment. `values[b, i]` is the critic at the state before token i is generated.

Token GAE (Schulman et al. 2016) runs over the action tokens as if they were adjacent:

    d_i = r_i + γ v_next(i) − v_i          A_i = d_i + γ λ A_next(i)

Hierarchical advantages (OMAR, arXiv 2602.03109, section on hierarchical advantage estimation) first
treat each own turn t, with first and last action tokens a_t and e_t, as one step:

    V_t = v[a_t]  (anchor "first")   or   v[e_t]  (anchor "last")
    D_t = R_t + γT V_{t+1} − V_t           A_t = D_t + γT λT A_{t+1}           G_t = A_t + V_t

and then run token GAE inside each turn, restarted at its end, where the turn return is deposited:

    i = e_t:  A_i = G_t + r_i − v_i                          (deposit "return")
              A_i = A_t + r_i                                (deposit "seed", anchor "last" only)
    i < e_t:  A_i = r_i + γK v_next(i) − v_i + γK λK A_next(i)

The anchor and the deposit belong together. With anchor "first" the seed A_t was measured against
v[a_t], not against v[e_t], and the policy gradient is biased; that pair is refused. So is reading
"the turn advantage as a pseudo-reward" as a reward from which v is subtracted once more: no option
here does it. `docs/advantages.md` has the numbers.

Everything is float32 whatever the inputs are: integer rewards are converted before any arithmetic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ANCHORS = ("first", "last")
DEPOSITS = ("return", "seed")


class TurnAdvantages(NamedTuple):
    """The turn level of the recursion, each [B, N]; zero where a turn has no action tokens."""

    advantage: jax.Array  # A_t, float32, after the quality filter
    value: jax.Array  # V_t, float32
    target: jax.Array  # G_t = A_t + V_t, float32
    present: jax.Array  # bool: the turn has at least one action token


def check_pair(anchor: str, deposit: str) -> None:
    """Raises ValueError unless (`anchor`, `deposit`) leaves the policy gradient unbiased."""
    if anchor not in ANCHORS:
        raise ValueError(f"anchor is {anchor!r}; it may be 'first' or 'last'")
    if deposit not in DEPOSITS:
        raise ValueError(f"deposit is {deposit!r}; it may be 'return' or 'seed'")
    if (anchor, deposit) == ("first", "seed"):
        raise ValueError(
            "anchor 'first' with deposit 'seed' biases the policy gradient; "
            "use anchor 'first' with deposit 'return', or anchor 'last' with either"
        )


def turn_advantages(
    values: jax.Array,
    turn_rewards: jax.Array,
    turn_ids: jax.Array,
    action_mask: jax.Array,
    bootstrap: jax.Array,
    *,
    gamma_turn: float,
    lam_turn: float,
    anchor: str = "first",
    keep_turns: jax.Array | None = None,
) -> TurnAdvantages:
    """The turn level alone; arguments and errors as in `hierarchical_advantages`."""
    if anchor not in ANCHORS:
        raise ValueError(f"anchor is {anchor!r}; it may be 'first' or 'last'")
    values_BT = jnp.asarray(values, jnp.float32)
    rewards_BN = jnp.asarray(turn_rewards, jnp.float32)
    bootstrap_B = jnp.asarray(bootstrap, jnp.float32)
    turn_ids_BT = jnp.asarray(turn_ids)
    keep_BN = jnp.ones_like(rewards_BN) if keep_turns is None else jnp.asarray(keep_turns)
    keep_BN = keep_BN.astype(jnp.float32)
    _check_shapes(values_BT, turn_ids_BT, action_mask, bootstrap_B, rewards_BN, keep_BN)

    action_BT = (jnp.asarray(action_mask) != 0) & (turn_ids_BT >= 0)
    first_BT, last_BT = _turn_ends(turn_ids_BT, action_BT)
    anchor_BT = first_BT if anchor == "first" else last_BT
    # Each turn has at most one anchor token, so the sum below reads one value; column N is dropped.
    N = rewards_BN.shape[1]
    columns_BT = jnp.where(anchor_BT, turn_ids_BT, N)
    place = jax.vmap(lambda columns, x: jnp.zeros(N, x.dtype).at[columns].add(x, mode="drop"))
    V_BN = place(columns_BT, jnp.where(anchor_BT, values_BT, 0.0))
    present_BN = place(columns_BT, anchor_BT.astype(jnp.int32)) > 0

    def turn(carry, x):
        A_next, V_next, passed_on = carry
        reward, V, present = x
        reward = reward + passed_on
        A = reward + gamma_turn * V_next - V + gamma_turn * lam_turn * A_next
        # A turn without action tokens is no step: what it earned belongs to the turn before it.
        return (
            jnp.where(present, A, A_next),
            jnp.where(present, V, V_next),
            jnp.where(present, 0.0, reward),
        ), jnp.where(present, A, 0.0)

    zeros_B = jnp.zeros_like(bootstrap_B)
    _, A_NB = lax.scan(
        turn, (zeros_B, bootstrap_B, zeros_B), (rewards_BN.T, V_BN.T, present_BN.T), reverse=True
    )
    A_BN = jnp.where(keep_BN != 0, A_NB.T * keep_BN, 0.0)
    return TurnAdvantages(A_BN, V_BN, A_BN + V_BN, present_BN)


@jax.named_scope("hierarchical_advantages")
def hierarchical_advantages(
    values: jax.Array,
    turn_rewards: jax.Array,
    token_rewards: jax.Array,
    turn_ids: jax.Array,
    action_mask: jax.Array,
    bootstrap: jax.Array,
    *,
    gamma_turn: float,
    lam_turn: float,
    gamma_token: float,
    lam_token: float,
    anchor: str = "first",
    deposit: str = "return",
    keep_turns: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Turn-level GAE over an agent's own turns, then token-level GAE restarted in each turn.

    Args:
        values: [B, T] float; the critic before each token. Read at action tokens only.
        turn_rewards: [B, N] any number type; the reward of the agent's n-th own turn. N may exceed
            the turns present; entries of turns that never happened must be 0. The reward of a turn
            without action tokens goes, undiscounted, to the turn before it that has some.
        token_rewards: [B, T]; rewards of single tokens (a KL penalty). They act inside their own
            turn only and are read at action tokens only.
        turn_ids: [B, T] integer; own-turn index of each token, −1 off own turns. Non-decreasing
            over the own tokens of a row. An index of N or more gives NaN at its tokens.
        action_mask: [B, T] bool or 0/1; the tokens that the policy chose. A token counts as an
            action when this holds and its turn id is not −1, so that a forced end-of-turn marker
            may carry a turn id without being an action.
        bootstrap: [B]; the critic's value after the last turn where the episode was truncated,
            0 where it terminated.
        gamma_turn, lam_turn, gamma_token, lam_token: discounts and trace decays in [0, 1].
        anchor: "first" or "last" action token of a turn stands for its value.
        deposit: "return" or "seed" (anchor "last" only, where the two are equal).
        keep_turns: [B, N] bool or float quality filter m_t; A_t becomes m_t·A_t after the turn
            recursion, so earlier turns keep their credit and a dropped turn returns its own value.

    Returns:
        (advantages, targets), both [B, T] float32 and zero off the action tokens;
        targets = advantages + values, for the critic, before any whitening.

    Raises:
        ValueError: an unknown or biased (anchor, deposit) pair, or shapes that do not fit.
    """
    check_pair(anchor, deposit)
    turns = turn_advantages(
        values,
        turn_rewards,
        turn_ids,
        action_mask,
        bootstrap,
        gamma_turn=gamma_turn,
        lam_turn=lam_turn,
        anchor=anchor,
        keep_turns=keep_turns,
    )
    turn_ids_BT = jnp.asarray(turn_ids)
    action_BT = (jnp.asarray(action_mask) != 0) & (turn_ids_BT >= 0)
    values_BT = jnp.where(action_BT, jnp.asarray(values, jnp.float32), 0.0)
    _check_like("token_rewards", token_rewards, values_BT.shape)
    rewards_BT = jnp.where(action_BT, jnp.asarray(token_rewards, jnp.float32), 0.0)
    _, last_BT = _turn_ends(turn_ids_BT, action_BT)
    index_BT = jnp.where(action_BT, turn_ids_BT, 0)
    deposit_BN = turns.target if deposit == "return" else turns.advantage
    end_BT = jnp.take_along_axis(deposit_BN, index_BT, axis=1, mode="fill", fill_value=jnp.nan)
    if deposit == "return":
        end_BT = end_BT - values_BT

    def token(carry, x):
        A_next, v_next = carry
        reward, v, end, action, last = x
        inner = gamma_token * v_next - v + gamma_token * lam_token * A_next
        A = reward + jnp.where(last, end, inner)
        return (jnp.where(action, A, A_next), jnp.where(action, v, v_next)), A

    zeros_B = jnp.zeros(values_BT.shape[0], jnp.float32)
    xs = (rewards_BT.T, values_BT.T, end_BT.T, action_BT.T, last_BT.T)
    _, A_TB = lax.scan(token, (zeros_B, zeros_B), xs, reverse=True)
    advantages_BT = jnp.where(action_BT, A_TB.T, 0.0)
    return advantages_BT, advantages_BT + values_BT


@jax.named_scope("token_gae")
def token_gae(
    values: jax.Array,
    rewards: jax.Array,
    action_mask: jax.Array,
    bootstrap: jax.Array,
    *,
    gamma: float,
    lam: float,
) -> tuple[jax.Array, jax.Array]:
    """GAE over the action tokens of each row, environment tokens skipped (Schulman et al. 2016).

    Args:
        values: [B, T] float; the critic before each token. Read at action tokens only.
        rewards: [B, T] any number type. Read at action tokens only: a reward for a whole turn or
            episode belongs on its last action token.
        action_mask: [B, T] bool or 0/1; the tokens that the policy chose.
        bootstrap: [B]; value after the last action token where truncated, 0 where terminated.
        gamma, lam: discount and trace decay in [0, 1], counted in action tokens.

    Returns:
        (advantages, targets), both [B, T] float32 and zero off the mask.

    Raises:
        ValueError: shapes that do not fit.
    """
    values_BT = jnp.asarray(values, jnp.float32)
    bootstrap_B = jnp.asarray(bootstrap, jnp.float32)
    _check_streams(values_BT, action_mask, bootstrap_B)
    _check_like("rewards", rewards, values_BT.shape)
    action_BT = jnp.asarray(action_mask) != 0
    values_BT = jnp.where(action_BT, values_BT, 0.0)
    rewards_BT = jnp.where(action_BT, jnp.asarray(rewards, jnp.float32), 0.0)

    def token(carry, x):
        A_next, v_next = carry
        reward, v, action = x
        A = reward + gamma * v_next - v + gamma * lam * A_next
        return (jnp.where(action, A, A_next), jnp.where(action, v, v_next)), A

    xs = (rewards_BT.T, values_BT.T, action_BT.T)
    _, A_TB = lax.scan(token, (jnp.zeros_like(bootstrap_B), bootstrap_B), xs, reverse=True)
    advantages_BT = jnp.where(action_BT, A_TB.T, 0.0)
    return advantages_BT, advantages_BT + values_BT


def _turn_ends(turn_ids_BT: jax.Array, action_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which tokens are the first, and which the last, action token of their turn; bool [B, T]."""
    before_BT = lax.cummax(jnp.where(action_BT, turn_ids_BT, -1), axis=1)
    nowhere = jnp.iinfo(turn_ids_BT.dtype).max
    after_BT = lax.cummin(jnp.where(action_BT, turn_ids_BT, nowhere), axis=1, reverse=True)
    edge = ((0, 0), (1, 1))
    earlier_BT = jnp.pad(before_BT, edge, constant_values=-1)[:, :-2]
    later_BT = jnp.pad(after_BT, edge, constant_values=nowhere)[:, 2:]
    return action_BT & (turn_ids_BT > earlier_BT), action_BT & (turn_ids_BT < later_BT)


def _check_like(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(array)}; values ask for {shape}")


def _check_streams(values_BT: jax.Array, action_mask: jax.Array, bootstrap_B: jax.Array) -> None:
    if values_BT.ndim != 2:
        raise ValueError(f"values has shape {values_BT.shape}; it must be [B, T]")
    _check_like("action_mask", action_mask, values_BT.shape)
    _check_like("bootstrap", bootstrap_B, values_BT.shape[:1])


def _check_shapes(values_BT, turn_ids_BT, action_mask, bootstrap_B, rewards_BN, keep_BN) -> None:
    _check_streams(values_BT, action_mask, bootstrap_B)
    _check_like("turn_ids", turn_ids_BT, values_BT.shape)
    if not jnp.issubdtype(turn_ids_BT.dtype, jnp.integer):
        raise ValueError(f"turn_ids has dtype {turn_ids_BT.dtype}; it must be an integer type")
    B = values_BT.shape[0]
    if rewards_BN.ndim != 2 or rewards_BN.shape[0] != B or rewards_BN.shape[1] == 0:
        raise ValueError(f"turn_rewards has shape {rewards_BN.shape}; it must be [{B}, N], N >= 1")
    if keep_BN.shape != rewards_BN.shape:
        raise ValueError(f"keep_turns has shape {keep_BN.shape}; it must be {rewards_BN.shape}")
