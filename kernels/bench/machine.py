"""What the benchmarks say of the machine that they ran on, and the JSON that they leave."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "optax", "torch", "tokamax", "libtpu", "jax-cuda13-plugin")


def copy_bandwidth(rounds: int) -> float:
    """Bytes read and written a second when one is added to 256 MiB in place."""
    x = jnp.zeros(1 << 26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(x))
    seconds = []
    for _ in range(max(rounds, 5)):
        began = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - began)
    return 2 * x.nbytes / statistics.median(seconds)


def no_room(error: Exception) -> bool:
    """Whether a form failed for lack of memory: that is a result, any other failure is not."""
    return "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError"


def write_report(path: Path, *, machine: dict[str, Any] | None = None, **fields: Any) -> None:
    """Writes `fields` with the date, the machine, what was measured of it, and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            versions[package] = importlib.metadata.version(package)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            **(machine or {}),
        },
        "versions": versions,
        **fields,
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
