"""Imitation: which tokens are learned, what the critic learns, and in which order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.train.mesh import data_mesh
from jaxconv.train.state import TrainState
from jaxconv.train.update import make_update
from jaxconv.train.warm_start import (
    Example,
    evaluate,
    pack_examples,
    warm_start_loss,
)


def examples(n=12, seed=0) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        size = int(rng.integers(2, 14))
        own = rng.random(size) < 0.5
        own[-1] = True
        out.append(Example(rng.integers(0, 40, size).tolist(), own.tolist(), float(rng.random())))
    return out


def by_hand(judge, model, some):
    """(nll, squared error, tokens) summed over the own tokens of each example alone."""
    nll = error = tokens = 0.0
    logits, values = judge(model, [e.tokens for e in some], 14)
    for e, logprob, value in zip(some, np.asarray(jax.nn.log_softmax(logits)), values, strict=True):
        for i in range(1, len(e.tokens)):
            if e.own[i]:
                nll -= float(logprob[i - 1, e.tokens[i]])
                error += 0.5 * float(value[i - 1] - e.outcome) ** 2
                tokens += 1
    return nll, error, tokens


def test_the_loss_is_that_of_the_own_tokens(small_actor_critic, judge):
    model, some = small_actor_critic(), examples()
    nll, error, tokens = by_hand(judge, model, some)
    batch, used = pack_examples(some, width=16, rows=2, multiple=4)
    assert batch.tokens.tokens.shape == (len(batch.outcome), 2, 16)
    assert used <= len(batch.outcome) and not batch.tokens.mask[used:].any()
    means = evaluate(model, batch, mesh=data_mesh(2))
    np.testing.assert_allclose(means["nll"], nll / tokens, rtol=1e-5)
    np.testing.assert_allclose(means["critic_loss"], error / tokens, rtol=1e-4)


def test_packing_does_not_change_the_loss(small_actor_critic):
    model, some = small_actor_critic(), examples()
    losses = [
        evaluate(
            model,
            pack_examples(some, width=width, rows=rows, multiple=1)[0],
            mesh=data_mesh(rows),
        )["nll"]
        for width, rows in ((16, 2), (32, 1), (16, 5))
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def loss_with(value_gradient: float):
    return functools.partial(warm_start_loss, value_gradient=value_gradient)


@pytest.mark.parametrize("value_gradient", [0.0, 0.5])
def test_the_critic_leaves_the_trunk_alone_unless_asked(small_actor_critic, value_gradient):
    """Without a value gradient outcomes do not enter the decoder's; with one they do."""
    model, some = small_actor_critic(), examples()
    # A fresh head is zero and passes nothing on.
    model.value_head.kernel[...] = jnp.ones_like(model.value_head.kernel[...])
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[0]), pack_examples(some, width=48, rows=8, multiple=1)[0]
    )
    other = type(batch)(batch.tokens, batch.outcome + 100.0)
    gradient = jax.jit(jax.grad(lambda m, b: loss_with(value_gradient)(m, b)[0]))
    first, second = gradient(model, batch), gradient(model, other)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first.decoder, second.decoder)
    assert all(jax.tree.leaves(same)) == (value_gradient == 0)
    assert (first.value_head.kernel[...] != second.value_head.kernel[...]).any()


def test_training_learns_the_words_and_the_outcomes(small_actor_critic):
    some = examples(4)
    optimizer, mesh = optax.adam(1e-2), data_mesh(2)
    update = make_update(loss_with(1.0), optimizer, mesh)
    state = TrainState.create(small_actor_critic(), optimizer)
    batch, used = pack_examples(some, width=32, rows=2, multiple=1)
    before = evaluate(state.model, batch, mesh=mesh)
    for _ in range(60):
        state, _ = update(state, batch, np.int32(used))
    after = evaluate(state.model, batch, mesh=mesh)
    assert after["nll"] < 0.3 * before["nll"]
    assert after["critic_loss"] < 0.3 * before["critic_loss"]
