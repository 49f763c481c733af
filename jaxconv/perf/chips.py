"""Accelerators: what a chip holds, computes and sends, and the slices that they come in.

Numbers are those of the vendors' public specifications:
[v4], [v5e], [v5p], [v6e], [tpu7x]: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x;
[isca23]: Jouppi et al. 2023, "TPU v4", arXiv 2304.01433, table 4;
[h100], [h200]: nvidia.com/en-us/data-center/h100, /h200, SXM, dense rates;
[dgx]: NVIDIA DGX H100/H200 user guide, network of 400 Gb/s a GPU.
"""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxconv.errors import Refused

if TYPE_CHECKING:
    import jax
    from jax.experimental.topologies import TopologyDescription

_GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One chip. Rates are decimal and per second; `device_…` are those of one JAX device.

    Attributes:
        name: as in a topology, such as "v5e".
        kinds: texts of JAX's `device_kind`.
        hbm_bytes: main memory.
        bf16_flops: dense matmul FLOPs per second with bfloat16 inputs.
        f32_flops: the same of float32 inputs at JAX's default precision.
        hbm_rate: bytes of main memory per second.
        link_rate: bytes per second and direction of one link to a neighbour; of a GPU, of all its
            NVLinks together.
        torus: dimensions of the torus in which the chips are linked, 0 where a switch links them.
        wrap: a torus dimension is closed to a ring if all sizes are multiples of this.
        dcn_rate: bytes per second and chip to other slices (of a GPU: to other hosts); None where
            the vendor publishes none.
        chips_per_host: of the usual host of a slice.
        devices: JAX devices of a chip.
        config: name of libtpu's chip configuration, where its default is not the one of real use.
        reserved_bytes: of a device's memory that libtpu keeps for itself.
    """

    name: str
    kinds: tuple[str, ...]
    hbm_bytes: int
    bf16_flops: float
    f32_flops: float
    hbm_rate: float
    link_rate: float
    torus: int
    wrap: int
    dcn_rate: float | None
    chips_per_host: int
    devices: int = 1
    config: str | None = None
    reserved_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """Of one device: what programs may have of its memory."""
        return self.device_hbm_bytes - self.reserved_bytes

    @property
    def device_hbm_bytes(self) -> int:
        return self.hbm_bytes // self.devices

    @property
    def device_hbm_rate(self) -> float:
        return self.hbm_rate / self.devices

    def device_flops(self, dtype: str) -> float:
        """Peak FLOPs per second of one device for "bfloat16" or "float32" inputs."""
        rates = {"bfloat16": self.bf16_flops, "float32": self.f32_flops}
        if dtype not in rates:
            raise ValueError(f"dtype is {dtype!r}; it may be {', '.join(rates)}")
        return rates[dtype] / self.devices


# A TPU multiplies float32 by default in one bfloat16 pass, so both have the same rate. A link's
# rate is the chip's bidirectional ICI bandwidth over its ports (4 in two dimensions, 6 in three)
# and over both directions.
_TPUS = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        hbm_bytes=32 * _GIB,  # [v4]
        bf16_flops=275e12,  # [v4]
        f32_flops=275e12,
        hbm_rate=1200e9,  # [v4]
        link_rate=50e9,  # [isca23]: 6 links of 50 GB/s
        torus=3,
        wrap=4,  # [v4]
        dcn_rate=None,
        chips_per_host=4,  # [v4]
        config="megacore",  # both cores of a chip are one device
        reserved_bytes=5 * _GIB // 4,  # what libtpu says of a program that is too large
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=16 * _GIB,  # [v5e]
        bf16_flops=197e12,  # [v5e]
        f32_flops=197e12,
        hbm_rate=819e9,  # [v5e]
        link_rate=400e9 / 4 / 2,  # [v5e]
        torus=2,
        wrap=16,  # [v5e]: only the whole pod of 16 x 16 closes
        dcn_rate=6.4e12 / 8 / 256,  # [v5e]: 6.4 Tb/s a pod of 256
        chips_per_host=4,  # [v5e]: of slices of several hosts; single ones have up to 8
        reserved_bytes=_GIB // 4,
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        hbm_bytes=95 * _GIB,  # [v5p]
        bf16_flops=459e12,  # [v5p]
        f32_flops=459e12,
        hbm_rate=2765e9,  # [v5p]
        link_rate=1200e9 / 6 / 2,  # [v5p]
        torus=3,
        wrap=4,  # [v5p]
        dcn_rate=50e9 / 8,  # [v5p]
        chips_per_host=4,  # [v5p]
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=32 * _GIB,  # [v6e]
        bf16_flops=918e12,  # [v6e]
        f32_flops=918e12,
        hbm_rate=1638e9,  # [v6e]
        link_rate=800e9 / 4 / 2,  # [v6e]
        torus=2,
        wrap=16,  # [v6e]
        dcn_rate=100e9 / 8,  # [tpu7x], which compares the three
        chips_per_host=4,  # [v6e]
        reserved_bytes=3 * _GIB // 4,
    ),
    Chip(
        name="tpu7x",
        kinds=("TPU7x", "TPU v7x"),
        hbm_bytes=192 * _GIB,  # [tpu7x]
        bf16_flops=2307e12,  # [tpu7x]
        f32_flops=2307e12,
        hbm_rate=7380e9,  # [tpu7x]
        link_rate=1200e9 / 6 / 2,  # [tpu7x]
        torus=3,
        wrap=4,  # [tpu7x]
        dcn_rate=100e9 / 8,  # [tpu7x]
        chips_per_host=4,  # [tpu7x]
        devices=2,  # [tpu7x]: two chiplets, each with its own memory
        reserved_bytes=5 * _GIB // 4,
    ),
)
_GPUS = (
    Chip(
        name="h100",
        kinds=("NVIDIA H100",),
        hbm_bytes=80 * 10**9,  # [h100]
        bf16_flops=989e12,  # [h100]
        f32_flops=494e12,  # [h100]: TF32
        hbm_rate=3350e9,  # [h100]
        link_rate=900e9 / 2,  # [h100]: NVLink, both directions
        torus=0,
        wrap=1,
        dcn_rate=400e9 / 8,  # [dgx]
        chips_per_host=8,  # [dgx]
    ),
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        hbm_bytes=141 * 10**9,  # [h200]
        bf16_flops=989e12,  # [h200]
        f32_flops=494e12,  # [h200]: TF32
        hbm_rate=4800e9,  # [h200]
        link_rate=900e9 / 2,  # [h200]
        torus=0,
        wrap=1,
        dcn_rate=400e9 / 8,  # [dgx]
        chips_per_host=8,  # [dgx]
    ),
)
CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}
TPUS = tuple(chip.name for chip in _TPUS)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device.device_kind`; None if it is not in the table (a CPU, say)."""
    for chip in CHIPS.values():
        # "TPU v5" is a v5p; other kinds carry more text, such as the size of the memory.
        if device_kind in chip.kinds or (not chip.torus and device_kind.startswith(chip.kinds)):
            return chip
    return None


@dataclass(frozen=True)
class Topology:
    """Chips that are linked to each other.

    Attributes:
        chip: which.
        shape: chips along each dimension of a slice.
        slices: slices, joined by the data-center network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        times = f"{self.slices}x" if self.slices > 1 else ""
        return f"{times}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def wraps(self) -> bool:
        """Whether the dimensions are rings rather than lines."""
        return all(n % self.chip.wrap == 0 for n in self.shape)


def topology(name: str) -> Topology:
    """Reads "v5e:4x8", "v5p:4x4x4", "tpu7x:2x2x1", or "2xv5e:16x16" for two slices.

    Raises:
        Refused: there is no such chip, or the chip has no such shape.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    chips = ", ".join(TPUS)
    if not found or found[2] not in TPUS:
        raise Refused(
            f"topology is {name!r}; it may be CHIP:SHAPE, such as v5e:4x8 or v5p:4x4x4, "
            f"with SLICESx before it for several slices; chips: {chips}"
        )
    chip, shape = CHIPS[found[2]], tuple(int(n) for n in found[3].split("x"))
    slices = int(found[1] or 1)
    if len(shape) != chip.torus or min(shape) < 1 or slices < 1:
        raise Refused(
            f"topology is {name!r}; a slice of {chip.name} has {chip.torus} sizes of at least 1, "
            f"such as {chip.name}:{'x'.join('2' * chip.torus)}"
        )
    return Topology(chip, shape, slices)


def describe(topology: Topology) -> "TopologyDescription":
    """libtpu's devices for a topology, for which programs compile without a TPU.

    Before the first call of a process, which loads libtpu, set `TPU_SKIP_MDS_QUERY=1` in the
    environment on a machine outside Google's cloud, and `ALLOW_MULTIPLE_LIBTPU_LOAD=1` where
    several processes compile at once.

    Raises:
        Refused: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise Refused(
            f"topology {topology.name} needs libtpu, which is not installed; "
            "the extra jaxconv[tpu-aot] has it"
        )
    from jax.experimental import topologies

    chip, shape = topology.chip, topology.shape
    options: dict[str, object] = {}
    if chip.config is not None:
        options["chip_config_name"] = chip.config
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(shape) < chip.chips_per_host:
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    try:
        return topologies.get_topology_desc(
            f"{chip.name}:{'x'.join(map(str, shape))}", platform="tpu", **options
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"topology is {topology.name}; libtpu refuses it: {reason}") from error


def alone(devices: Sequence["jax.Device"]) -> Sequence["jax.Device"]:
    """The same chips as a topology of their own; as they are where they are no TPU's.

    libtpu compiles for some devices of a topology only if they are its first ones.

    Raises:
        Refused: they are no block of whole chips.
    """
    if devices[0].platform != "tpu" or sorted(d.id for d in devices) == list(range(len(devices))):
        return devices
    chip = chip_of(devices[0].device_kind)
    coords = [device.coords[: chip.torus] for device in devices]
    block = Topology(chip, tuple(len(set(along)) for along in zip(*coords, strict=True)))
    if block.devices != len(devices):
        raise Refused(
            f"{len(devices)} devices of {chip.name} at {coords}; they must be a block of chips"
        )
    return describe(block).devices
