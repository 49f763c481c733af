"""Main memory traffic of instructions, fusions and loops."""

import pytest

from jaxconv.perf.hlo import program_cost

LOOP = """HloModule m

%slice (w: f32[6,128,128], i: s32[], x: f32[8,128]) -> f32[8,128] {
  %w = f32[6,128,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,128,128]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,128,128}
  %flat = f32[128,128]{1,0} bitcast(%one)
  ROOT %dot = f32[8,128]{1,0} dot(%x, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%keep (all: f32[6,8,128], x: f32[8,128], i: s32[]) -> f32[6,8,128] {
  %all = f32[6,8,128]{2,1,0} parameter(0)
  %x = f32[8,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8,128]{2,1,0} bitcast(%x)
  ROOT %put = f32[6,8,128]{2,1,0} dynamic-update-slice(%all, %row, %i, %zero, %zero)
}

%body (s: (s32[], f32[8,128], f32[6,8,128], f32[6,128,128])) -> (s32[], f32[8,128], f32[6,8,128], f32[6,128,128]) {
  %s = (s32[], f32[8,128]{1,0:S(1)}, f32[6,8,128]{2,1,0}, f32[6,128,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,128]{1,0:S(1)} get-tuple-element(%s), index=1
  %all = f32[6,8,128]{2,1,0} get-tuple-element(%s), index=2
  %w = f32[6,128,128]{2,1,0} get-tuple-element(%s), index=3
  %y = f32[8,128]{1,0:S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%slice
  %kept = f32[6,8,128]{2,1,0} fusion(%all, %y, %i), kind=kLoop, calls=%keep
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  ROOT %t = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}, f32[6,128,128]{2,1,0}) tuple(%next, %y, %kept, %w)
}

%condition (s: (s32[], f32[8,128], f32[6,8,128], f32[6,128,128])) -> pred[] {
  %s = (s32[], f32[8,128]{1,0:S(1)}, f32[6,8,128]{2,1,0}, f32[6,128,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (x: f32[8,128], all: f32[6,8,128], w: f32[6,128,128]) -> f32[6,8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %all = f32[6,8,128]{2,1,0} parameter(1)
  %w = f32[6,128,128]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %near = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %there = f32[8,128]{1,0:S(1)} copy-done(%near)
  %t = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}, f32[6,128,128]{2,1,0}) tuple(%zero, %there, %all, %w)
  %loop = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}, f32[6,128,128]{2,1,0}) while(%t), condition=%condition, body=%body
  ROOT %r = f32[6,8,128]{2,1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_a_loop_reads_a_layer_at_a_time_and_writes_where_it_keeps():
    cost = program_cost(LOOP)
    layer, row, index = 128 * 128 * 4, 8 * 128 * 4, 4
    # Each time: the layer's weights and its index; the row that is kept, and the index again; the
    # counter. x stays on the chip, where one copy has brought it.
    once = (layer + index) + (row + index) + index
    assert cost.bytes == row + 6 * once
    assert cost.flops == 6 * 2 * 8 * 128 * 128
    assert [w.times for w in cost.work] == [1, 6, 6, 6]


SCATTER = """HloModule m

%put (all: f32[6,8,128], at: s32[8], x: f32[8,128]) -> f32[6,8,128] {
  %all = f32[6,8,128]{2,1,0} parameter(0)
  %at = s32[8]{0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  %same = f32[6,8,128]{2,1,0} bitcast(%all)
  %put = f32[6,8,128]{2,1,0} scatter(%same, %at, %x), to_apply=%replace
  ROOT %out = f32[6,8,128]{2,1,0} bitcast(%put)
}

ENTRY %main (all: f32[6,8,128], at: s32[8], x: f32[8,128]) -> f32[6,8,128] {
  %all = f32[6,8,128]{2,1,0} parameter(0)
  %at = s32[8]{0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  ROOT %fusion = f32[6,8,128]{2,1,0} fusion(%all, %at, %x), kind=kCustom, calls=%put
}
"""


def test_a_scatter_touches_the_rows_that_it_writes():
    rows = 8 * 128 * 4
    assert program_cost(SCATTER).bytes == 8 * 4 + rows + 2 * rows
    bare = SCATTER.replace(
        "fusion(%all, %at, %x), kind=kCustom, calls=%put", "scatter(%all, %at, %x)"
    )
    assert program_cost(bare).bytes == 8 * 4 + rows + 2 * rows


@pytest.mark.parametrize(
    ("line", "bytes"),
    [
        ("f32[4,8]{1,0} add(%x, %y)", 3 * 128),
        ("f32[4,8]{1,0:S(1)} add(%x, %y)", 2 * 128),
        ("f32[4,8]{1,0:T(8,128)} add(%x, %y)", 2 * 128 + 8 * 128 * 4),
        ("f32[2,8]{1,0} slice(%x), slice={[0:2], [0:8]}", 2 * 64),
        ("f32[4,8]{1,0} dynamic-update-slice(%x, %z, %k, %k)", 32 + 32 + 2 * 4),
        ("f32[4,8]{1,0} bitcast(%x)", 0),
        ("(f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%x, %y)", 0),
        ("((f32[4,8]{1,0}), f32[32,8]{1,0}) all-gather-start(%x), replica_groups={}", 128 + 1024),
        ("f32[4,8]{1,0} all-reduce-start(%x), replica_groups={}", 2 * 128),
        ("((f32[4,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]) slice-start(%x)", 64),
    ],
)
def test_one_instruction(line, bytes):
    text = f"""HloModule m

ENTRY %main (x: f32[4,8], y: f32[4,8], z: f32[1,8], k: s32[]) -> f32[] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %y = f32[4,8]{{1,0}} parameter(1)
  %z = f32[1,8]{{1,0}} parameter(2)
  %k = s32[] parameter(3)
  ROOT %r = {line}
}}
"""
    assert program_cost(text).bytes == bytes
