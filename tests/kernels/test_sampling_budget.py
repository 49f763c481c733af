"""Cycles of the sampler's TPU kernel, counted in what the compiler makes of it for a v6e.

A bundle of instructions is a cycle in which nothing waits. To copy a chunk, 2048 float32 logits of
8 rows, takes a v6e some 70 cycles: loops far above that no longer keep up with the memory.
"""

import pytest

TURN = 4  # cells of one turn of a loop over cells
VECTORS = 16  # that a chunk fills
BFLOAT16_CHUNKS = 2  # of a cell in 16 rows
ROOM = 1.15  # for what another version of the compiler makes of the same

PROGRAM = """
import jax
from jaxconv_kernels import sample

def call(logits, key_data, temperature, top_k, top_p, min_p, *mask):
    keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    return sample(
        logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        mask=mask[0] if mask else None, implementation="tpu",
    )

def case(rows, vocab, dtype, masked):
    numbers = [((rows,), dtype) for dtype in ("float32", "int32", "float32", "float32")]
    words = [((rows, -(-vocab // 32)), "uint32")] if masked else []
    return call, [((rows, vocab), dtype), ((rows, 2), "uint32"), *numbers, *words]

cases = {
    "float32": case(64, 151_936, "float32", False),
    "bfloat16, masked": case(64, 151_936, "bfloat16", True),
}
"""


def parts(loops):
    """Loops over cells that read logits, those that enter them in bins, and all that come after."""
    loops = [loop for loop in loops if loop.depth > 1]
    # Four comparisons of a logit with a bin, and seven choices of a logit and of an id.
    choices = 14 * VECTORS

    def enters(loop):
        sampled = loop.operations["vpow2"] or loop.operations["vlog2"]
        return loop.depth == 2 and not sampled and loop.operations["vsel"] >= choices

    at = [i for i, loop in enumerate(loops) if enters(loop)]
    reading = [loop for loop in loops[: at[0]] if loop.operations["vpow2"]]
    return reading, [loops[i] for i in at], loops[at[-1] + 1 :]


@pytest.mark.slow
def test_loops_over_the_logits_keep_to_their_bundles(loops_on_v6e):
    plain, masked = (parts(loops) for loops in loops_on_v6e(PROGRAM, "sample"))

    reading, tournament, finish = plain
    # One exponential a logit where all rows are at temperature 1, else two.
    read = {loop.operations["vpow2"] // VECTORS // TURN: loop.bundles for loop in reading}
    assert sorted(read) == [1, 2]
    assert read[1] / TURN <= 75 * ROOM
    assert read[2] / TURN <= 114 * ROOM
    assert len(tournament) == 4
    assert sum(loop.bundles for loop in tournament) / TURN <= 84 * ROOM
    # The cell that an unfiltered row reads again; passes over the candidates of 8 rows; their draw.
    cell, count, mass, draw = (loop.bundles for loop in finish[:4])
    assert cell <= 36 * ROOM  # of each row
    assert count <= 153 * ROOM
    assert mass <= 174 * ROOM
    assert draw <= 309 * ROOM  # of 1024 candidates, with their noise

    reading, tournament, _ = masked
    (loop,) = reading
    assert loop.bundles / TURN / BFLOAT16_CHUNKS <= 119 * ROOM
    assert len(tournament) == 4
    bundles = sum(loop.bundles for loop in tournament)
    assert bundles / TURN / BFLOAT16_CHUNKS <= 86 * ROOM
