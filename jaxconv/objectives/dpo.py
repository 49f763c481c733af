"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives.

For a pair, w is the chosen and l the rejected answer. With summed log-probs, h = log π − log π_ref
of an answer and n its tokens, the loss of a pair is, by kind, with σ the logistic function and
S_ε(z) = −(1 − ε) log σ(z) − ε log σ(−z):

    sigmoid       S_ε(β (h_w − h_l))                               DPO, eq. 7; conservative with
                                                                   ε > 0 (Mitchell 2023)
    sigmoid_norm  −log σ(β (h_w/n_w − h_l/n_l))                    Tülu 3, arXiv 2411.15124
    robust        ((1 − ε) S_0(z) − ε S_0(−z)) / (1 − 2ε)          rDPO, arXiv 2403.00409
    hinge         max(0, 1 − z)                                    RSO, arXiv 2309.06657
    ipo           (h_w/n_w − h_l/n_l − 1/(2β))²                    IPO, arXiv 2310.12036, eq. 17
    exo_pair      KL((σ(z), σ(−z)) ‖ (1 − ε, ε))                   EXO, arXiv 2402.00856, eq. 16
    discopop      m e^(−z) + (1 − m) S_0(z),  m = σ(z/τ)           DiscoPOP, 2406.08414, eq. 5
    nca_pair      S_0(βh_w) + ½ S_0(−βh_w) + ½ S_0(−βh_l)          NCA, arXiv 2402.05369
    bco_pair      S_0(βh_w) + S_0(−βh_l)                           BCO, arXiv 2404.04656, unshifted
    sppo_hard     (h_w − 1/(2β))² + (h_l + 1/(2β))²                SPPO, arXiv 2405.00675, eq. 4.7
    apo_zero      1 − σ(βh_w) + σ(βh_l)                            APO, arXiv 2408.06266, eq. 7
    apo_down      σ(βh_w) + 1 − σ(β (h_w − h_l))                   APO, eq. 8
    aot           S_ε(β (sort(log π_w − log π_l)                   AOT, arXiv 2406.05882
                         − sort(log π_ref,w − log π_ref,l)))
    aot_unpaired  S_ε(β (sort(h_w) − sort(h_l)))                   AOT
    sft           −log π_w, divided by tokens instead of pairs     the likelihood term of mixtures
    cpo           S_ε(β (log π_w − log π_l))                       CPO, arXiv 2401.08417, eq. 3
    simpo         S_ε(β (log π_w/n_w − log π_l/n_l) − γ)           SimPO, arXiv 2405.14734, eq. 6
    orpo          β S_0(log odds_w − log odds_l),                  ORPO, arXiv 2403.07691, eq. 7
                  odds = p/(1 − p), p = exp(log π/n)

where z = β (h_w − h_l). The last four need no reference. The two sorted kinds match quantiles over
the pairs of one call, so they alone depend on how a batch is cut.

Kinds that see differences of h only may measure the distance to the reference by another divergence
(Wang et al. 2023, arXiv 2309.16240): with t = π/π_ref, h = log t becomes

    forward_kl    1 − 1/t
    js            log(2t / (1 + t))
    alpha         (t^(α−1) − 1) / (α − 1)

Where t is so far from 1 that these overflow, they go on along their tangent, so that the order of
two answers and the direction of the gradient stay.

For "cpo" t is the probability itself, for "simpo" its geometric mean over the tokens; "alpha" with
α = 1 − a is then AlphaPO (arXiv 2501.03884) with its parameter a.

Kinds add up: call the loss once for each and weigh the quotients.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics

KINDS = (
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "discopop",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "sft",
    "cpo",
    "simpo",
    "orpo",
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
REFERENCE_FREE = frozenset({"sft", "cpo", "simpo", "orpo"})
_SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"})
_OF_DIFFERENCES = frozenset(
    {"sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop", "cpo", "simpo"}
)


@jax.named_scope("dpo_loss")
def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array | None,
    ref_rejected: jax.Array | None,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    mask: jax.Array | None = None,
    chosen_tokens: jax.Array | None = None,
    rejected_tokens: jax.Array | None = None,
    gamma: float = 0.0,
    tau: float = 0.05,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The preference loss of a (micro-)batch, summed over its pairs.

    Args:
        policy_chosen, policy_rejected: [B] summed log-probs of the answers under the policy, nats.
        ref_chosen, ref_rejected: [B] the same under the frozen reference, computed beforehand or
            now: no gradient enters them. None where the kind needs no reference.
        beta: strength of the tie to the reference, above 0; the τ of IPO, the λ of ORPO.
        kind: one of `KINDS`.
        label_smoothing: ε, how often a label is wrong.
        mask: [B] bool or 0/1; the pairs that are there. No other entry of any array is read.
        chosen_tokens, rejected_tokens: [B] how many tokens were summed, read by the kinds that have
            an n above. None stands for 1: the log-probs are then used as they are, the means of the
            tokens for example.
        gamma: target margin of "simpo", at least 0.
        tau: temperature of "discopop", above 0.
        divergence: one of `DIVERGENCES`.
        alpha: of the divergence "alpha"; 1 is reverse KL, 0 forward KL.

    Returns:
        (sum, denominator, metrics): scalars, float32 or float64 as `policy_chosen` is, and
        unfinished metrics (`finish_metrics`). The denominator counts pairs, for "sft" chosen
        tokens. Only `sum` carries gradient, and only into the policy's log-probs.

    Raises:
        ValueError: shapes that do not fit, an unknown name, a number out of its range, or one that
            the kind does not have.
    """
    _check_numbers(kind, beta, label_smoothing, gamma, tau, divergence)
    shape = jnp.shape(policy_chosen)
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask) != 0
    needs_reference = kind not in REFERENCE_FREE
    if needs_reference and (ref_chosen is None or ref_rejected is None):
        raise ValueError(f"kind {kind!r} needs ref_chosen and ref_rejected; one of them is None")
    for name, x in (
        ("policy_rejected", policy_rejected),
        ("ref_chosen", ref_chosen),
        ("ref_rejected", ref_rejected),
        ("mask", mask),
        ("chosen_tokens", chosen_tokens),
        ("rejected_tokens", rejected_tokens),
    ):
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; policy_chosen asks for {shape}")

    # A pair that is not there gets one token of log-prob −1 everywhere: no kind is infinite there.
    def kept(x_B):
        return masked.select(x_B, mask, -1.0)

    def tokens(n_B):
        n_B = jnp.ones(shape, jnp.float32) if n_B is None else n_B
        return jnp.maximum(masked.select(n_B, mask, 1.0), 1.0)

    policy_w, policy_l = kept(policy_chosen), kept(policy_rejected)
    n_w, n_l = stop_gradient((tokens(chosen_tokens), tokens(rejected_tokens)))
    if needs_reference:
        ref_w, ref_l = stop_gradient((kept(ref_chosen), kept(ref_rejected)))
    elif kind in ("simpo", "orpo"):
        policy_w, policy_l = policy_w / n_w, policy_l / n_l
    h_w, h_l = (policy_w - ref_w, policy_l - ref_l) if needs_reference else (policy_w, policy_l)

    f_w, f_l = (_slope(divergence, h, alpha) for h in (h_w, h_l))
    if kind in ("sigmoid_norm", "ipo"):
        f_w, f_l = f_w / n_w, f_l / n_l
    z = beta * (f_w - f_l)
    counted = mask
    match kind:
        case "sigmoid" | "sigmoid_norm" | "cpo":
            losses = _smoothed(z, label_smoothing)
        case "simpo":
            losses = _smoothed(z - gamma, label_smoothing)
        case "robust":
            right, wrong = _nll(z) * (1.0 - label_smoothing), _nll(-z) * label_smoothing
            losses = (right - wrong) / (1.0 - 2.0 * label_smoothing)
        case "hinge":
            losses = jax.nn.relu(1.0 - z)
        case "ipo":
            losses = jnp.square(f_w - f_l - 1.0 / (2.0 * beta))
        case "exo_pair":
            right = jax.nn.sigmoid(z) * (-_nll(z) - math.log1p(-label_smoothing))
            wrong = jax.nn.sigmoid(-z) * (-_nll(-z) - math.log(label_smoothing))
            losses = right + wrong
        case "discopop":
            # In one exponent: m alone is 0 where e^(−z) alone is infinite.
            modulated = _far(jnp.exp, jax.nn.log_sigmoid(z / tau) - z)
            losses = jax.nn.sigmoid(-z / tau) * _nll(z) + modulated
        case "nca_pair":
            losses = _nll(beta * h_w) + 0.5 * _nll(-beta * h_w) + 0.5 * _nll(-beta * h_l)
        case "bco_pair":
            losses = _nll(beta * h_w) + _nll(-beta * h_l)
        case "sppo_hard":
            losses = jnp.square(h_w - 0.5 / beta) + jnp.square(h_l + 0.5 / beta)
        case "apo_zero":
            losses = jax.nn.sigmoid(-beta * h_w) + jax.nn.sigmoid(beta * h_l)
        case "apo_down":
            losses = jax.nn.sigmoid(beta * h_w) + jax.nn.sigmoid(-beta * (h_w - h_l))
        case "aot":
            quantiles = _sorted(policy_w - policy_l, mask) - _sorted(ref_w - ref_l, mask)
            losses, counted = _smoothed(beta * quantiles, label_smoothing), _first(mask)
        case "aot_unpaired":
            quantiles = _sorted(h_w, mask) - _sorted(h_l, mask)
            losses, counted = _smoothed(beta * quantiles, label_smoothing), _first(mask)
        case "sft":
            losses = -policy_w
        case "orpo":
            log_odds = (h_w - jax.nn.log1mexp(-h_w)) - (h_l - jax.nn.log1mexp(-h_l))
            losses = beta * _nll(log_odds)

    total = masked.masked_sum(losses, counted)
    pairs = masked.count(mask)
    denominator = masked.masked_sum(n_w, mask) if kind == "sft" else pairs
    reward_w, reward_l = beta * h_w, beta * h_l
    sums = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margin": reward_w - reward_l,
        "rewards/accuracy": 0.5 * (1.0 + jnp.sign(reward_w - reward_l)),
        "logps/chosen": kept(policy_chosen),
        "logps/rejected": kept(policy_rejected),
    }
    metrics = Metrics(
        {name: masked.masked_sum(x, mask) for name, x in sums.items()}
        | {"loss": total, "pairs": pairs},
        {"rewards/abs_max": masked.masked_max(jnp.maximum(abs(reward_w), abs(reward_l)), mask)},
    )
    return total, denominator.astype(total.dtype), stop_gradient(metrics)


def finish_metrics(metrics: Metrics, denominator: jax.Array) -> dict[str, jax.Array]:
    """Scalars to log, from merged metrics and the merged denominator.

    `loss` is over the denominator; all others are means over the pairs but for the maximum,
    `rewards/abs_max`. A reward is β h of an answer, nats; accuracy counts a tie half; log-probs are
    those given, nats. `pairs` is a count.
    """
    pairs = metrics.sums["pairs"]
    loss = metrics.sums["loss"] / jnp.maximum(denominator, 1.0)
    return metrics.means(pairs) | {"loss": loss, "pairs": pairs}


def _nll(z: jax.Array) -> jax.Array:
    """−log σ(z)."""
    return -jax.nn.log_sigmoid(z)


def _smoothed(z: jax.Array, epsilon: float) -> jax.Array:
    """S_ε(z)."""
    return (1.0 - epsilon) * _nll(z) + epsilon * _nll(-z)


def _slope(divergence: str, log_ratio: jax.Array, alpha: float) -> jax.Array:
    """f'(e^log_ratio), up to a constant, of the divergence."""
    match divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return -_far(jnp.expm1, -log_ratio)
        case "js":
            return math.log(2.0) + jax.nn.log_sigmoid(log_ratio)
        case "alpha":
            power = alpha - 1.0
            if abs(power) < 1e-6:
                return log_ratio
            return _far(jnp.expm1, power * log_ratio) / power


def _far(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f(x) of an f that grows as e^x; its tangent from where e^x is the cube root of the largest
    number, so that differences and their squares are finite."""
    end = math.log(jnp.finfo(x.dtype).max) / 3.0
    beyond = x > end
    near = f(jnp.where(beyond, end, x))
    return jnp.where(beyond, near + math.exp(end) * (x - end), near)


def _sorted(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The selected entries in ascending order, flat, then zeros."""
    return masked.select(jnp.sort(jnp.where(mask, x, jnp.inf), axis=None), _first(mask))


def _first(mask: jax.Array) -> jax.Array:
    """As many entries as `mask` selects, but the first ones, flat."""
    return jnp.arange(mask.size) < jnp.sum(mask)


def _check_numbers(
    kind: str,
    beta: float,
    label_smoothing: float,
    gamma: float,
    tau: float,
    divergence: str,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it may be one of {', '.join(KINDS)}")
    if not beta > 0.0:
        raise ValueError(f"beta is {beta}; it must be above 0")
    if label_smoothing != 0.0 and kind not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing is {label_smoothing} but kind {kind!r} has none; "
            f"it may be set for {', '.join(sorted(_SMOOTHED))}"
        )
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    if kind == "exo_pair" and label_smoothing == 0.0:
        raise ValueError("label_smoothing is 0 but kind 'exo_pair' needs it above 0, 0.001 say")
    if gamma != 0.0 and kind != "simpo":
        raise ValueError(f"gamma is {gamma} but kind {kind!r} has none; only 'simpo' does")
    if not gamma >= 0.0:
        raise ValueError(f"gamma is {gamma}; it must be at least 0")
    if not tau > 0.0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it may be one of {', '.join(DIVERGENCES)}")
    if divergence != "reverse_kl" and kind not in _OF_DIFFERENCES:
        raise ValueError(
            f"divergence is {divergence!r} but kind {kind!r} has only 'reverse_kl'; "
            f"others are for {', '.join(sorted(_OF_DIFFERENCES))}"
        )
