"""Times worked out by hand from the numbers of the chips."""

import pytest

from jaxconv.errors import Refused
from jaxconv.perf.chips import CHIPS, Topology, topology
from jaxconv.perf.collectives import Collective
from jaxconv.perf.hlo import Cost, Work
from jaxconv.perf.roofline import collective_seconds, estimate

GB = 10**9


def grid(*shape: int, slices: int = 1, per_chip: int = 1) -> list[tuple[int, ...]]:
    """Places of all devices, the last dimension first to change."""
    found = [()]
    for length in (slices, *shape):
        found = [(*place, i) for place in found for i in range(length)]
    return [place for place in found for _ in range(per_chip)]


def seconds(kind, name, group, devices=None, nbytes=GB):
    slice_of = topology(name) if isinstance(name, str) else name
    devices = devices or grid(*slice_of.shape, slices=slice_of.slices)
    return collective_seconds(Collective(kind, "c", "", nbytes, tuple(group)), slice_of, devices)


def test_a_line_uses_one_direction_and_a_ring_both():
    # Eight of a row of 4 x 8: no ring. 50 GB/s a link.
    assert seconds("all-gather", "v5e:4x8", range(8)) == (pytest.approx(7 / 8 / 50), 0)
    assert seconds("all-reduce", "v5e:4x8", range(8)) == (pytest.approx(2 * 7 / 8 / 50), 0)
    # A whole row of a pod is one; half of it is not.
    assert seconds("reduce-scatter", "v5e:16x16", range(16)) == (pytest.approx(15 / 16 / 100), 0)
    assert seconds("all-gather", "v5e:16x16", range(8)) == (pytest.approx(7 / 8 / 50), 0)
    assert seconds("all-gather", "v5p:4x4x4", range(4)) == (pytest.approx(3 / 4 / 200), 0)


def test_a_group_along_more_dimensions_uses_the_links_of_each():
    assert seconds("all-gather", "v5e:4x8", range(32)) == (pytest.approx(31 / 32 / 100), 0)
    assert seconds("all-gather", "v5p:4x4x4", range(64)) == (pytest.approx(63 / 64 / 600), 0)


def test_all_to_all_and_permute_pay_for_the_way():
    assert seconds("all-to-all", "v5e:16x16", range(16)) == (pytest.approx(16 / 4 / 100), 0)
    assert seconds("all-to-all", "v5e:4x8", range(32)) == (pytest.approx(8 / 4 / 50), 0)
    assert seconds("collective-permute", "v5e:4x8", (0, 1)) == (pytest.approx(1 / 50), 0)
    # From one end of a line to the other; on a ring they are neighbours.
    assert seconds("collective-permute", "v5e:4x8", (7, 0)) == (pytest.approx(7 / 50), 0)
    assert seconds("collective-permute", "v5e:16x16", (15, 0)) == (pytest.approx(1 / 50), 0)


def test_devices_of_one_chip_share_its_links():
    name = "tpu7x:4x4x4"
    devices = grid(4, 4, 4, per_chip=2)
    every_other = range(0, 8, 2)  # one device of each of four chips
    assert seconds("all-gather", name, every_other, devices)[0] == pytest.approx(2 * 3 / 4 / 200)
    assert seconds("all-gather", name, range(8), devices)[0] == pytest.approx(7 / 8 / 200)
    assert seconds("all-gather", name, range(2), devices)[0] == pytest.approx(1 / 2 / 100)


def test_slices_exchange_what_each_device_holds():
    name = "2xv5e:16x16"
    across = (0, 256)
    assert seconds("all-reduce", name, across) == (0, pytest.approx(2 * 1 / 2 / 3.125))
    # A row of both slices: within each of them first, then a sixteenth from each device.
    both = (*range(16), *range(256, 272))
    near, far = seconds("all-reduce", name, both)
    assert near == pytest.approx(2 * 15 / 16 / 100)
    assert far == pytest.approx(2 / 16 / 2 / 3.125)
    with pytest.raises(Refused, match=r"2xv4:4x4x4; no rate between slices of v4 is published"):
        seconds("all-reduce", "2xv4:4x4x4", (0, 64))


def test_gpus_are_linked_by_a_switch_and_hosts_by_the_network():
    hosts = Topology(CHIPS["h100"], (8,), slices=2)
    devices = [(i // 8,) for i in range(16)]
    assert seconds("all-gather", hosts, range(8), devices) == (pytest.approx(7 / 8 / 450), 0)
    near, far = seconds("all-gather", hosts, range(16), devices)
    assert (near, far) == (pytest.approx(7 / 8 / 450), pytest.approx(1 / 8 / 2 / 50))


def cost(*collectives: Collective, work=()) -> Cost:
    return Cost(tuple(work), collectives, ())


MATMUL = Work("matmul", "", flops=197e12, dtype="bf16", bytes=81.9e9, times=2)
NORM = Work("norm", "", flops=0, dtype="", bytes=819e9, times=3)


def test_each_instruction_is_limited_by_compute_or_by_memory():
    done = estimate(
        cost(work=(MATMUL, NORM)),
        topology("v5e:4x8"),
        grid(4, 8),
        tokens=1000,
        model_flops=32 * 197e12,
    )
    assert done.compute == pytest.approx(2) and done.hbm == pytest.approx(2 * 0.1 + 3)
    assert done.seconds == pytest.approx(2 + 3)
    assert done.limit == "hbm"
    assert done.tokens_per_second == pytest.approx(200)
    assert done.mfu == pytest.approx(1 / 5)
    bare = estimate(cost(work=(MATMUL,)), topology("v5e:4x8"), grid(4, 8))
    assert (bare.limit, bare.mfu, bare.tokens_per_second) == ("compute", None, None)


def test_float32_takes_the_rate_of_the_chip_for_it():
    wide = Work("w", "", flops=494e12, dtype="f32", bytes=0, times=1)
    done = estimate(cost(work=(wide,)), Topology(CHIPS["h200"], (1,)), [(0,)])
    assert done.seconds == pytest.approx(1)


def test_only_asynchronous_collectives_hide():
    def gather(asynchronous, times):
        # A second each.
        return Collective("all-gather", "g", "", 50e9 * 8 / 7, tuple(range(8)), times, asynchronous)

    def total(*collectives):
        return estimate(cost(*collectives, work=(MATMUL,)), topology("v5e:4x8"), grid(4, 8))

    assert total(gather(False, 3)).seconds == pytest.approx(2 + 3)
    assert total(gather(True, 1)).seconds == pytest.approx(2)
    assert total(gather(True, 3)).seconds == pytest.approx(3)
    assert total(gather(True, 3), gather(False, 1)).seconds == pytest.approx(3 + 1)
    assert total(gather(True, 3)).limit == "ici" and total(gather(True, 3)).dcn == 0
