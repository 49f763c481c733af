"""Reading HLO: layouts, tuples, attributes with line breaks."""

import pytest

from jaxconv.perf.hlo_text import Shape, parse

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=8

FileNames
1 "a file (with) brackets.py"

%fused (p: bf16[4,20]) -> bf16[4,20] {
  ROOT %p = bf16[4,20]{1,0:T(8,128)(2,1)} parameter(0)
}

ENTRY %main.1 (x.1: bf16[4,20]) -> (bf16[4,20], /*index=1*/s32[]) {
  %x.1 = bf16[4,20]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %k.2 = (f32[3,5]{0,1:T(8,128)S(1)}, (u32[]{:S(2)}, pred[7]{0})) custom-call(%x.1), attributes={a={
"notes":"{\\"block\\": 512}"
}}, metadata={op_name="jit(f)/scope/pallas_call" stack_frame_id=5}, backend_config={"a":{"b":"(}"}}
  %c = s32[] constant(-12)
  %fusion = bf16[4,20]{1,0} fusion(bf16[4,20]{1,0} %x.1), kind=kLoop, calls=%fused
  ROOT %t = (bf16[4,20]{1,0}, s32[]) tuple(%fusion, /*index=1*/%c)
}
"""


def test_instructions_and_shapes_are_those_of_the_text():
    module = parse(TEXT)
    assert module.devices == 8 and set(module.computations) == {"fused", "main.1"}
    entry = module.entry
    assert entry.name == "main.1" and entry.root.name == "t"
    assert [i.opcode for i in entry] == ["parameter", "custom-call", "constant", "fusion", "tuple"]
    kernel = entry.instructions["k.2"]
    assert kernel.op_name == "jit(f)/scope/pallas_call"
    assert kernel.operands == ("x.1",) and kernel.parts == (1, 2)
    assert [str(s) for s in kernel.shapes] == ["f32[3,5]", "u32[]", "pred[7]"]
    assert [s.space for s in kernel.shapes] == [1, 2, 0]
    assert '"a":{"b":"(}"}' in kernel.attributes
    fusion = entry.instructions["fusion"]
    assert fusion.operands == ("x.1",) and fusion.called("calls") == "fused"
    assert entry.root.operands == ("fusion", "c")
    assert entry.instructions["c"].literal == "-12"
    assert entry.operand_shapes(fusion)[0].tile == (8, 128)


@pytest.mark.parametrize(
    ("shape", "exact", "padded"),
    [
        (Shape("bf16", (4, 20), (1, 0), (8, 128)), 160, 8 * 128 * 2),
        (Shape("f32", (4, 20), (0, 1), (8, 128)), 320, 128 * 24 * 4),
        (Shape("f32", (3, 9, 130), (2, 1, 0), (8, 128)), 3 * 9 * 130 * 4, 3 * 16 * 256 * 4),
        (Shape("pred", (300,), (0,), (256,)), 300, 512),
        (Shape("s4", (3,)), 2, 2),
        (Shape("f8e4m3fn", (10,)), 10, 10),
        (Shape("f32", ()), 4, 4),
        (Shape("token", ()), 0, 0),
    ],
)
def test_bytes_of_a_shape(shape, exact, padded):
    assert (shape.bytes, shape.padded_bytes) == (exact, padded)


def test_a_text_that_is_not_a_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("module @jit_f {\n}\n")
