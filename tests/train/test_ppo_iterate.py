"""One PPO iteration: what it does not depend on, and what the critic's warm-up leaves alone."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxconv.data.trajectories import Trajectories
from jaxconv.objectives.ppo import PPOCoefficients
from jaxconv.train.mesh import replicate
from jaxconv.train.ppo import PPO, Credit, Minibatching
from jaxconv.train.state import TrainState

SGD = optax.sgd(0.5)
WHOLE = Minibatching(epochs=1, minibatches=1, rows=4, width=32, capacity=4)
COEFFICIENTS = PPOCoefficients(entropy_coef=0.01)


def make_ppo(optimizer, *, sizes=WHOLE, credit=None, coefficients=COEFFICIENTS) -> PPO:
    return PPO(
        optimizer,
        coefficients=coefficients,
        credit=credit or Credit(),
        minibatching=sizes,
        temperature=1.0,
        value_gradient=0.1,
        teams=2,
    )


@pytest.fixture(scope="module")
def ppo() -> PPO:
    return make_ppo(SGD)


@pytest.fixture(scope="module")
def trajectories(small_actor_critic, judge) -> Trajectories:
    """Ten streams of two turns or three, judged by the model one stream at a time."""
    model = small_actor_critic()
    rng = np.random.default_rng(0)
    b, t, n = 12, 32, 3
    tokens = [rng.integers(0, 40, rng.integers(12, 30)).tolist() for _ in range(10)]
    out = Trajectories(
        tokens=tokens,
        turn_ids=np.full((b, t), -1, np.int32),
        logprob=np.zeros((b, t), np.float32),
        value=np.zeros((b, t), np.float32),
        turn_rewards=np.zeros((b, n), np.float32),
        keep_turns=np.ones((b, n), bool),
        team=(np.arange(b) % 2).astype(np.int32),
        truncated=np.arange(b) == 3,
    )
    logits, values = judge(model, tokens, t)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for i, ids in enumerate(tokens):
        logprob, value = logprobs[i], values[i]
        turns = 2 + i % 2
        for turn in range(turns):
            for at in range(3 + 4 * turn, min(6 + 4 * turn, len(ids))):
                out.turn_ids[i, at] = turn
                out.logprob[i, at] = logprob[at - 1, ids[at]]
                out.value[i, at] = value[at - 1]
        out.turn_rewards[i, :turns] = rng.normal(size=turns)
    return out


@pytest.fixture
def iterate(small_actor_critic, trajectories):
    def run(ppo: PPO, optimizer=SGD, *, learn_policy=True, reference=None, seed=(0, 1), data=None):
        state = TrainState.create(replicate(small_actor_critic(), ppo.mesh), optimizer)
        state, metrics, finite = ppo.iterate(
            state,
            data or trajectories,
            reference=reference,
            learn_policy=learn_policy,
            seed=seed,
        )
        assert finite.all() and len(finite) == len(ppo.tensor_names)
        return state, metrics

    return run


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_the_split_into_micro_batches_changes_nothing(iterate, ppo):
    expected, metrics = iterate(ppo)
    state, others = iterate(make_ppo(SGD, sizes=dataclasses.replace(WHOLE, width=48, rows=2)))
    assert_close(state.model, expected.model, 2e-6)
    assert metrics.keys() == others.keys()
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=2e-3, atol=1e-5, err_msg=name)


def test_the_policy_moves(iterate, ppo, small_actor_critic):
    state, _ = iterate(ppo)
    moved = [
        float(abs(a - b).max())
        for a, b in zip(
            jax.tree.leaves(state.model), jax.tree.leaves(small_actor_critic()), strict=True
        )
    ]
    assert min(moved) > 0


def test_the_critic_warms_up_alone(iterate, small_actor_critic):
    """Bit for bit the same decoder, with Adam and over several updates; the head moves."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    sizes = dataclasses.replace(WHOLE, epochs=2, minibatches=2)
    state, _ = iterate(make_ppo(optimizer, sizes=sizes), optimizer, learn_policy=False)
    before = small_actor_critic()
    jax.tree.map(np.testing.assert_array_equal, state.model.decoder, before.decoder)
    assert (state.model.value_head.kernel[...] != before.value_head.kernel[...]).any()


def test_there_is_no_drift_right_after_a_rollout(iterate, ppo):
    _, metrics = iterate(ppo)
    assert metrics["drift/abs_logp_max"] < 1e-5
    assert metrics["drift/value_abs_mean"] < 1e-5
    assert metrics["drift/weight_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/kl_old"] == pytest.approx(0, abs=1e-8)


def test_drift_is_measured_where_the_records_are_off(iterate, ppo, trajectories):
    off = np.where(trajectories.turn_ids >= 0, trajectories.logprob - 0.1, 0).astype(np.float32)
    data = dataclasses.replace(trajectories, logprob=off)
    _, metrics = iterate(ppo, data=data)
    assert metrics["drift/abs_logp_mean"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["drift/weight_mean"] == pytest.approx(np.exp(0.1), abs=1e-3)


def test_what_the_agent_read_earns_nothing(iterate, ppo, trajectories):
    """Records on tokens that are no action are not read."""
    expected, _ = iterate(ppo)
    noise = np.random.default_rng(1).normal(size=trajectories.value.shape).astype(np.float32)
    action = trajectories.turn_ids >= 0
    data = dataclasses.replace(
        trajectories,
        value=np.where(action, trajectories.value, noise),
        logprob=np.where(action, trajectories.logprob, noise),
    )
    state, _ = iterate(ppo, data=data)
    assert_close(state.model, expected.model, 1e-7)


@pytest.mark.parametrize("kind", ["loss", "reward"])
def test_the_reference_pulls(iterate, ppo, small_actor_critic, kind):
    """No pull towards a reference that is the policy itself; a pull towards another."""
    with_kl = {
        "loss": {"coefficients": dataclasses.replace(COEFFICIENTS, kl_coef=0.5)},
        "reward": {"credit": Credit(reward_kl=0.5)},
    }[kind]
    plain, _ = iterate(ppo)
    pulling = make_ppo(SGD, **with_kl)

    def pulled(reference):
        state, _ = iterate(pulling, reference=replicate(reference, ppo.mesh))
        pairs = zip(jax.tree.leaves(state.model), jax.tree.leaves(plain.model), strict=True)
        return max(float(abs(a - b).max()) for a, b in pairs)

    assert pulled(small_actor_critic(0)) < 1e-5
    assert pulled(small_actor_critic(1)) > 1e-3


def test_the_order_depends_on_the_seed_alone(iterate):
    ppo = make_ppo(SGD, sizes=dataclasses.replace(WHOLE, minibatches=2))
    first, again, other = (iterate(ppo, seed=seed)[0] for seed in ((3, 1), (3, 1), (3, 2)))
    jax.tree.map(np.testing.assert_array_equal, first.model, again.model)
    embeds = (first.model.decoder.embed[...], other.model.decoder.embed[...])
    assert (embeds[0] != embeds[1]).any()


def test_a_truncated_stream_is_bootstrapped_and_a_finished_one_is_not(
    iterate, trajectories, small_actor_critic, judge
):
    """With no rewards and λ = 1 the target of a turn's tokens is what follows the stream's end."""
    ppo = make_ppo(SGD, credit=Credit(lam_turn=1.0))
    nothing = dataclasses.replace(
        trajectories, turn_rewards=np.zeros_like(trajectories.turn_rewards)
    )
    model = small_actor_critic()
    final = judge(model, nothing.tokens, 32)[1][3, len(nothing.tokens[3]) - 1]
    for truncated, expected in ((nothing.truncated, final), (np.zeros(12, bool), 0.0)):
        data = dataclasses.replace(nothing, truncated=truncated)
        _, metrics = iterate(ppo, data=data)
        actions = data.turn_ids >= 0
        mean = expected * actions[3].sum() / actions.sum()
        assert metrics["critic/target_mean"] == pytest.approx(float(mean), abs=1e-5)
