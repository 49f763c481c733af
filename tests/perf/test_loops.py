"""Trip counts against loops that were written with them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxconv.perf.hlo_text import parse
from jaxconv.perf.loops import Trips, trip_count

pytestmark = pytest.mark.skipif(
    jax.__version_info__ >= (0, 12),
    reason="XLA of jax 0.12 calls small loops of a CPU, and `trip_count` does not see their start",
)


def loop_of(function, *arguments) -> Trips | None:
    """Of the only loop of a function, from the condition alone."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    module = parse(re.sub(r'"known_trip_count":\{[^}]*\},?', "", text))
    loops = [(c, i) for c in module.computations.values() for i in c if i.opcode == "while"]
    ((computation, loop),) = loops
    return trip_count(module, computation, loop)


def halve(x):
    return jnp.sin(x) * 0.5


def counting(start, condition, step):
    def function(x):
        return lax.while_loop(condition, lambda c: (c[0] + step, halve(c[1])), (start, x))

    return function


@pytest.mark.parametrize(
    ("start", "condition", "step", "count"),
    [
        (0, lambda c: c[0] < 7, 1, 7),
        (3, lambda c: c[0] <= 20, 4, 5),
        (50, lambda c: c[0] > 1, -10, 5),
        (9, lambda c: c[0] >= 0, -3, 4),
        (0, lambda c: c[0] != 12, 3, 4),
    ],
)
def test_a_counter_with_constant_bounds(start, condition, step, count):
    loop = loop_of(counting(start, condition, step), jnp.ones(200))
    assert loop == Trips(count, exact=True)


def test_the_bound_of_a_condition_that_may_end_earlier_is_the_most():
    def function(x):
        return lax.while_loop(
            lambda c: (c[0] < 32) & (c[1].sum() > 0), lambda c: (c[0] + 1, halve(c[1])), (0, x)
        )

    assert loop_of(function, jnp.ones(200)) == Trips(32, exact=False)


def test_a_loop_that_the_data_ends_is_not_known():
    def by_argument(x, n):
        return lax.fori_loop(0, n, lambda _, x: halve(x), x)

    def by_value(x):
        return lax.while_loop(lambda x: x.sum() > 1, halve, x)

    assert loop_of(by_argument, jnp.ones(200), 5) is None
    assert loop_of(by_value, jnp.ones(200)) is None


def test_what_xla_knows_is_taken():
    text = jax.jit(lambda x: lax.fori_loop(0, 11, lambda _, x: halve(x), x)).lower(jnp.ones(200))
    module = parse(text.compile().as_text())
    (loop,) = (i for i in module.entry if i.opcode == "while")
    assert "known_trip_count" in loop.attributes
    assert trip_count(module, module.entry, loop) == Trips(11, exact=True)
