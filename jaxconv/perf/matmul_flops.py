"""FLOPs of the matrix products in HLO, in whatever form a backend writes them."""

import functools
import json
import math
import re

from jaxconv.perf.hlo_text import Instruction, Shape

_GEMM = "__cublas"


def matmul_flops(instruction: Instruction, operands: list[Shape]) -> float:
    """FLOPs, 2 a multiply-add, of a dot, a convolution or a GEMM call; 0 of anything else.

    A TPU runs every matrix product as a convolution. Batch dimensions become spatial ones, kept
    apart by dilation and padding; products with those zeros are not counted, as XLA does not do
    them either.
    """
    if instruction.opcode == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2.0 * instruction.shape.size * math.prod(operands[0].dims[d] for d in contracted)
    if instruction.opcode == "convolution":
        return _convolution(instruction, *operands[:2])
    if instruction.opcode == "custom-call" and _GEMM in instruction.attributes:
        return _gemm(instruction, operands[0])
    return 0.0


def _gemm(instruction: Instruction, left: Shape) -> float:
    config = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
    contracted = json.loads(config[1]) if config else []
    # A cuBLASLt call may give a workspace beside the product, which comes first.
    return 2.0 * instruction.shape.size * math.prod(left.dims[int(d)] for d in contracted)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    attributes = instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    left_labels, right_labels, out_labels = labels.groups()
    window = _window(attributes)
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    fma = left.dims[left_labels.index("b")] / (int(groups[1]) if groups else 1)
    fma *= right.dims[right_labels.index("i")] * instruction.shape.dims[out_labels.index("f")]
    for axis in range(len(labels[1]) - 2):
        label = str(axis)
        fma *= _products(
            left.dims[left_labels.index(label)],
            instruction.shape.dims[out_labels.index(label)],
            *(window[key][axis] if key in window else default for key, default in _WINDOW.items()),
        )
    return 2.0 * fma


_WINDOW = {"size": 1, "stride": 1, "pad": (0, 0), "lhs_dilate": 1, "rhs_dilate": 1}


def _window(attributes: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields: dict[str, list] = {}
    for item in found[1].split() if found else ():
        key, _, value = item.partition("=")
        parts = value.split("x")
        if key == "pad":
            fields[key] = [tuple(int(n) for n in part.split("_")) for part in parts]
        elif key in _WINDOW:
            fields[key] = [int(n) for n in parts]
    return fields


@functools.cache
def _products(
    length: int,
    out: int,
    size: int,
    stride: int,
    pad: tuple[int, int],
    lhs_dilate: int,
    rhs_dilate: int,
) -> int:
    """How many (output, window) positions of one axis meet an entry of the left operand."""
    last = (length - 1) * lhs_dilate
    total = 0
    for k in range(size):
        # Output o meets position o * stride + shift of the dilated operand.
        shift = k * rhs_dilate - pad[0]
        first = max(0, -(shift // stride)) if shift < 0 else 0
        until = min(out, (last - shift) // stride + 1)
        if until <= first:
            continue
        # Positions repeat their remainder by lhs_dilate after `period` outputs.
        period = lhs_dilate // math.gcd(stride, lhs_dilate)
        for o in range(first, min(first + period, until)):
            if (o * stride + shift) % lhs_dilate == 0:
                total += -(-(until - o) // period)
    return total
