"""Costs of compiled programs against what was written, and against the decoder's formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.perf.flops import recomputed_flops, training_flops
from jaxconv.perf.hlo import program_cost

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=96,
    embed_dim=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=32,
)
ROWS, LENGTH = 2, 16
# Compiles in half the time; the HLO is the same.
FAST = {"xla_backend_optimization_level": 0}


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(compiler_options=FAST)


def gradient_cost(config: DecoderConfig):
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def loss(model, tokens):
        return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens)), axis=-1))

    return program_cost(compiled(jax.grad(loss), model, tokens))


def formula(config: DecoderConfig) -> float:
    """FLOPs of the step as its kernel runs it: so short a row is attended to without blocks, every
    query against every key, which are 2 T / (T + 1) times the pairs of causal attention."""
    causal = training_flops(config, ROWS, LENGTH) + recomputed_flops(config, ROWS, LENGTH)
    tokens = ROWS * LENGTH
    attention = config.flops_per_token((LENGTH + 1) / 2) - config.flops_per_token(0)
    times = 3 if config.remat == "none" else 4
    masked = times * tokens * attention * (2 * LENGTH / (LENGTH + 1) - 1)
    return causal + masked


@pytest.mark.parametrize(
    ("layers", "remat"),
    [
        (1, "none"),
        (2, "full"),
        (16, "none"),
        pytest.param(2, "none", marks=pytest.mark.slow),
        pytest.param(16, "full", marks=pytest.mark.slow),
        pytest.param(2, "dots", marks=pytest.mark.slow),
        pytest.param(16, "dots", marks=pytest.mark.slow),
    ],
)
def test_scanned_layers_count_each_and_so_does_what_remat_runs_again(layers, remat):
    config = dataclasses.replace(CONFIG, num_layers=layers, remat=remat)
    cost = gradient_cost(config)
    assert cost.flops == pytest.approx(formula(config), rel=1e-9)
    assert cost.assumptions == () and cost.collectives == ()


def test_nested_loops_multiply():
    def function(x):
        def outer(_, x):
            x = lax.fori_loop(0, 5, lambda _, x: x @ x, x)
            return jnp.tanh(x @ x)

        return lax.fori_loop(0, 7, outer, x)

    cost = program_cost(compiled(function, jnp.zeros((24, 24))))
    assert cost.flops == 7 * (5 + 1) * 2 * 24**3


def test_a_loop_that_the_data_ends_takes_the_callers_bound():
    def burst(x, n):
        with jax.named_scope("burst"):
            return lax.fori_loop(0, n, lambda _, x: x @ x, x)

    program = compiled(burst, jnp.zeros((24, 24)), 3)
    once = program_cost(program)
    assert once.flops == 2 * 24**3
    (line,) = once.assumptions
    assert "burst" in line and "count as one" in line
    bound = program_cost(program, trips={"burst": 32})
    assert bound.flops == 32 * 2 * 24**3
    (line,) = bound.assumptions
    assert "burst" in line and "32 iterations, as given" in line
    assert program_cost(program, trips={"prefill": 32}).flops == once.flops


def test_a_loop_that_may_end_early_takes_its_own_bound_or_the_callers():
    def burst(x):
        return lax.while_loop(
            lambda c: (c[0] < 32) & (c[1][0, 0] > 0), lambda c: (c[0] + 1, c[1] @ c[1]), (0, x)
        )[1]

    program = compiled(burst, jnp.zeros((24, 24)))
    most = program_cost(program)
    assert most.flops == 32 * 2 * 24**3
    assert "32 iterations, the most" in most.assumptions[0]
    assert program_cost(program, trips={"": 20}).flops == 20 * 2 * 24**3


def test_of_a_conditional_the_dearest_branch_counts():
    def function(x, choice):
        return lax.switch(choice, [jnp.sin, lambda x: x @ x, lambda x: x @ x @ x], x)

    cost = program_cost(compiled(function, jnp.zeros((24, 24)), 1))
    assert cost.flops == 2 * 2 * 24**3


KERNEL = """HloModule m

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %k = bf16[64,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/attend/pallas_call"}, backend_config={"custom_call_config":{CONFIG}}
}
"""


def test_a_kernel_costs_what_it_says_or_what_the_caller_says():
    estimate = '"cost_estimate":{"flops":"1000","transcendentals":"5","bytes_accessed":"77"}'
    told = program_cost(KERNEL.replace("CONFIG", estimate))
    assert (told.flops, told.bytes, told.assumptions) == (1000, 77, ())
    silent = KERNEL.replace("CONFIG", '"body":"…"')
    unknown = program_cost(silent)
    assert (unknown.flops, unknown.bytes) == (0, 2 * 64 * 128 * 2)
    assert "attend/pallas_call: its FLOPs are not known" in unknown.assumptions[0]
    given = program_cost(silent, kernels={"attend": 123.0})
    assert (given.flops, given.bytes) == (123, 2 * 64 * 128 * 2)
    assert "123 FLOPs a call, as given" in given.assumptions[0]


COLLECTIVES = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, P(("a", "b")))

def inner(_, x):
    return lax.psum(x, "b") * 0.5

def outer(_, x):
    x = lax.fori_loop(0, 3, inner, x)
    x = lax.psum_scatter(lax.all_gather(x, "a", tiled=True), "a", tiled=True)
    return lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])

def function(x):
    x = lax.fori_loop(0, 5, outer, x)
    return lax.all_to_all(lax.psum(x, ("a", "b")), "b", 0, 0, tiled=True)

x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
program = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec,
                                check_vma=False)).lower(x).compile()
print(json.dumps(program.as_text()))
"""


def test_collectives_have_the_size_group_and_count_that_were_written(run_program):
    cost = program_cost(run_program(COLLECTIVES))
    part = 8 * 16 * 4  # of a device
    found = [(c.kind, c.bytes, c.group, c.times) for c in cost.collectives]
    assert sorted(found) == sorted(
        [
            ("all-reduce", part, (0, 1, 2, 3), 5 * 3),
            ("all-gather", 2 * part, (0, 4), 5),
            ("reduce-scatter", 2 * part, (0, 4), 5),
            ("collective-permute", part, (0, 1), 5),
            ("all-reduce", part, tuple(range(8)), 1),
            ("all-to-all", part, (0, 1, 2, 3), 1),
        ]
    )
    assert cost.sent("all-reduce") == 16 * part
    assert cost.sent() == (16 + 10 + 10 + 5 + 1) * part
    assert all(c.scope for c in cost.collectives)
