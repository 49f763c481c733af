"""A profile of a rollout names its operations as the code does, and what the host did."""

import gzip
import json
import re

import jax
import jax.numpy as jnp

from jaxconv.models.decode import prefill
from jaxconv.rollout.burst import SlotState, decode_burst
from jaxconv.rollout.engine import Engine, EngineShape
from jaxconv.rollout.selfplay import Game, SelfPlay
from jaxconv.rollout.world import set_weights

DECODER = {"embed", "attention", "mlp", "norm"}


def scopes(lowered) -> set[str]:
    """Every name in what the operations of the compiled program are called."""
    names = re.findall(r'op_name="([^"]*)"', lowered.compile().as_text())
    return {word for name in names for word in re.findall(r"\w+", name)}


def test_a_burst_has_the_scopes_of_decoder_and_sampler(config, weights):
    state = SlotState.silent(config, 4, 32)
    stop_ids, leave = jnp.zeros(1, jnp.int32), jnp.float32(0.5)
    lowered = decode_burst.lower(
        weights, state, jnp.ones(4), stop_ids, leave, config=config, burst=4
    )
    expected = DECODER | {"decode_step", "decode_attention", "head", "sample"}
    assert scopes(lowered) >= expected


def test_a_prefill_has_the_scopes_of_the_decoder(config, weights):
    cache = SlotState.silent(config, 4, 32).cache
    tokens, rows = jnp.zeros((2, 8), jnp.int32), jnp.zeros(2, jnp.int32)
    lowered = jax.jit(prefill, static_argnames="config").lower(
        weights, config, cache, tokens, rows, rows, rows
    )
    assert scopes(lowered) >= DECODER | {"prefill"}


def test_a_trace_shows_when_the_host_handed_over_weights_and_stepped_games(
    config, model, template, talk, make_counter, tmp_path
):
    shape = EngineShape(
        slots=4, lengths=(160,), burst=4, leave=0.5, prefill_rows=(4,), prefill_tokens=(8, 32)
    )
    engine = Engine(config, shape, stop_ids=[template.end], key=jax.random.key(3))
    set_weights([engine], model)
    table = SelfPlay(
        lambda: talk(2, 2),
        make_counter,
        template,
        {"model": [engine]},
        turn_budget=6,
        concurrent=2,
    )
    games = [Game(0, 0, ("model",))]
    table.play(games)  # compiles
    with jax.profiler.trace(str(tmp_path)):
        set_weights([engine], model)
        table.play(games)
    [path] = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {"sync", "rollout", "env_step"} <= {event.get("name") for event in events}
