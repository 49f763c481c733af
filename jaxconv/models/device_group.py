"""Devices that share one copy of a rollout's weights and one cache.

Heads, MLP and vocabulary are split over them, as the strategy `fsdp_tp` splits them over the mesh
axis `tensor`; what is left of a layer every device has. A group of one device has no mesh, so that
its programs are those of a single device.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxconv_kernels.sampling.spec import CELL, is_small

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.sharding import TENSOR

_WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
    """Some devices of one process, or of a topology that is compiled for.

    Attributes:
        devices: at least one, in the order of the heads that they hold.
    """

    devices: tuple[jax.Device, ...]

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """Of one axis, `tensor`; None for one device."""
        if len(self.devices) == 1:
            return None
        return jax.make_mesh(
            (len(self.devices),), (TENSOR,), axis_types=(AxisType.Explicit,), devices=self.devices
        )

    def sharding(self, spec: PartitionSpec = _WHOLE) -> Sharding:
        """Of an array that is split so over the group; on one device nothing is split."""
        if self.mesh is None:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)

    def tracing(self) -> contextlib.AbstractContextManager:
        """The context in which programs of the group are traced and called."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def device_groups(
    tensor: int, devices: Sequence[jax.Device], field: str = "rollout.tensor"
) -> list[DeviceGroup]:
    """Groups of `tensor` neighbours among the devices of one process.

    Args:
        tensor: at least 1.
        devices: of the process.
        field: the config's name of `tensor`.

    Raises:
        Refused: they do not come out even.
    """
    if tensor < 1 or len(devices) % tensor:
        raise Refused(
            f"config.{field}={tensor}; it must divide the {len(devices)} devices of a process"
        )
    starts = range(0, len(devices), tensor)
    return [DeviceGroup(tuple(devices[i : i + tensor])) for i in starts]


def refuse_uneven(config: DecoderConfig, tensor: int, field: str = "rollout.tensor") -> None:
    """Refuses a model whose heads or MLP do not come out even on so many devices, which the config
    names in `field`.

    The vocabulary may have any size: it is padded.
    """
    for name in ("num_heads", "num_kv_heads", "mlp_dim"):
        size = getattr(config, name)
        if size % tensor:
            raise Refused(f"config.{field}={tensor}; it must divide the model's {name}={size}")


def embedding_rows(vocab: int, tensor: int) -> int:
    """Rows of a vocabulary's embedding on a group: no more than come out even."""
    return _multiple(vocab, tensor)


def head_columns(vocab: int, tensor: int) -> int:
    """Columns of a vocabulary's output matrix on a group.

    On several devices a larger vocabulary ends with a cell of the sampler, so that none lies on two
    devices. Columns past the vocabulary are zeros and never sampled.
    """
    return _multiple(vocab, tensor if tensor == 1 or is_small(vocab) else tensor * CELL)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
