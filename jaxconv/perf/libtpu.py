"""What libtpu is told when it is loaded, for a run on TPUs and to compile for them alike.

On a torus of three dimensions the compiler would rather add up weights that are zero elsewhere than
gather them: that takes links of all dimensions, but nothing can run beside it, and every device
holds what comes out until the backward pass. With these options weights are gathered while
the layer before computes.
"""

import os

_VARIABLE = "LIBTPU_INIT_ARGS"
_OPTIONS = (
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_tpu_prefer_async_allgather_to_allreduce",
)


def tell() -> str:
    """Sets the options in the environment, unless it has others, and returns those it has then.

    They count for a libtpu that is not loaded yet.
    """
    return os.environ.setdefault(_VARIABLE, " ".join(f"--{option}=true" for option in _OPTIONS))
