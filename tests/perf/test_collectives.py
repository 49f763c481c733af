"""The forms in which XLA writes collectives and their groups."""

import pytest

from jaxconv.perf.hlo import program_cost

PROGRAM = """HloModule m, num_partitions=8

%fused (p: f32[16,4]) -> f32[2,4] {
  %p = f32[16,4]{1,0} parameter(0)
  %sum = f32[16,4]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %i = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %mine = f32[2,4]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={2,4}
}

%start (p: bf16[8,4]) -> (bf16[8,4], bf16[64,4]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %all = bf16[64,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) tuple(%p, %all)
}

%done (p: bf16[8,4], q: bf16[64,4]) -> bf16[64,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = bf16[64,4]{1,0} parameter(1)
  ROOT %all = bf16[64,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: f32[16,4], y: bf16[8,4]) -> f32[2,4] {
  %x = f32[16,4]{1,0} parameter(0)
  %y = bf16[8,4]{1,0} parameter(1)
  %async-collective-start = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) fusion(%y), kind=kCustom, calls=%start
  %mine = bf16[8,4]{1,0} get-tuple-element(%async-collective-start), index=0
  %whole = bf16[64,4]{1,0} get-tuple-element(%async-collective-start), index=1
  %async-collective-done = bf16[64,4]{1,0} fusion(%mine, %whole), kind=kCustom, calls=%done
  %s = ((f32[16,4]{1,0}), f32[128,4]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %d = f32[128,4]{1,0} all-gather-done(%s)
  ROOT %fusion = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%fused
}
"""


def test_fused_started_and_cut_collectives_count_once():
    cost = program_cost(PROGRAM)
    found = [(c.kind, c.bytes, c.asynchronous) for c in cost.collectives]
    assert found == [
        ("all-gather", 64 * 4 * 2, True),
        ("all-gather", 128 * 4 * 4, True),
        ("reduce-scatter", 16 * 4 * 4, False),
    ]
    # Each reads its part and writes what it gives, once: the pieces of a cut one hand it on.
    assert cost.bytes == (64 + 512) + (256 + 2048) + (256 + 32)


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("[4,2]<=[2,2,2]T(2,1,0)", (0, 4)),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}", (0, 2, 4, 6)),
        ("mesh['x'=2,'y'=4] {'x','y'}", tuple(range(8))),
        ("{}", tuple(range(8))),
    ],
)
def test_groups(groups, first):
    text = (
        "HloModule m, num_partitions=8\n\nENTRY %main (x: f32[4]) -> f32[4] {\n"
        "  %x = f32[4]{0} parameter(0)\n"
        f"  ROOT %r = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, "
        "use_global_device_ids=true, to_apply=%add\n}\n"
    )
    (collective,) = program_cost(text).collectives
    assert collective.group == first and collective.bytes == 16
