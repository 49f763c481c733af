"""Log-probs, entropies and values of packed tokens against plain softmax over full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.data.packing import first_fit, microbatches, pack_tokens
from jaxconv.train.actor_critic import evaluate_tokens, score
from jaxconv.train.mesh import data_mesh


@pytest.fixture(scope="module")
def model(small_actor_critic):
    return small_actor_critic()


@pytest.fixture(scope="module")
def streams():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 40, n) for n in (5, 12, 7, 9, 3, 11)]


def packed(streams, width=16, multiple=1):
    packing = first_fit([len(s) for s in streams], width, rows_multiple=multiple)
    return packing, pack_tokens(packing, streams, [np.ones(len(s), bool) for s in streams])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_each_token_is_judged_given_its_own_stream(model, streams, judge, temperature):
    packing, batch = packed(streams)
    evaluate = jax.jit(evaluate_tokens, static_argnames="temperature")
    out = evaluate(model, batch, temperature=temperature)
    assert {str(x.dtype) for x in out} == {"float32"}
    gathered = zip(*(packing.gather(x) for x in out), strict=True)
    logits, values = judge(model, streams, 12)
    distributions = np.asarray(jax.nn.log_softmax(logits / temperature))
    for stream, (p, h, v), all_p, value in zip(
        streams, gathered, distributions, values, strict=True
    ):
        n = len(stream)
        np.testing.assert_allclose(p[:-1], all_p[np.arange(n - 1), stream[1:]], atol=1e-5)
        exact = -(np.exp(all_p) * all_p).sum(-1)
        np.testing.assert_allclose(h[:-1], exact[: n - 1], atol=1e-5)
        np.testing.assert_allclose(v, value[:n], atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_the_critic_s_gradient_into_the_trunk_is_scaled(model, streams, factor):
    batch = jax.tree.map(jnp.asarray, packed(streams)[1])

    @jax.jit
    def gradient(factor):
        def loss(model):
            return (evaluate_tokens(model, batch, value_gradient=factor)[2] ** 2).mean()

        return jax.grad(loss)(model)

    whole, part = gradient(1.0), gradient(factor)
    for a, b in zip(jax.tree.leaves(part.decoder), jax.tree.leaves(whole.decoder), strict=True):
        np.testing.assert_allclose(a, factor * b, atol=1e-6)
    # The head learns at full strength, and the values do not change.
    for a, b in zip(
        jax.tree.leaves(part.value_head), jax.tree.leaves(whole.value_head), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_score_is_evaluate_tokens_over_the_first_micro_batches(model, streams):
    _, batch = packed(streams, multiple=8)
    batches = microbatches(jax.tree.map(jnp.asarray, batch), 2)
    logprobs, values = score(model, batches, np.int32(1), temperature=0.7, mesh=data_mesh(2))
    first = jax.tree.map(lambda x: x[0], batches)
    p, _, v = jax.jit(lambda m, b: evaluate_tokens(m, b, temperature=0.7))(model, first)
    np.testing.assert_allclose(logprobs[0], p, atol=1e-5)
    np.testing.assert_allclose(values[0], v, atol=1e-5)
    assert not logprobs[1:].any() and not values[1:].any()
