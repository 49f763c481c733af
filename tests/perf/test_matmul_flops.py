"""FLOPs of matrix products in the forms in which backends write them."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxconv.perf.hlo import program_cost
from jaxconv.perf.hlo_text import parse
from jaxconv.perf.matmul_flops import _products, matmul_flops


@pytest.mark.parametrize(
    ("equation", "left", "right", "multiplied"),
    [
        ("ij,jk->ik", (64, 96), (96, 32), 64 * 96 * 32),
        ("bij,bkj->bik", (3, 8, 16), (3, 5, 16), 3 * 8 * 16 * 5),
        ("btkgh,bksh->bkgts", (2, 5, 3, 2, 8), (2, 3, 7, 8), 2 * 5 * 3 * 2 * 8 * 7),
        ("ij,j->i", (64, 96), (96,), 64 * 96),
    ],
)
def test_an_einsum_counts_two_flops_a_product(equation, left, right, multiplied):
    compiled = jax.jit(lambda x, y: jnp.einsum(equation, x, y)).lower(
        jnp.zeros(left), jnp.zeros(right)
    )
    assert program_cost(compiled.compile()).flops == 2 * multiplied


def flops_of(line: str, *operands: str) -> float:
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    body = "\n".join([*lines, f"  ROOT %r = {line}"])
    entry = parse(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n").entry
    return matmul_flops(entry.root, entry.operand_shapes(entry.root))


@pytest.mark.parametrize(
    ("line", "left", "right", "multiplied"),
    [
        # A plain matmul, and one whose outputs each meet the only input at another place.
        (
            "bf16[64,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf",
            "bf16[64,96]{1,0}",
            "bf16[96,32]{1,0}",
            64 * 96 * 32,
        ),
        (
            "bf16[16,256,32]{1,2,0} convolution(%p0, %p1), "
            "window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=fb0_0oi->0fb",
            "bf16[256,32,1]{1,2,0}",
            "bf16[16,256,256]{1,2,0}",
            16 * 256 * 32 * 256,
        ),
        # A projection to heads: the window runs over the heads, padding keeps them apart.
        (
            "bf16[16,256,4,64]{1,3,2,0} convolution(%p0, %p1), "
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            "bf16[16,256,32,1]{1,2,3,0}",
            "bf16[4,64,32,1]{1,2,3,0}",
            16 * 256 * 4 * 64 * 32,
        ),
        # Attention scores: both batch axes are kept apart by dilation and stride.
        (
            "f32[16,2,128,256]{3,2,1,0} convolution(%p0, %p1), "
            "window={size=16x2 stride=15x1 lhs_dilate=16x2}, dim_labels=0b1f_0o1i->01bf",
            "bf16[16,128,2,64]{3,1,2,0}",
            "bf16[16,256,2,64]{3,1,2,0}",
            16 * 2 * 128 * 256 * 64,
        ),
    ],
)
def test_a_tpu_writes_a_matmul_as_a_convolution(line, left, right, multiplied):
    assert flops_of(line, left, right) == 2 * multiplied


def test_a_real_convolution_skips_its_padding():
    line = (
        "f32[2,5,7]{2,1,0} convolution(%p0, %p1), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    )
    # The first and the last of five outputs meet two inputs, the others three.
    assert flops_of(line, "f32[2,5,4]{2,1,0}", "f32[3,4,7]{2,1,0}") == 2 * 2 * 4 * 7 * (2 + 9 + 2)


def test_positions_are_those_of_counting_them_one_by_one():
    sizes = itertools.product(
        (1, 4, 7), (1, 3, 6), (1, 3), (1, 2), ((0, 0), (2, 1)), (1, 3), (1, 2)
    )
    for length, out, size, stride, pad, lhs_dilate, rhs_dilate in sizes:
        met = 0
        for o, k in itertools.product(range(out), range(size)):
            place = o * stride + k * rhs_dilate - pad[0]
            met += place % lhs_dilate == 0 and 0 <= place // lhs_dilate < length
        counted = _products(length, out, size, stride, pad, lhs_dilate, rhs_dilate)
        assert counted == met


def test_a_gemm_call_tells_what_it_contracts():
    line = (
        '(bf16[64,32]{1,0}, s8[4096]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$gemm",'
        ' backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
        '"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}'
    )
    assert flops_of(line, "bf16[96,64]{1,0}", "bf16[96,32]{1,0}") == 2 * 64 * 96 * 32
