"""Loading and saving a checkpoint as deep as a 7B model, in shards, holds one copy of it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import checkpoint_memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_one_copy_of_the_weights_and_a_shard_are_the_most_it_takes():
    config = checkpoint_memory.reduced(256)
    shard = 2.0 * config.num_parameters / 2
    found = checkpoint_memory.measure(256, shard)
    assert found["files"] > 1 and found["same"]
    assert found["weights"] > 1.5e8
    assert 0.9 * found["weights"] < found["loaded"]  # the meter sees the weights at all
    assert found["load"] < found["weights"] + shard + checkpoint_memory.SLACK
    assert found["save"] < shard + checkpoint_memory.SLACK
