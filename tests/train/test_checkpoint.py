"""Checkpoints: bit-exact, readable names, one-line refusals, and safe from kill -9."""

import json
import os
import random
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.errors import Refused
from jaxconv.train.checkpoint import Checkpoints


class Block(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(2))
        self.linear = nnx.Linear(2, 3, rngs=rngs)


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).dtype, np.shape(leaf), np.asarray(leaf).tobytes()


def assert_same(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(saved), strict=True
    ):
        assert bits(a) == bits(b), path
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array), path
        assert a.dtype == b.dtype, path


def everything():
    blocks = jax.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    return {
        "model": blocks,
        "optimizer": optax.adam(1e-3).init(blocks),
        "key": jax.random.key(1),
        "keys_B": jax.random.split(jax.random.key(2), 4),
        "rbg": jax.random.key(3, impl="rbg"),
        "bf16": jnp.array([1.1, -0.0, jnp.inf, jnp.nan], jnp.bfloat16),
        "subnormal": jnp.array([1e-40, -0.0], jnp.float32),
        "int": jnp.array([-(2**31), 2**31 - 1]),
        "bool": jnp.array([True, False]),
        "nothing": jnp.zeros((0, 2)),
        "numpy": (np.arange(3), np.float64(0.1), np.array([1, 2], ml_dtypes.bfloat16)),
    }


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    arrays = everything()
    host = {"rng": list(random.Random(0).getstate()[1]), "text": "señor", "float": 0.1, "no": None}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, arrays, host)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 7
        restored, restored_host = checkpoints.restore(7, arrays)
        abstract = jax.eval_shape(lambda: {k: v for k, v in arrays.items() if k != "numpy"})
        with pytest.raises(Refused, match=r"has numpy/0 int64\[3\], which is not expected here"):
            checkpoints.restore(7, abstract)
        assert checkpoints.host(7) == host
    assert_same(restored, arrays)
    assert restored_host == host


def test_abstract_targets_give_jax_arrays(tmp_path):
    arrays = {name: leaf for name, leaf in everything().items() if name != "numpy"}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(0, arrays, {})
        restored, _ = checkpoints.restore(0, jax.eval_shape(lambda: arrays))
    assert_same(restored, arrays)


def test_names_on_disk_are_the_paths(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, everything(), {})
    record = json.loads((tmp_path / "c/1/host/metadata").read_text())
    assert record["index"]["model/linear/kernel"] == [[3, 2, 3], "float32"]
    assert {"optimizer/0/mu/scale", "keys_B", "numpy/2"} <= record["index"].keys()
    on_disk = json.loads((tmp_path / "c/1/arrays/_METADATA").read_text())["tree_metadata"]
    assert any("model/linear/kernel" in name for name in on_disk)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_float_bits_survive(tmp_path_factory, data):
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
    array = np.array(words, np.uint32).view(np.float32)
    with Checkpoints(tmp_path_factory.mktemp("c")) as checkpoints:
        checkpoints.save(0, {"x": array}, {})
        restored, _ = checkpoints.restore(0, {"x": array})
    assert restored["x"].tobytes() == array.tobytes()


def test_restored_arrays_can_be_donated_and_do_not_compile_anew(tmp_path):
    step = jax.jit(lambda x_N: x_N * 2, donate_argnums=0)
    x_N = step(jnp.arange(4.0))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(0, {"x": x_N}, {})
        restored, _ = checkpoints.restore(0, {"x": x_N})
        again, _ = checkpoints.restore(0, {"x": x_N})
    assert restored["x"].committed == x_N.committed
    before = step._cache_size()
    assert step(restored["x"]).tolist() == [0, 4, 8, 12]
    assert step._cache_size() == before
    assert again["x"].tolist() == [0, 2, 4, 6]


def test_what_is_saved_may_change_at_once(tmp_path):
    clobber = jax.jit(lambda x_N: x_N * 0 - 1, donate_argnums=0)
    host = {"list": [1, 2]}
    numpy_N = np.arange(100_000.0)
    jax_N = jnp.arange(100_000.0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(0, {"jax": jax_N, "numpy": numpy_N}, host)
        clobber(jax_N)
        numpy_N[:] = -1
        host["list"].append(3)
        like = {"jax": jax.ShapeDtypeStruct((100_000,), jnp.float32), "numpy": numpy_N}
        restored, restored_host = checkpoints.restore(0, like)
    np.testing.assert_array_equal(restored["jax"], np.arange(100_000.0))
    np.testing.assert_array_equal(restored["numpy"], np.arange(100_000.0))
    assert restored_host == {"list": [1, 2]}


def test_only_the_latest_are_kept_and_steps_rise(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 5, 9):
            checkpoints.save(step, {"x": np.full(2, step)}, {})
        with pytest.raises(ValueError, match=r"step=9 .* it must be larger than 9"):
            checkpoints.save(9, {"x": np.zeros(2)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [5, 9]
        with pytest.raises(Refused, match=r"has no step 1; it has \[5, 9\]"):
            checkpoints.restore(1, {"x": np.zeros(2)})
        with pytest.raises(Refused, match="has no step 1"):
            checkpoints.host(1)


@pytest.mark.parametrize(
    ("like", "line"),
    [
        ({"m": {"w": np.zeros((2, 3), np.float32)}}, "m/w is float32[2,2]; expected float32[2,3]"),
        ({"m": {"w": np.zeros((2, 2), np.int32)}}, "m/w is float32[2,2]; expected int32[2,2]"),
        ({"m": {"v": np.zeros((2, 2), np.float32)}}, "has no m/v; expected float32[2,2]"),
        ({"m": {}}, "has m/w float32[2,2], which is not expected here"),
    ],
)
def test_another_shape_is_refused_with_path_and_leaf(tmp_path, like, line):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, {"m": {"w": np.ones((2, 2), np.float32)}}, {})
        with pytest.raises(Refused, match=re.escape(line)) as refusal:
            checkpoints.restore(3, like)
    assert str(tmp_path / "c" / "3") in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arrays", "host"),
    [({"n": 3}, {}), ({"x": np.ones(2)}, {"rng": object()})],
    ids=["plain number", "host state"],
)
def test_what_cannot_be_saved_is_said_at_once(tmp_path, arrays, host):
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(TypeError, match=r"checkpoint leaf n is a int|not JSON serializable"):
            checkpoints.save(0, arrays, host)
        assert checkpoints.latest() is None


_WRITER = """
import itertools, sys
import numpy as np
from jaxconv.train.checkpoint import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    for step in itertools.count((checkpoints.latest() or 0) + 1):
        noise = np.random.default_rng(step).random((8, 100_000))
        checkpoints.save(step, {"noise": noise, "step": np.int64(step)}, {"step": step})
"""


def test_a_kill_in_the_middle_of_a_save_leaves_a_usable_step(tmp_path):
    folder = tmp_path / "c"
    rng = random.Random(0)
    like = {"noise": np.zeros((8, 100_000)), "step": np.int64(0)}
    reached = 0
    interrupted = 0
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)])
        deadline = time.monotonic() + 60
        # Wait for a new whole step, then for the next save to be under way.
        while not any(
            (path / "commit_success.txt").exists() and int(path.name) > reached
            for path in folder.glob("[0-9]*")
            if path.name.isdecimal()
        ):
            assert time.monotonic() < deadline and writer.poll() is None
        while not list(folder.glob("*tmp*")):
            assert time.monotonic() < deadline and writer.poll() is None
        time.sleep(rng.uniform(0, 0.1))
        writer.kill()
        writer.wait()
        interrupted += bool(list(folder.glob("*tmp*")))
        with Checkpoints(folder) as checkpoints:
            step = checkpoints.latest()
            restored, host = checkpoints.restore(step, like)
        while list(folder.glob("*tmp*")):  # removed in the background
            assert time.monotonic() < deadline
        assert step > reached and host == {"step": step} and restored["step"] == step
        np.testing.assert_array_equal(
            restored["noise"], np.random.default_rng(step).random((8, 100_000))
        )
        reached = step
    assert interrupted, "no kill fell into a save"


def test_sharded_arrays_come_back_sharded(tmp_path):
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxconv.train.checkpoint import Checkpoints
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
layout = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
keys = jax.random.split(jax.random.key(0), 8)
keys = jax.device_put(keys, jax.NamedSharding(mesh, jax.P("fsdp")))
arrays = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), layout), "keys": keys}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(0, arrays, {})
    restored, _ = checkpoints.restore(0, arrays)
    other = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=other), "keys": keys}
    moved, _ = checkpoints.restore(0, like)
for name in arrays:
    assert restored[name].sharding == arrays[name].sharding, name
assert moved["w"].sharding == other
assert np.array_equal(restored["w"], arrays["w"]) and np.array_equal(moved["w"], arrays["w"])
assert np.array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(keys))
print("same")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert run.stdout == "same\n", run.stderr
