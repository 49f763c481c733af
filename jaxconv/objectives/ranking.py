"""Learning to rank lists of documents: pairwise and listwise losses over scores.

With scores s and relevances y of one list:

    logistic   Σ_{y_i > y_j} w_ij log(1 + e^(s_j − s_i))            RankNet (Burges et al. 2005)
    hinge      Σ_{y_i > y_j} w_ij max(0, 1 − (s_i − s_j))           Ranking SVM (Joachims 2002)
    ListNet    −Σ_i softmax(y/T)_i log softmax(s)_i                 Cao et al. 2007, top-one form
    ListMLE    −log Π_k e^(s_π(k)) / Σ_{l ≥ k} e^(s_π(l))           Xia et al. 2008

where π sorts the list by relevance, so that ListMLE is the likelihood of that order under Plackett
(1975) and Luce. w_ij = |ΔNDCG_ij| of `ndcg_deltas` makes the first one LambdaRank (Burges 2010).

All of them see differences of scores only: scores of two lists are not comparable.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics

PAIRWISE_KINDS = ("logistic", "hinge")


@jax.named_scope("pairwise_loss")
def pairwise_loss(
    scores: jax.Array,
    relevance: jax.Array,
    mask: jax.Array | None = None,
    *,
    kind: str = "logistic",
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The loss of a (micro-)batch of lists, summed over the pairs that differ in relevance.

    Args:
        scores: [B, N] float.
        relevance: [B, N] any number type, larger is better.
        mask: [B, N] bool or 0/1; the documents that are there. No other entry is read.
        kind: one of `PAIRWISE_KINDS`.
        weights: [B, N, N] weight of the pair (better, worse), constant to the gradient; None
            stands for 1.

    Returns:
        (sum, denominator, metrics): scalars, float32 or float64 as `scores` is, and unfinished
        metrics: `loss` and `accuracy`, of the pairs in the right order, a tie counting half. The
        denominator counts pairs. Only `sum` carries gradient, and only into `scores`.

    Raises:
        ValueError: shapes that do not fit, or an unknown kind.
    """
    if kind not in PAIRWISE_KINDS:
        raise ValueError(f"kind is {kind!r}; it may be 'logistic' or 'hinge'")
    scores_BN, relevance_BN, mask_BN = _lists(scores, relevance, mask)
    ahead_BNN = scores_BN[:, :, None] - scores_BN[:, None, :]
    counted_BNN = relevance_BN[:, :, None] > relevance_BN[:, None, :]
    counted_BNN &= mask_BN[:, :, None] & mask_BN[:, None, :]
    if kind == "logistic":
        losses_BNN = -jax.nn.log_sigmoid(ahead_BNN)
    else:
        losses_BNN = jax.nn.relu(1.0 - ahead_BNN)
    if weights is not None:
        if jnp.shape(weights) != ahead_BNN.shape:
            raise ValueError(
                f"weights has shape {jnp.shape(weights)}; scores ask for {ahead_BNN.shape}"
            )
        losses_BNN = losses_BNN * stop_gradient(masked.select(weights, counted_BNN))
    total = masked.masked_sum(losses_BNN, counted_BNN)
    right = masked.masked_sum(0.5 * (1.0 + jnp.sign(ahead_BNN)), counted_BNN)
    metrics = stop_gradient(Metrics({"loss": total, "accuracy": right}))
    return total, masked.count(counted_BNN).astype(total.dtype), metrics


@jax.named_scope("listnet_loss")
def listnet_loss(
    scores: jax.Array,
    relevance: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """ListNet, summed over lists.

    Args:
        scores, relevance, mask: as in `pairwise_loss`.
        temperature: T of the target distribution, above 0.

    Returns:
        (sum, denominator, metrics) as in `pairwise_loss`, but the denominator counts the lists with
        at least two documents; others say nothing. Metrics: `loss`, which is at least the entropy
        of the target, and `top1`, whether the highest score is on a most relevant document (a tie
        of scores counts as the share of its documents that are).

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    scores_BN, relevance_BN, mask_BN = _lists(scores, relevance, mask)
    target_BN = jax.nn.softmax(_low(relevance_BN / temperature, mask_BN), axis=1)
    surprise_BN = -jax.nn.log_softmax(_low(scores_BN, mask_BN), axis=1)
    losses_B = masked.masked_sum(target_BN * surprise_BN, mask_BN, axis=1)
    return _over_lists(losses_B, scores_BN, relevance_BN, mask_BN)


@jax.named_scope("listmle_loss")
def listmle_loss(
    scores: jax.Array, relevance: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """ListMLE, summed over lists.

    Documents of equal relevance are expected in the order in which they are given: shuffle them
    where that order means nothing.

    Args:
        scores, relevance, mask: as in `pairwise_loss`.

    Returns:
        (sum, denominator, metrics) as in `listnet_loss`; `loss` is in nats a list.

    Raises:
        ValueError: shapes that do not fit.
    """
    scores_BN, relevance_BN, mask_BN = _lists(scores, relevance, mask)
    order_BN = jnp.argsort(jnp.where(mask_BN, -relevance_BN, jnp.inf), axis=1)
    sorted_BN = jnp.take_along_axis(_low(scores_BN, mask_BN), order_BN, axis=1)
    present_BN = jnp.take_along_axis(mask_BN, order_BN, axis=1)
    left_BN = jax.lax.cumlogsumexp(sorted_BN, axis=1, reverse=True)
    losses_B = masked.masked_sum(left_BN - sorted_BN, present_BN, axis=1)
    return _over_lists(losses_B, scores_BN, relevance_BN, mask_BN)


def ndcg(scores: jax.Array, relevance: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Normalised discounted cumulative gain of each list (Järvelin and Kekäläinen 2002), [B].

    Gain 2^y − 1, so relevance is at least 0; discount 1/log2(1 + rank) down the whole list. Equal
    scores rank in the order in which they are given. A list without gain has 1: no order of it is
    wrong.

    Raises:
        ValueError: shapes that do not fit.
    """
    scores_BN, relevance_BN, mask_BN = _lists(scores, relevance, mask)
    gain_BN = masked.select(jnp.exp2(relevance_BN) - 1.0, mask_BN)
    got_B = jnp.sum(gain_BN * _discount(scores_BN, mask_BN), axis=1)
    ideal_B = jnp.sum(gain_BN * _discount(relevance_BN, mask_BN), axis=1)
    return jnp.where(ideal_B > 0, got_B / jnp.where(ideal_B > 0, ideal_B, 1.0), 1.0)


def ndcg_deltas(
    scores: jax.Array, relevance: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """How far NDCG moves when documents i and j swap ranks, at least 0, [B, N, N], no gradient.

    Arguments and errors as in `ndcg`; 0 where either document is not there.
    """
    scores_BN, relevance_BN, mask_BN = _lists(scores, relevance, mask)
    gain_BN = masked.select(jnp.exp2(relevance_BN) - 1.0, mask_BN)
    discount_BN = _discount(scores_BN, mask_BN)
    ideal_B = jnp.sum(gain_BN * _discount(relevance_BN, mask_BN), axis=1)
    by_gain_BNN = gain_BN[:, :, None] - gain_BN[:, None, :]
    by_rank_BNN = discount_BN[:, :, None] - discount_BN[:, None, :]
    both_BNN = mask_BN[:, :, None] & mask_BN[:, None, :]
    deltas_BNN = jnp.abs(by_gain_BNN * by_rank_BNN)
    deltas_BNN = deltas_BNN / jnp.where(ideal_B > 0, ideal_B, 1.0)[:, None, None]
    return stop_gradient(masked.select(deltas_BNN, both_BNN))


def _lists(scores, relevance, mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores and relevances that are 0 off the mask, and the mask as bool."""
    shape = jnp.shape(scores)
    if len(shape) != 2:
        raise ValueError(f"scores has shape {shape}; it must be [B, N]")
    for name, x in (("relevance", relevance), ("mask", mask)):
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; scores ask for {shape}")
    mask_BN = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask) != 0
    return masked.select(scores, mask_BN), stop_gradient(masked.select(relevance, mask_BN)), mask_BN


def _low(x_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """`x` with entries off the mask so low that they get no probability.

    −inf would do in values, but its differences are NaN in gradients.
    """
    return jnp.where(mask_BN, x_BN, 0.5 * jnp.finfo(x_BN.dtype).min)


def _discount(x_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """1/log2(1 + rank) of each document in descending order of x; those not there come last."""
    order_BN = jnp.argsort(jnp.where(mask_BN, -x_BN, jnp.inf), axis=1)
    rank_BN = 1.0 + jnp.argsort(order_BN, axis=1).astype(x_BN.dtype)
    return 1.0 / jnp.log2(1.0 + rank_BN)


def _over_lists(losses_B, scores_BN, relevance_BN, mask_BN):
    """(sum, denominator, metrics) over the lists that have an order."""
    ordered_B = masked.count(mask_BN, axis=1) >= 2
    total = masked.masked_sum(losses_B, ordered_B)

    def largest(x_BN):
        return mask_BN & (
            x_BN == jnp.max(x_BN, axis=1, keepdims=True, where=mask_BN, initial=-jnp.inf)
        )

    top_BN = largest(scores_BN)
    hits_B = masked.masked_mean(largest(relevance_BN), top_BN, axis=1)
    metrics = Metrics({"loss": total, "top1": masked.masked_sum(hits_B, ordered_B)})
    return total, masked.count(ordered_B).astype(total.dtype), stop_gradient(metrics)
