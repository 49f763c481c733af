"""One decode step's attention: ours against forms that read the whole cache.

    python kernels/bench/decode_attention.py            shapes of decoding on an accelerator
    python kernels/bench/decode_attention.py --quick    those that a CPU can do in a minute
    python kernels/bench/decode_attention.py --out FILE also writes a JSON with machine and versions

Every form writes the new key and value of each row into its cache, in place, and attends one query
a row to the keys that are filled, the same number in every row. `xla` is ours in plain jax.numpy,
which is what a CPU runs; `dpa` is `jax.nn.dot_product_attention` with `key_value_seq_lengths`, on a
cache in its own order of axes; torch is `scaled_dot_product_attention` with a mask, and is measured
where it is installed. Before anything is timed the forms must agree.

Rounds are interleaved, in changing order, so that other work on the machine disturbs all alike; the
table shows medians. `of copy` is the bytes of the filled part of the cache over our time, as a
share of what the machine reads and writes when it adds one to an array.
"""

import argparse
import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxconv_kernels import decode_attention
from machine import copy_bandwidth, no_room, write_report

ROUND_SECONDS = 0.05  # calls of a round go on for about as long
MAX_DISAGREEMENT = {"float32": 1e-4, "bfloat16": 0.05}  # of any number that is attended


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: `filled` of `keys` positions, the new one included, in each row."""

    rows: int
    keys: int
    filled: int
    heads: int
    kv_heads: int
    width: int
    dtype: str

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def filled_bytes(self) -> int:
        """Of the keys and values that are filled."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return 2 * self.rows * self.kv_heads * self.filled * self.width * itemsize

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Float32 query [B, H, h], new key and value [B, K, h], and the keys and the values [K, S,
        h] that the caches of all rows begin with."""
        rng = np.random.default_rng(0)
        own = self.rows, self.kv_heads, self.width
        cache = self.kv_heads, self.keys, self.width
        shapes = (self.rows, self.heads, self.width), own, own, cache, cache
        return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def cases(rows: tuple, keys: tuple, models: tuple, dtype: str) -> list[Case]:
    return [
        Case(b, s, s * percent // 100, *model, dtype)
        for model in models
        for b in rows
        for s in keys
        for percent in (25, 50, 100)
    ]


# Query heads, key heads, width of a head.
MODELS = (14, 2, 64), (28, 4, 128), (32, 8, 128)
CASES = cases((1, 8, 64, 256), (1024, 2048, 4096, 8192), MODELS, "bfloat16")
QUICK = cases((1, 8), (1024, 4096), ((14, 2, 64),), "float32")


def by_lengths(q_BHh, k_BKh, v_BKh, k_BSKh, v_BSKh, position_B, *, scale):
    rows = jnp.arange(len(position_B))
    k_BSKh = k_BSKh.at[rows, position_B].set(k_BKh, unique_indices=True)
    v_BSKh = v_BSKh.at[rows, position_B].set(v_BKh, unique_indices=True)
    out_B1Hh = jax.nn.dot_product_attention(
        q_BHh[:, None], k_BSKh, v_BSKh, scale=scale, key_value_seq_lengths=position_B + 1
    )
    return out_B1Hh[:, 0], k_BSKh, v_BSKh


class JaxForm:
    """A compiled step that takes the caches over and leaves them for the next one.

    Steps go on in a loop on the device, as in a rollout: starting a program may take longer.

    Args:
        keys_first: whether the positions stand before the heads in its cache.
    """

    def __init__(self, case: Case, step: Callable, *, keys_first: bool):
        q, k, v, *caches = (jnp.asarray(x, case.dtype) for x in case.arrays())
        if keys_first:
            caches = [x.swapaxes(0, 1) for x in caches]
        spread = jax.jit(lambda x: jnp.broadcast_to(x, (case.rows, *x.shape)))
        self._caches = [spread(x) for x in caches]
        self._own = q, k, v
        self._position = jnp.full(case.rows, case.filled - 1)

        @functools.partial(jax.jit, donate_argnums=4)
        def call(times, q, k, v, caches, position):
            def once(_, carry):
                q, _, caches = carry
                out, *caches = step(q, k, v, *caches, position, scale=case.scale)
                # Or what does not read the caches would be the same in every step.
                return *jax.lax.optimization_barrier((q, out)), caches

            return jax.lax.fori_loop(0, times, once, (q, jnp.zeros_like(q), caches))[1:]

        self._compiled = call.lower(1, *self._own, self._caches, self._position).compile()

    def __call__(self, times: int = 1) -> jax.Array:
        """Takes the step that often and returns what was attended."""
        out, self._caches = self._compiled(times, *self._own, self._caches, self._position)
        return jax.block_until_ready(out)


class TorchForm:
    """The same in torch, on its GPU where it has one."""

    def __init__(self, case: Case):
        import torch

        self._torch, self._case = torch, case
        device = "cuda" if torch.cuda.is_available() else "cpu"
        q, k, v, *caches = (
            torch.from_numpy(x).to(device, getattr(torch, case.dtype)) for x in case.arrays()
        )
        self._q, self._own = q[:, :, None], (k, v)
        self._caches = [x.repeat(case.rows, 1, 1, 1) for x in caches]
        self._mask = (torch.arange(case.keys, device=device) < case.filled)[None, None, None]

    def __call__(self, times: int = 1):
        """Takes the step that often and returns what was attended."""
        with self._torch.inference_mode():
            for _ in range(times):
                for cache, own in zip(self._caches, self._own, strict=True):
                    cache[:, :, self._case.filled - 1] = own
                out = self._torch.nn.functional.scaled_dot_product_attention(
                    self._q,
                    *self._caches,
                    attn_mask=self._mask,
                    scale=self._case.scale,
                    enable_gqa=True,
                )
        if out.is_cuda:
            self._torch.cuda.synchronize()
        return out[:, :, 0].float().cpu().numpy()


def _forms(case: Case, implementation: str | None) -> dict[str, Callable]:
    """What is measured of a case, by name."""
    steps = {
        "ours": functools.partial(decode_attention, implementation=implementation),
        "xla": functools.partial(decode_attention, implementation="xla"),
        "dpa": by_lengths,
    }
    forms = {
        name: lambda f=f: JaxForm(case, f, keys_first=f is by_lengths) for name, f in steps.items()
    }
    if importlib.util.find_spec("torch") is not None:
        forms["torch"] = lambda: TorchForm(case)
    return forms


def measure(case: Case, rounds: int, implementation: str | None) -> dict:
    """{"seconds": by form, "errors": by form}.

    Raises:
        SystemExit: two forms do not agree.
    """
    made, outputs, errors = {}, {}, {}
    for name, make in _forms(case, implementation).items():
        try:
            form = make()
            outputs[name] = np.asarray(form(), np.float32)
            made[name] = form
        except Exception as error:
            if not no_room(error):
                raise
            errors[name] = "out of memory"
    first = next(iter(outputs), None)
    for name, out in outputs.items():
        far = np.abs(out - outputs[first]).max()
        if not far <= MAX_DISAGREEMENT[case.dtype]:
            raise SystemExit(f"{name} is {far:.2g} away from {first} for {case}")

    times, calls = {name: [] for name in made}, {}
    for name, form in made.items():
        began = time.perf_counter()
        form()
        calls[name] = max(1, int(ROUND_SECONDS / (time.perf_counter() - began)))
    # In a new order every round: torch's threads spin for a while, at the cost of what comes next.
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(made)):
            form = made[name]
            form()
            began = time.perf_counter()
            form(calls[name])
            times[name].append((time.perf_counter() - began) / calls[name])
    return {
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "errors": errors,
    }


def print_row(case: Case, result: dict, bandwidth: float) -> None:
    seconds = result["seconds"]
    heads = f"{case.heads}/{case.kv_heads}x{case.width}"
    line = f"{case.rows:>5}{case.keys:>6}{case.filled:>7} {heads:<9}{case.dtype:<9}"
    if "ours" not in seconds:
        print(line, result["errors"]["ours"])
        return
    own = seconds["ours"]
    line += f"{1e3 * own:>9.3f}{case.filled_bytes / own / bandwidth:>9.2f}"
    for name in ("xla", "dpa", "torch"):
        line += f"{format(seconds[name] / own, '.2f') + 'x' if name in seconds else '-':>12}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what a CPU can do soon")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each measurement")
    parser.add_argument("--implementation", help="of ours; that of the platform if not given")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()

    device = jax.devices()[0]
    bandwidth = copy_bandwidth(arguments.rounds)
    print(f"{device.device_kind}, jax {jax.__version__}, copies {bandwidth / 1e9:.1f} GB/s")
    columns = ("xla/ours", "dpa/ours", "torch/ours")
    print(
        f"{'B':>5}{'S':>6}{'filled':>7} {'heads':<9}{'dtype':<9}{'ours ms':>9}{'of copy':>9}"
        + "".join(f"{name:>12}" for name in columns)
    )
    results = []
    for case in QUICK if arguments.quick else CASES:
        result = measure(case, arguments.rounds, arguments.implementation)
        print_row(case, result, bandwidth)
        results.append({**dataclasses.asdict(case), **result})
    if arguments.out:
        write_report(
            arguments.out,
            machine={"copy_bytes_per_s": bandwidth},
            rounds=arguments.rounds,
            implementation=arguments.implementation,
            cases=results,
        )


if __name__ == "__main__":
    main()
