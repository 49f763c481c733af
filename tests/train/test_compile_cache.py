"""The persistent compile cache: where it is, that it is used, and what is counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

from jaxconv.train import compile_cache

_PROGRAM = """
import json
from jaxconv.train import compile_cache
folder = compile_cache.enable()
import jax, jax.numpy as jnp
before = compile_cache.stats()
jax.jit(lambda x: jnp.tanh(x) @ x.T + 41)(jnp.ones((7, 7))).block_until_ready()
spent = compile_cache.stats() - before
cache = [spent.cache_hits, spent.cache_misses]
print(json.dumps([str(folder), spent.compile_s, spent.lower_s, *cache]))
"""


def run(**environment):
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_small_programs_are_cached_for_the_next_process(tmp_path):
    folder, compile_s, lower_s, hits, misses = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(str(tmp_path / "jaxconv" / "xla" / "jax"))
    assert compile_s > 0 and lower_s > 0
    assert hits == 0 and misses >= 1
    assert len(list(Path(folder).glob("*-cache"))) >= misses
    again = run(XDG_CACHE_HOME=str(tmp_path))
    assert again[3] == misses and again[4] == 0


def test_a_folder_of_the_user_is_respected(tmp_path):
    folder, *_ = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert folder == str(tmp_path / "mine") and list((tmp_path / "mine").iterdir())


def test_it_can_be_turned_off(tmp_path):
    folder, compile_s, _, hits, misses = run(
        XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false"
    )
    assert (folder, hits, misses) == ("None", 0, 0) and compile_s > 0
    assert not list(tmp_path.iterdir())


def test_another_cpu_gets_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = compile_cache.default_folder()
    assert here == compile_cache.default_folder()
    read_text = Path.read_text

    def other_cpu(path, *args, **kwargs):
        text = read_text(path, *args, **kwargs)
        return text.replace("flags\t", "flags\t: amx") if str(path) == "/proc/cpuinfo" else text

    monkeypatch.setattr(Path, "read_text", other_cpu)
    if Path("/proc/cpuinfo").exists():
        assert compile_cache.default_folder() != here
