"""How long a program would take on chips that nobody need have, and what holds it up.

A device runs its instructions one after another. Each takes as long as its FLOPs at the chip's peak
or its bytes at the memory's rate, whichever is longer. Collectives that the compiler has made
asynchronous run beside them and cost only what they take longer; all others are added. Nothing is
lost to latency, to badly shaped products or to the host, so a real step is slower: published runs
reach about 50 to 70 % of the peak where this says nearly 100 %.

A collective over n devices moves, with payload P (see `Collective`), P (n - 1) / n through each
device, an all-reduce twice that. On a TPU it goes around rings: a group that lies along k
dimensions of the torus uses the links of all k, both ways where the dimension is closed and the
group has all of it, one way otherwise. An all-to-all over a dimension of n chips takes P n / 4 at
that rate. What leaves a slice is first reduced or gathered within it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jax.sharding import Mesh

from jaxconv.errors import Refused
from jaxconv.perf.chips import Topology
from jaxconv.perf.collectives import Collective
from jaxconv.perf.flops import mfu
from jaxconv.perf.hlo import Cost

Place = tuple[int, ...]
"""Of a device: (slice, coordinates of its chip). A switch has no coordinates."""


def places(mesh: Mesh) -> list[Place]:
    """Where the devices of a mesh stand, in the order in which a program counts them."""

    def place(device) -> Place:
        if device.platform == "tpu":
            return (getattr(device, "slice_index", 0), *device.coords)
        return (device.process_index,)

    return [place(device) for device in mesh.devices.flat]


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run.

    Attributes:
        seconds: of the whole.
        compute, hbm, ici, dcn: that each would take if it were alone.
        limit: which of these is longest.
        tokens_per_second: of all devices, None where the program makes or learns no tokens.
        mfu: model FLOPs utilization, None where the model's FLOPs were not given.
    """

    seconds: float
    compute: float
    hbm: float
    ici: float
    dcn: float
    limit: str
    tokens_per_second: float | None
    mfu: float | None

    def to_dict(self) -> dict[str, float | str | None]:
        return asdict(self)


def estimate(
    cost: Cost,
    topology: Topology,
    devices: Sequence[Place],
    *,
    tokens: float | None = None,
    model_flops: float | None = None,
) -> Estimate:
    """Time of a program on a topology.

    Args:
        cost: of one device.
        devices: where they stand; see `places`.
        tokens: that one run makes or learns, on all devices together.
        model_flops: of one run on all devices together, by the formulas of `perf.flops`.

    Raises:
        Refused: the devices exchange data between slices, and the chip's vendor publishes no rate.
    """
    chip = topology.chip
    compute = hbm = instructions = 0.0
    for work in cost.work:
        multiplying = work.flops / chip.device_flops(_precision(work.dtype))
        moving = work.bytes / chip.device_hbm_rate
        compute += work.times * multiplying
        hbm += work.times * moving
        instructions += work.times * max(multiplying, moving)
    ici = dcn = beside = between = 0.0
    for collective in cost.collectives:
        near, far = collective_seconds(collective, topology, devices)
        ici += collective.times * near
        dcn += collective.times * far
        if collective.asynchronous:
            beside += collective.times * (near + far)
        else:
            between += collective.times * (near + far)
    terms = {"compute": compute, "hbm": hbm, "ici": ici, "dcn": dcn}
    seconds = max(instructions, beside) + between
    return Estimate(
        seconds,
        **terms,
        limit=max(terms, key=terms.get),
        tokens_per_second=None if tokens is None else tokens / seconds,
        mfu=None if model_flops is None else mfu(model_flops, seconds, chip, len(devices)),
    )


def collective_seconds(
    collective: Collective, topology: Topology, devices: Sequence[Place]
) -> tuple[float, float]:
    """(within slices, between slices) of one run."""
    chip = topology.chip
    members = [devices[i] for i in collective.group]
    slices = len({place[0] for place in members})
    local = len(members) // slices
    payload = collective.bytes
    far = 0.0
    if slices > 1:
        if chip.dcn_rate is None:
            raise Refused(
                f"topology is {topology.name}; no rate between slices of {chip.name} is published, "
                "so it may be one slice only"
            )
        share = payload / local * (1 if _is_permute(collective) else (slices - 1) / slices)
        far = _passes(collective) * share * chip.devices / chip.dcn_rate
        members = [place for place in members if place[0] == members[0][0]]
    if local == 1:
        return 0.0, far
    if not chip.torus:
        share = 1.0 if _is_permute(collective) else (local - 1) / local
        return _passes(collective) * payload * share / chip.link_rate, far
    return _on_torus(collective, topology, members), far


def _on_torus(collective: Collective, topology: Topology, members: list[Place]) -> float:
    chip = topology.chip
    spans = [sorted({place[1 + axis] for place in members}) for axis in range(chip.torus)]
    along = [axis for axis, span in enumerate(spans) if len(span) > 1]
    chips = math.prod(len(span) for span in spans)
    # Groups on the other devices of the same chips want the same links at the same time.
    shared = chip.devices / max(1, round(len(members) / chips))
    if not along:  # the devices of one chip
        along, rates = [0], [chip.link_rate]
    else:
        rates = [_ring_rate(topology, axis, len(spans[axis])) for axis in along]
    payload = collective.bytes * shared
    if _is_permute(collective):
        return payload * _hops(topology, *members[:2]) / chip.link_rate
    if collective.kind == "all-to-all":
        return max(
            payload * len(spans[axis]) / 4 / rate for axis, rate in zip(along, rates, strict=True)
        )
    n = len(members)
    return _passes(collective) * payload * (n - 1) / n / sum(rates)


def _ring_rate(topology: Topology, axis: int, span: int) -> float:
    closed = topology.wraps and span == topology.shape[axis] and span > 2
    return topology.chip.link_rate * (2 if closed else 1)


def _hops(topology: Topology, sender: Place, receiver: Place) -> int:
    """Links between two chips, at least one."""
    steps = 0
    for length, a, b in zip(topology.shape, sender[1:], receiver[1:], strict=False):
        away = abs(a - b)
        steps += min(away, length - away) if topology.wraps else away
    return max(1, steps)


def _passes(collective: Collective) -> int:
    return 2 if collective.kind == "all-reduce" else 1


def _is_permute(collective: Collective) -> bool:
    return collective.kind == "collective-permute"


def _precision(dtype: str) -> str:
    """Whose peak counts; narrower types than bfloat16 are taken to run at its rate."""
    return "float32" if dtype in ("f32", "f64") else "bfloat16"
