"""The table of chips and the names of topologies."""

import importlib.util

import pytest

from jaxconv.errors import Refused
from jaxconv.perf.chips import CHIPS, TPUS, chip_of, describe, topology


def test_a_name_is_read():
    v5e = topology("v5e:4x8")
    assert (v5e.chip.name, v5e.shape, v5e.slices) == ("v5e", (4, 8), 1)
    assert (v5e.chips, v5e.devices, v5e.name) == (32, 32, "v5e:4x8")
    assert topology("v5p:4x4x4").devices == 64
    # Two devices on each chip.
    assert topology("tpu7x:2x2x1").devices == 8
    two = topology("2xv6e:16x16")
    assert (two.slices, two.devices, two.name) == (2, 512, "2xv6e:16x16")


@pytest.mark.parametrize("name", ["v5e", "v3:2x2", "h100:8", "v5e:4x", "V5E:4x4", "v5e:a"])
def test_another_name_is_refused_with_what_it_may_be(name):
    with pytest.raises(Refused, match=r"may be CHIP:SHAPE.*chips: v4, v5e, v5p, v6e, tpu7x$"):
        topology(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:2x2x1", r"a slice of v5e has 2 sizes of at least 1, such as v5e:2x2"),
        ("v5p:4x4", r"a slice of v5p has 3 sizes of at least 1, such as v5p:2x2x2"),
        ("v5e:0x4", r"a slice of v5e has 2 sizes"),
        ("0xv5e:4x4", r"a slice of v5e has 2 sizes"),
    ],
)
def test_a_shape_that_a_chip_does_not_come_in_is_refused(name, message):
    with pytest.raises(Refused, match=message):
        topology(name)


def test_only_whole_rings_close():
    assert not topology("v5e:4x8").wraps and topology("v5e:16x16").wraps
    assert topology("v5p:4x4x8").wraps and not topology("v5p:2x2x4").wraps


def test_devices_share_their_chip():
    chip = CHIPS["tpu7x"]
    assert chip.device_hbm_bytes == 96 << 30
    assert chip.usable_bytes == 94.75 * (1 << 30)
    assert chip.device_flops("bfloat16") == 2307e12 / 2
    assert chip.device_hbm_rate == 3690e9
    with pytest.raises(ValueError, match=r"dtype is 'int8'; it may be bfloat16, float32"):
        chip.device_flops("int8")


def test_numbers_stand_in_the_relations_that_the_vendors_give():
    rates = {name: chip.link_rate * 2 * chip.torus * 2 for name, chip in CHIPS.items()}
    # All links of a chip, both ways, GB/s.
    assert {name: rates[name] / 1e9 for name in TPUS} == {
        "v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200,
    }  # fmt: skip
    # Tokens in a batch from which a matmul is limited by compute rather than by memory.
    critical = {n: round(c.bf16_flops / c.hbm_rate) for n, c in CHIPS.items()}
    assert critical == {
        "v4": 229, "v5e": 241, "v5p": 166, "v6e": 560, "tpu7x": 313, "h100": 295, "h200": 206,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("cpu", None),
    ],
)
def test_the_kinds_that_jax_tells(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_without_libtpu_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(Refused, match=r"v5e:4x8 needs libtpu.*jaxconv\[tpu-aot\]"):
        describe(topology("v5e:4x8"))
