"""Fitting heads on embeddings: logistic regression and an MLP, with calibrated probabilities.

A part of the examples is kept apart. It says when the MLP stops, and fits what turns scores into
probabilities (Platt 1999; one temperature where a text has one label, Guo et al. 2017,
arXiv 1706.04599), which scores of examples that were learned from would make too sure.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy.optimize import minimize

from jaxconv.errors import Failed, Refused
from jaxconv.models.classifier import Classifier, calibrated, calibration_error, label_matrix

METHODS = ("logistic", "mlp")
_TINY = 1e-12
_STEPS = 5000  # of the logistic regression's solver, at most


@dataclasses.dataclass(frozen=True)
class MLPSettings:
    """Attributes:
    hidden: width of the hidden layer.
    learning_rate, weight_decay: of AdamW.
    batch: examples an update.
    epochs: at most.
    patience: epochs without a better loss on what was kept apart, after which it stops.
    """

    hidden: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 64
    epochs: int = 100
    patience: int = 5


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Attributes:
    classifier: what was fitted.
    kept_apart: examples that it was not fitted on but calibrated with.
    nll: of these, nats a text (a label's sum with several labels), calibrated.
    accuracy: of these; with several labels a text, the share of right yes and no.
    calibration_error, uncalibrated_error: expected calibration error of these, after and before.
    epochs: that the MLP took; its weights are the best of them.
    """

    classifier: Classifier
    kept_apart: int
    nll: float
    accuracy: float
    calibration_error: float
    uncalibrated_error: float
    epochs: int = 0


def fit_classifier(
    embeddings: np.ndarray,
    labels: Sequence[str] | Sequence[Sequence[str]],
    *,
    method: str = "logistic",
    keep_apart: float = 0.2,
    seed: int = 0,
    inverse_penalty: float = 10.0,
    mlp: MLPSettings | None = None,
) -> Fitted:
    """Fits a head; several labels a text where `labels` holds sequences.

    Args:
        embeddings: float32 [N, D].
        labels: [N], a name each, or any number of names each.
        method: "logistic" (scikit-learn) or "mlp".
        keep_apart: share of the examples that calibrates; with one label a text, of every label.
        seed: of the split and of the MLP.
        inverse_penalty: scikit-learn's C of the logistic regression.
        mlp: sizes of the MLP.

    Raises:
        Refused: lengths that do not fit, fewer than two labels, a label with fewer than two
            examples, or an unknown method.
        Failed: the logistic regression does not converge.
    """
    if method not in METHODS:
        raise Refused(f"method is {method!r}; it may be {', '.join(METHODS)}")
    if not 0.0 < keep_apart < 1.0:
        raise Refused(f"keep_apart is {keep_apart}; it must be between 0 and 1")
    if len(embeddings) != len(labels):
        raise Refused(f"{len(labels)} labels for {len(embeddings)} embeddings")
    embeddings = np.asarray(embeddings, np.float32)
    multilabel = any(not isinstance(own, str) for own in labels)
    names = sorted({name for own in labels for name in ((own,) if isinstance(own, str) else own)})
    if len(names) < 2 - multilabel:
        raise Refused(f"labels are {', '.join(names) or 'none'}; there must be at least two")
    truth_NC = label_matrix(labels, names)
    rng = np.random.default_rng(seed)
    apart = _kept_apart(truth_NC, multilabel, keep_apart, rng, names)
    epochs = 0
    if method == "logistic":
        kernels, biases = _logistic(
            embeddings[~apart], truth_NC[~apart], multilabel, inverse_penalty
        )
    else:
        kernels, biases, epochs = _mlp(
            embeddings, truth_NC, apart, multilabel, mlp or MLPSettings(), seed
        )
    plain = np.ones(len(names), np.float32)
    head = Classifier(
        tuple(names), multilabel, kernels, biases, plain, np.zeros_like(plain), method
    )
    scores, truth = head.scores(embeddings[apart]), truth_NC[apart]
    slope, shift = (_platt if multilabel else _temperature)(scores, truth)
    head = dataclasses.replace(head, slope=slope, shift=shift)
    after = calibrated(scores, slope, shift, multilabel)
    before = calibrated(scores, plain, np.zeros_like(plain), multilabel)
    return Fitted(
        head,
        int(apart.sum()),
        nll=_nll(after, truth, multilabel),
        accuracy=float(_said(after, truth, multilabel)[1].mean()),
        calibration_error=calibration_error(*_said(after, truth, multilabel)),
        uncalibrated_error=calibration_error(*_said(before, truth, multilabel)),
        epochs=epochs,
    )


def _kept_apart(truth_NC, multilabel: bool, share: float, rng, names) -> np.ndarray:
    """bool [N]: a share of every label's examples; of all examples where they have several."""
    apart = np.zeros(len(truth_NC), bool)
    counts = truth_NC.sum(axis=0)
    for i in np.flatnonzero(counts < 2)[:1]:
        raise Refused(f"label {names[i]!r} has {counts[i]} example; each must have at least 2")
    groups = [np.arange(len(truth_NC))] if multilabel else [np.flatnonzero(c) for c in truth_NC.T]
    for group in groups:
        count = min(max(round(share * len(group)), 1), len(group) - 1)
        apart[rng.permutation(group)[:count]] = True
    return apart


def _logistic(x_ND, truth_NC, multilabel: bool, inverse_penalty: float):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def fit(target):
        model = LogisticRegression(C=inverse_penalty, max_iter=_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                return model.fit(x_ND, target)
            except ConvergenceWarning as warning:
                raise Failed(
                    f"logistic regression with inverse_penalty={inverse_penalty} is not there "
                    f"after {_STEPS} steps; a smaller one takes fewer"
                ) from warning

    count = truth_NC.shape[1]
    kernel = np.zeros((x_ND.shape[1], count), np.float32)
    bias = np.zeros(count, np.float32)
    if not multilabel:
        model = fit(truth_NC.argmax(axis=1))
        if count == 2:  # it has one score then, for the second against the first
            kernel[:, 1], bias[1] = model.coef_[0], model.intercept_[0]
        else:
            kernel[:], bias[:] = model.coef_.T, model.intercept_
        return (kernel,), (bias,)
    for i, target in enumerate(truth_NC.T):
        if target.all() or not target.any():
            bias[i] = np.log((target.sum() + 0.5) / ((~target).sum() + 0.5))
            continue
        model = fit(target)
        kernel[:, i], bias[i] = model.coef_[0], model.intercept_[0]
    return (kernel,), (bias,)


class _MLP(nnx.Module):
    def __init__(self, width: int, hidden: int, labels: int, seed: int):
        rngs = nnx.Rngs(seed)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, labels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x)))


def _mlp(embeddings, truth_NC, apart, multilabel: bool, s: MLPSettings, seed: int):
    """(kernels, biases, epochs); the weights are those with the lowest loss on what is apart."""
    model = _MLP(embeddings.shape[1], s.hidden, truth_NC.shape[1], seed)
    optimizer = optax.adamw(s.learning_rate, weight_decay=s.weight_decay)

    def loss(model, x, truth, weight):
        scores = model(x)
        if multilabel:
            losses = optax.sigmoid_binary_cross_entropy(scores, truth).sum(axis=1)
        else:
            losses = optax.softmax_cross_entropy(scores, truth)
        return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1.0)

    @jax.jit
    def epoch(model, state, x_BRD, truth_BRC, weight_BR):
        def update(carry, batch):
            model, state = carry
            updates, state = optimizer.update(jax.grad(loss)(model, *batch), state, model)
            return (optax.apply_updates(model, updates), state), None

        return jax.lax.scan(update, (model, state), (x_BRD, truth_BRC, weight_BR))[0]

    held_out = jax.jit(loss)
    x, truth = embeddings[~apart], truth_NC[~apart].astype(np.float32)
    apart_parts = embeddings[apart], truth_NC[apart].astype(np.float32), np.ones(apart.sum())
    rng = np.random.default_rng(seed)
    state = optimizer.init(model)
    batches = -(-len(x) // s.batch)
    best, lowest, best_epoch, epochs = model, np.inf, 0, 0
    while epochs < s.epochs and epochs - best_epoch < s.patience:
        order = rng.permutation(len(x))
        order = np.pad(order, (0, batches * s.batch - len(x)), constant_values=-1)
        order = order.reshape(batches, s.batch)
        model, state = epoch(model, state, x[order], truth[order], (order >= 0).astype(np.float32))
        epochs += 1
        found = float(held_out(model, *apart_parts))
        if found < lowest:
            best, lowest, best_epoch = model, found, epochs
    if not np.isfinite(lowest):
        raise Refused(f"learning_rate is {s.learning_rate}; the loss is not finite with it")
    layers = (best.up, best.down)
    kernels = tuple(np.asarray(layer.kernel[...]) for layer in layers)
    return kernels, tuple(np.asarray(layer.bias[...]) for layer in layers), epochs


# ---------------------------------------------------------------- calibration


def _temperature(scores_NC, truth_NC) -> tuple[np.ndarray, np.ndarray]:
    """One slope for all labels, by the likelihood of what was kept apart."""
    count = truth_NC.shape[1]

    def nll(log_slope):
        slope = np.full(count, np.exp(log_slope[0]))
        return _nll(calibrated(scores_NC, slope, np.zeros(count), False), truth_NC, False)

    found = minimize(nll, [0.0], method="Nelder-Mead", bounds=[(-5.0, 5.0)])
    return np.full(count, np.exp(found.x[0]), np.float32), np.zeros(count, np.float32)


def _platt(scores_NC, truth_NC) -> tuple[np.ndarray, np.ndarray]:
    """A slope and a shift for each label, with Platt's targets, which keep both finite."""
    slopes, shifts = [], []
    for scores, truth in zip(scores_NC.T, truth_NC.T, strict=True):
        yes, no = truth.sum(), (~truth).sum()
        target = np.where(truth, (yes + 1) / (yes + 2), 1 / (no + 2))

        def nll(p, scores=scores, target=target):
            z = np.exp(p[0]) * scores + p[1]
            return np.mean(np.logaddexp(0.0, z) - target * z)

        found = minimize(nll, [0.0, 0.0], method="Nelder-Mead", bounds=[(-5, 5), (-50, 50)])
        slopes.append(np.exp(found.x[0]))
        shifts.append(found.x[1])
    return np.array(slopes, np.float32), np.array(shifts, np.float32)


def _nll(probabilities, truth_NC, multilabel: bool) -> float:
    right = np.where(truth_NC, probabilities, 1.0 - probabilities)
    if not multilabel:
        right = probabilities[truth_NC]
    return float(-np.log(np.maximum(right, _TINY)).sum() / len(truth_NC))


def _said(probabilities, truth_NC, multilabel: bool) -> tuple[np.ndarray, np.ndarray]:
    """(probability of what is said, whether it is right), of every text or every label of it."""
    if multilabel:
        yes = probabilities >= 0.5
        return np.where(yes, probabilities, 1 - probabilities).ravel(), (yes == truth_NC).ravel()
    top = probabilities.argmax(axis=1)
    rows = np.arange(len(top))
    return probabilities[rows, top], truth_NC[rows, top]
