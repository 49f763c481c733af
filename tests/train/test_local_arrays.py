"""Arrays in a file of one process: bit for bit, whole or not there, told by their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.train import local_arrays


def arrays():
    noise = np.random.default_rng(0).normal(size=(2, 3)).astype("f4")
    return {
        "cache": [jnp.asarray(noise, jnp.bfloat16), noise],
        "speaking": np.array([True, False]),
        "steps": np.int32(7),
        "nothing": np.zeros((0, 4), np.uint32),
    }


def test_what_is_read_is_what_was_written(tmp_path):
    saved, path = arrays(), tmp_path / "folder" / "3.1"
    local_arrays.save(path, saved)
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, saved))
    assert local_arrays.fits(path, like)
    found = local_arrays.load(path, like)
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == np.asarray(other).tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["3.1"]


def test_other_shapes_and_a_missing_file_do_not_fit(tmp_path):
    saved = arrays()
    assert not local_arrays.fits(tmp_path / "3.1", saved)
    local_arrays.save(tmp_path / "3.1", saved)
    assert not local_arrays.fits(tmp_path / "3.1", saved | {"steps": np.int16(7)})
    assert not local_arrays.fits(tmp_path / "3.1", saved | {"speaking": np.zeros(3, bool)})


def test_a_save_that_fails_leaves_the_file_before(tmp_path):
    saved, path = arrays(), tmp_path / "3.1"
    local_arrays.save(path, saved)
    before = path.read_bytes()

    class Lost:
        shape, dtype = (2,), np.dtype("f4")

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="gone"):
        local_arrays.save(path, [*jax.tree.leaves(saved), Lost()])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["3.1"]
