"""What every test runs under: the CPU, no network, a shared compile cache, `--slow`."""

import os

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="marked slow: run with --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed_global_random_state() -> None:
    """Tests draw from their own generators; a library that does not is at least repeatable."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
