"""What embeddings of texts learn from: which texts belong together, and how much.

With s(q, d) the cosine or the inner product of two embeddings:

    multiple negatives   −log e^(c s(q, d⁺)) / Σ_d e^(c s(q, d))      InfoNCE (van den Oord et al.
                         over all documents of the batch              2018, arXiv 1807.03748)
    cosine               (cos(a, b) − y)²
    margin MSE           (s(q, d⁺) − s(q, d⁻) − m)²                   Hofstätter et al. 2020,
                                                                      arXiv 2010.02666
    listwise KL          T² KL(softmax(y / T') ‖ softmax(s / T))      Hinton et al. 2015,
                                                                      arXiv 1503.02531
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxconv.models.pooling import unit
from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics

SIMILARITIES = ("cosine", "dot")


def multiple_negatives_loss(
    queries: jax.Array,
    documents: jax.Array,
    mask: jax.Array | None = None,
    *,
    document_mask: jax.Array | None = None,
    scale: float = 20.0,
    similarity: str = "cosine",
    symmetric: bool = False,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Each query against the documents of all queries, summed over queries.

    Args:
        queries: [B, D] float.
        documents: [B, N, D]; the first of each query belongs to it, the others are its hard
            negatives.
        mask: [B] bool or 0/1; the queries that are there, with their documents.
        document_mask: [B, N] bool or 0/1; the documents that are there, the first of each among
            them. No other entry is read.
        scale: c, above 0.
        similarity: "cosine", or "dot", which scale 1 suits.
        symmetric: also each first document against all queries; the mean of both is the loss.
        axis_name: of `shard_map` or `pmap`, over devices that have a part of the batch each: its
            queries meet the documents of all of them.

    Returns:
        (sum, denominator, metrics): scalars, float32 or float64 as `queries` is, and unfinished
        metrics: `loss` in nats and `accuracy`, whether the own document has the highest score (a
        tie counts as wrong). The denominator counts the queries of this device. Only `sum` carries
        gradient, into the embeddings of all devices: add the gradients up.

    Raises:
        ValueError: shapes that do not fit, an unknown similarity, or a scale that is not above 0.
    """
    if not scale > 0.0:
        raise ValueError(f"scale is {scale}; it must be above 0")
    queries_BD, documents_BND, mask_B = _embeddings(queries, documents, mask, similarity)
    there_BN = jnp.broadcast_to(mask_B[:, None], documents_BND.shape[:2])
    if document_mask is not None:
        if jnp.shape(document_mask) != there_BN.shape:
            raise ValueError(
                f"document_mask has shape {jnp.shape(document_mask)}; "
                f"documents ask for {there_BN.shape}"
            )
        there_BN &= jnp.asarray(document_mask) != 0
        documents_BND = masked.select(documents_BND, there_BN[..., None])

    def everywhere(x):
        return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)

    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(queries_BD)
    own_B = first + jnp.arange(len(queries_BD))
    # Candidates lie document by document: the first ones of all queries come first.
    found_NCD, there_NC = (jnp.swapaxes(everywhere(x), 0, 1) for x in (documents_BND, there_BN))
    found_MD, there_M = found_NCD.reshape(-1, queries_BD.shape[-1]), there_NC.reshape(-1)
    scores_BM = scale * queries_BD @ found_MD.T
    right_B = jnp.take_along_axis(scores_BM, own_B[:, None], axis=1)[:, 0]
    losses_B = _log_total(scores_BM, there_M) - right_B
    if symmetric:
        back_BC = scale * documents_BND[:, 0] @ everywhere(queries_BD).T
        losses_B = 0.5 * (losses_B + _log_total(back_BC, everywhere(mask_B)) - right_B)
    others_BM = there_M & (jnp.arange(len(there_M)) != own_B[:, None])
    best_B = jnp.max(scores_BM, axis=1, where=others_BM, initial=-jnp.inf)
    return _summed(losses_B, mask_B, {"accuracy": right_B > best_B})


def cosine_loss(
    left: jax.Array, right: jax.Array, targets: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Squared distance of the cosine of two embeddings from a target, summed over pairs.

    Args:
        left, right: [B, D] float.
        targets: [B], −1 to 1.
        mask: [B] bool or 0/1; the pairs that are there. No other entry is read.

    Returns:
        (sum, denominator, metrics) as in `multiple_negatives_loss`; the denominator counts pairs.
        Metrics: `loss` and `cosine`.

    Raises:
        ValueError: shapes that do not fit.
    """
    _expect("targets", targets, jnp.shape(left)[:1])
    left_BD, right_B1D, mask_B = _embeddings(left, jnp.asarray(right)[:, None], mask, "cosine")
    cosine_B = jnp.sum(left_BD * right_B1D[:, 0], axis=-1)
    losses_B = jnp.square(cosine_B - stop_gradient(masked.select(targets, mask_B)))
    return _summed(losses_B, mask_B, {"cosine": cosine_B})


def margin_mse_loss(
    queries: jax.Array,
    documents: jax.Array,
    margins: jax.Array,
    mask: jax.Array | None = None,
    *,
    similarity: str = "dot",
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Squared distance of margins between documents from those of a teacher, summed over margins.

    Args:
        queries: [B, D] float.
        documents: [B, 1 + N, D]; the margins are those of the first over each of the others.
        margins: [B, N] of the teacher.
        mask: [B] bool or 0/1; the queries that are there. No other entry is read.
        similarity: one of `SIMILARITIES`.

    Returns:
        (sum, denominator, metrics) as in `multiple_negatives_loss`; the denominator counts
        margins. Metrics: `loss` and `agreement`, whether a margin has the teacher's sign.

    Raises:
        ValueError: shapes that do not fit, or an unknown similarity.
    """
    queries_BD, documents_BND, mask_B = _embeddings(queries, documents, mask, similarity)
    batch, count, _ = documents_BND.shape
    _expect("margins", margins, (batch, count - 1))
    scores_BN = jnp.einsum("bd,bnd->bn", queries_BD, documents_BND)
    found_BN = scores_BN[:, :1] - scores_BN[:, 1:]
    mask_BN = jnp.broadcast_to(mask_B[:, None], found_BN.shape)
    wanted_BN = stop_gradient(masked.select(margins, mask_BN))
    agreement_BN = jnp.sign(found_BN) == jnp.sign(wanted_BN)
    return _summed(jnp.square(found_BN - wanted_BN), mask_BN, {"agreement": agreement_BN})


def listwise_kl_loss(
    queries: jax.Array,
    documents: jax.Array,
    teacher: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    similarity: str = "dot",
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Divergence of the scores of a query's documents from those of a teacher, summed over queries.

    Args:
        queries: [B, D] float.
        documents: [B, N, D], at least two of each query.
        teacher: [B, N] scores.
        mask: [B] bool or 0/1; the queries that are there. No other entry is read.
        temperature: T, above 0, of the scores.
        teacher_temperature: T', above 0, of the teacher's; None stands for T.
        similarity: one of `SIMILARITIES`.

    Returns:
        (sum, denominator, metrics) as in `multiple_negatives_loss`. Metrics: `loss`, and `top1`,
        whether the highest score is on the document that the teacher's is on.

    Raises:
        ValueError: shapes that do not fit, an unknown similarity, or a temperature that is not
            above 0.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    for name, value in (
        ("temperature", temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not value > 0.0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    queries_BD, documents_BND, mask_B = _embeddings(queries, documents, mask, similarity)
    shape = documents_BND.shape[:2]
    _expect("teacher", teacher, shape)
    if shape[1] < 2:
        raise ValueError(f"documents has shape {jnp.shape(documents)}; each query needs two")
    scores_BN = jnp.einsum("bd,bnd->bn", queries_BD, documents_BND)
    wanted_BN = stop_gradient(masked.select(teacher, jnp.broadcast_to(mask_B[:, None], shape)))
    log_p_BN = jax.nn.log_softmax(wanted_BN / teacher_temperature, axis=1)
    log_q_BN = jax.nn.log_softmax(scores_BN / temperature, axis=1)
    losses_B = temperature**2 * jnp.sum(jnp.exp(log_p_BN) * (log_p_BN - log_q_BN), axis=1)
    top1_B = jnp.argmax(scores_BN, axis=1) == jnp.argmax(wanted_BN, axis=1)
    return _summed(losses_B, mask_B, {"top1": top1_B})


def _embeddings(queries, documents, mask, similarity: str):
    """Embeddings that are 0 off the mask, of unit length for cosines, and the mask as bool."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}; it may be 'cosine' or 'dot'")
    shape, wanted = jnp.shape(queries), jnp.shape(documents)
    if len(shape) != 2:
        raise ValueError(f"queries has shape {shape}; it must be [B, D]")
    if len(wanted) != 3 or wanted[0] != shape[0] or wanted[2] != shape[1] or not wanted[1]:
        raise ValueError(f"documents has shape {wanted}; queries ask for {shape[0], 'N', shape[1]}")
    mask_B = jnp.ones(shape[:1], bool) if mask is None else jnp.asarray(mask) != 0
    _expect("mask", mask_B, shape[:1])
    queries_BD = masked.select(queries, mask_B[:, None])
    documents_BND = masked.select(documents, mask_B[:, None, None])
    if similarity == "cosine":
        queries_BD, documents_BND = unit(queries_BD), unit(documents_BND)
    return queries_BD, documents_BND, mask_B


def _expect(name: str, x, shape: tuple[int, ...]) -> None:
    if jnp.shape(x) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {shape}")


def _log_total(scores_BM: jax.Array, there_M: jax.Array) -> jax.Array:
    """log Σ e^score over the candidates that are there, [B]."""
    return jax.nn.logsumexp(scores_BM, axis=1, where=there_M)


def _summed(losses, mask, measured) -> tuple[jax.Array, jax.Array, Metrics]:
    total = masked.masked_sum(losses, mask)
    sums = {name: masked.masked_sum(x, mask) for name, x in measured.items()}
    metrics = stop_gradient(Metrics({"loss": total} | sums))
    return total, masked.count(mask).astype(total.dtype), metrics
