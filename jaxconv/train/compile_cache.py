"""The persistent compile cache, and how long a run spent compiling.

A run of some minutes on a CPU can spend most of them in XLA; started again, it reads the cache.
"""

import hashlib
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class CompileStats:
    """What compiling took since `enable`.

    Attributes:
        compile_s: seconds in XLA, or in reading a finished program from the cache.
        lower_s: seconds from traced functions to StableHLO.
        cache_hits: programs read from the persistent cache.
        cache_misses: programs that XLA compiled and the cache then took.
    """

    compile_s: float = 0.0
    lower_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0

    def __sub__(self, earlier: "CompileStats") -> "CompileStats":
        return CompileStats(
            self.compile_s - earlier.compile_s,
            self.lower_s - earlier.lower_s,
            self.cache_hits - earlier.cache_hits,
            self.cache_misses - earlier.cache_misses,
        )


_stats = CompileStats()
_listening = False


def stats() -> CompileStats:
    """Totals of this process since `enable`; subtract an earlier one for a part of a run."""
    return _stats


def enable() -> Path | None:
    """Turns the cache on and starts counting. Call it before the first compilation.

    `JAX_COMPILATION_CACHE_DIR` is respected; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    The default is a folder of the user for this jax and this CPU: XLA stores machine code, which
    another CPU may not be able to run.

    Returns:
        the folder, None when the cache is off.
    """
    import jax

    _listen()
    if not jax.config.jax_enable_compilation_cache:
        return None
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        folder = str(default_folder())
        jax.config.update("jax_compilation_cache_dir", folder)
    # By default only programs over a second are kept, but hundreds of small ones make a slow start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return Path(folder)


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxconv/xla/<versions>-<host>`, under `~/.cache` without the variable."""
    import jax
    import jaxlib

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jaxconv" / "xla" / f"jax{jax.__version__}-{jaxlib.__version__}-{_host()}"


def _host() -> str:
    """Architecture and a hash of the CPU's model and features."""
    features = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted)]
        features = "\n".join(sorted(set(lines)))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _listen() -> None:
    global _listening
    if _listening:
        return
    import jax.monitoring

    jax.monitoring.register_event_duration_secs_listener(_on_duration)
    jax.monitoring.register_event_listener(_on_event)
    _listening = True


def _on_duration(event: str, seconds: float, **_: str | int) -> None:
    global _stats
    if event == "/jax/core/compile/backend_compile_duration":
        _stats = replace(_stats, compile_s=_stats.compile_s + seconds)
    elif event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        _stats = replace(_stats, lower_s=_stats.lower_s + seconds)


def _on_event(event: str, **_: str | int) -> None:
    global _stats
    if event == "/jax/compilation_cache/cache_hits":
        _stats = replace(_stats, cache_hits=_stats.cache_hits + 1)
    elif event == "/jax/compilation_cache/cache_misses":
        _stats = replace(_stats, cache_misses=_stats.cache_misses + 1)
