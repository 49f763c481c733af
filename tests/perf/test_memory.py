"""What a program takes of memory, the largest buffers, and what to do where it is too much."""

import jax
import jax.numpy as jnp
import pytest

from jaxconv.perf.compiling import compile_program
from jaxconv.perf.hlo_text import parse
from jaxconv.perf.memory import (
    Buffer,
    Memory,
    Shortage,
    largest_buffers,
    memory_of,
    planned_memory,
    shortage_of,
    size,
    suggestion,
)

PROGRAM = """HloModule m

ENTRY %main (x: bf16[64,2048]) -> bf16[64,2048] {
  %x = bf16[64,2048]{1,0} parameter(0)
  %wide = bf16[64,8192]{1,0} custom-call(%x), metadata={op_name="jit(f)/mlp/dot_general"}
  %copy.3 = bf16[64,2048]{1,0} copy(%x)
  ROOT %out = bf16[64,2048]{1,0} add(%x, %copy.3), metadata={op_name="jit(f)/add"}
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 262144, parameter 0, shape |bf16[64,2048]| at ShapeIndex {}, maybe-live-out:
 value: <1 x @0> (size=262144,offset=0): bf16[64,2048]{1,0}
allocation 1: size 262144, output shape is |bf16[64,2048]|, maybe-live-out:
 value: <2 out @0> (size=262144,offset=0): bf16[64,2048]{1,0:T(8,128)(2,1)}
allocation 2: size 512, constant:
 value: <3 c @0> (size=512,offset=0): s32[]
allocation 3: size 1310720, preallocated-temp:
 value: <4 while{2} (phi) @0> (size=1048576,offset=0): bf16[64,8192]{1,0}
 value: <5 wide @0> (size=1048576,offset=0): bf16[64,8192]{1,0}
 value: <6 copy.3 @0> (size=262144,offset=1048576): bf16[64,2048]{1,0}
allocation 4: size 99999999, color 1, preallocated-temp:
 value: <7 near @1> (size=99999999,offset=0): bf16[9,9]{1,0:S(1)}

Total bytes used: 1
Used values:
<4 while{2} (phi) @0>
"""


def test_the_plan_is_told_apart_by_kind_and_place():
    memory = planned_memory(ASSIGNMENT)
    assert memory == Memory(262144, 2 * 262144, 262144, 1310720, 0)
    assert memory.resident == 2 * 262144 and memory.peak == 2 * 262144 + 1310720
    assert memory.to_dict()["peak"] == memory.peak


def test_the_largest_buffers_are_named_by_what_writes_them():
    assert largest_buffers(ASSIGNMENT, parse(PROGRAM)) == [
        Buffer("wide", "bf16[64,8192]", "temporary", 1048576, "jit(f)/mlp/dot_general"),
        Buffer("out", "bf16[64,2048]", "output", 262144, "jit(f)/add"),
        Buffer("copy.3", "bf16[64,2048]", "temporary", 262144, ""),
    ]
    assert len(largest_buffers(ASSIGNMENT, parse(PROGRAM), count=1)) == 1


@pytest.fixture(scope="module")
def lowered():
    def step(w, x):
        y = jnp.tanh(x @ w)
        return w - 0.1 * (x.T @ jnp.sin(y @ y)), y.sum()

    arguments = (jax.ShapeDtypeStruct((48, 48), jnp.float32),) * 2
    return jax.jit(step, donate_argnums=0).lower(*arguments)


def test_arguments_and_outputs_are_the_bytes_of_the_arrays(lowered):
    done = compile_program(lowered)
    array = 48 * 48 * 4
    memory = done.memory
    assert memory.arguments == 2 * array
    assert array + 4 <= memory.outputs <= array + 64  # a tuple of two pointers
    assert memory.aliased == array
    assert memory.temporaries >= array and done.shortage is None
    assert done.seconds > 0
    assert done.cost.flops == 3 * 2 * 48**3
    assert done.buffers[0].bytes == array and done.buffers[0].shape == "f32[48,48]"


def test_without_a_plan_the_compilers_sum_stands(lowered):
    compiled = lowered.compile()
    memory = memory_of(compiled)
    assert memory.temporaries == compiled.memory_analysis().temp_size_in_bytes
    assert memory_of(compiled, ASSIGNMENT).temporaries == 1310720


def test_errors_that_are_not_about_memory_are_raised_on():
    program = jax.jit(lambda x: x).lower(jnp.zeros(3))

    class Broken:
        def compile(self, compiler_options):
            return program.compile(compiler_options={"xla_no_such_option": "1"})

    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_program(Broken())


@pytest.mark.parametrize(
    ("message", "shortage"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (17.25G) exceeds available HBM (15.75G).",
            Shortage(round(17.25 * 2**30), round(15.75 * 2**30)),
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 900.5M of 0.50G hbm. Exceeded hbm capacity by 388.50M.",
            Shortage(round(900.5 * 2**20), 2**29),
        ),
        ("INVALID_ARGUMENT: no such layout", None),
    ],
)
def test_what_the_compiler_lacks_is_read_from_its_error(message, shortage):
    assert shortage_of(RuntimeError(message)) == shortage


def test_one_suggestion():
    def suggest(resident=4 << 30, remat="none", microbatch=8):
        return suggestion(resident, 16 << 30, remat=remat, microbatch=microbatch)

    assert suggest() == "use more remat: remat='dots' instead of 'none'"
    assert suggest(remat="dots") == "use more remat: remat='full' instead of 'dots'"
    assert suggest(remat="full").startswith("use a smaller microbatch: 4 rows")
    assert suggest(remat="full", microbatch=1).startswith("use a larger mesh: remat is full")
    # Nothing inside the program helps where what it starts from is too large.
    assert "take 20.0 GiB of a device, which has 16.0 GiB" in suggest(resident=20 << 30)


def test_sizes_are_told_in_units():
    told = [size(n) for n in (12, 3 << 10, 5.5 * 2**20, 7 << 30, 3 << 40)]
    assert told == ["12 bytes", "3.0 KiB", "5.5 MiB", "7.0 GiB", "3.0 TiB"]
