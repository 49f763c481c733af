"""What every test runs under: the CPU, no network, a shared compile cache, `--slow`."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before any test module imports jax or transformers.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # Most tests compile the same small programs each time.
    from jaxconv.train import compile_cache

    folder = compile_cache.enable()
    if folder is not None:
        # For the processes that tests start.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # A run of the launcher would make a device of every core, if its test came before all others.
    import jax

    jax.devices()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="marked slow: run with --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


# Linux lets a process have 65,530 memory mappings, unless told otherwise, and each compiled program
# takes a few: one process that keeps what 2,500 tests compiled runs out, and XLA then segfaults.
MAX_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs() -> Iterator[None]:
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MAX_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def random_decoder():
    """(config, seed) -> a decoder of random weights, loud enough that what it says differs. NumPy
    makes them, since XLA would compile a program for each shape."""
    import functools

    import jax
    import numpy as np

    from jaxconv.models.decoder import Decoder

    def make(config, seed: int = 0) -> Decoder:
        abstract = jax.eval_shape(functools.partial(Decoder, config), jax.random.key(0))
        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
        rng, weights = np.random.default_rng(seed), []
        for path, leaf in leaves:
            drawn = 0.27 * rng.standard_normal(leaf.shape, np.float32)
            is_scale = "norm" in jax.tree_util.keystr(path)
            weights.append(jax.numpy.asarray(1 + drawn if is_scale else drawn))
        return jax.tree.unflatten(structure, weights)

    return make


@pytest.fixture(autouse=True)
def _seed_global_random_state() -> None:
    """Tests draw from their own generators; a library that does not is at least repeatable."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
