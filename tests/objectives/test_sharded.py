"""Rows over eight devices: the same numbers, and no device reads another's streams."""

import os
import subprocess
import sys

# A process of its own: the number of CPU devices is fixed once jax has started.
PROGRAM = """
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxconv.objectives.advantages import hierarchical_advantages
from jaxconv.objectives.whitening import whiten

B, T, N = 16, 12, 4
rng = np.random.default_rng(0)
turn_ids = np.sort(rng.integers(-1, N, size=(B, T)), axis=1).astype(np.int32)
streams = dict(
    values=rng.normal(size=(B, T)),
    turn_rewards=rng.normal(size=(B, N)),
    token_rewards=rng.normal(size=(B, T)),
    turn_ids=turn_ids,
    action_mask=turn_ids >= 0,
    bootstrap=rng.normal(size=B),
)
streams = {k: x.astype(np.float32) if x.dtype == np.float64 else x for k, x in streams.items()}
teams = np.arange(B, dtype=np.int32) % 3

def advantages(s):
    rates = dict(gamma_turn=0.9, lam_turn=0.8, gamma_token=0.97, lam_token=0.7)
    return hierarchical_advantages(**s, **rates)[0]

def whitened(s, teams):
    return whiten(advantages(s), s["action_mask"], teams, num_groups=3)

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
spread, spread_teams = jax.device_put((streams, teams), rows)
compiled = jax.jit(advantages).lower(spread).compile()
out = compiled(spread)
assert len(out.sharding.device_set) == 8 and not out.sharding.is_fully_replicated, out.sharding
np.testing.assert_allclose(out, advantages(streams), rtol=1e-5, atol=1e-6)
text = compiled.as_text()
assert not any(c in text for c in ("all-gather", "all-reduce", "all-to-all", "permute")), text
np.testing.assert_allclose(
    jax.jit(whitened)(spread, spread_teams), whitened(streams, teams), rtol=1e-4, atol=1e-5
)
print("ok")
"""


def test_rows_over_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"
