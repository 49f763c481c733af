"""Drawing a token a row, with its log-probs: ours against samplers that sort, bisect or add noise.

    python kernels/bench/sampling.py            shapes of decoding on an accelerator
    python kernels/bench/sampling.py --quick    those that a CPU can do in two minutes
    python kernels/bench/sampling.py --out FILE also writes a JSON with machine and versions

Every form gives a token and its log-prob under the raw and under the filtered distribution, and
takes temperature, top-k, top-p and min-p as data of each row. `sort` is `lax.top_k` of the whole
row and a cumulative sum; `bisection` halves the range of both thresholds bit by bit, some 65 passes
over the logits, and draws by `jax.random.categorical`, which alone is `categorical`, measured where
nothing is filtered. torch sorts, and is measured where it is installed.

`peaked` logits fall by Zipf's law of exponent 1.5, as those of language models do; `flat` ones are
standard normal, of which top-p keeps thousands: there our lists of candidates are not enough, and
the number of rows that took the exact passes is shown. Before anything is timed, our tokens must be
those of the bisection in filtered rows, and the tokens of the others must lie in what we keep.

Rounds are interleaved, so that other work on the machine disturbs all alike; the table shows
medians. `of copy` is the bytes of the logits over our time, as a share of what the machine reads
and writes when it adds one to an array: near 1 a single reading of the logits is all it takes.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxconv_kernels import sample
from jaxconv_kernels.sampling import spec
from machine import copy_bandwidth, no_room, write_report

LEAST_AGREEMENT = 0.99  # of our tokens with the bisection's, where rows are filtered
ROUND_SECONDS = 0.02  # calls of a round go on for about as long
SLOW_SECONDS = 0.5  # forms that take longer get a single round


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    rows: int
    vocab: int
    dtype: str
    logits: str  # "peaked" or "flat"
    filters: str  # "none", "top_p" or "mixed"

    def arrays(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(float32 logits [rows, vocab], parameters [rows] each)."""
        rng = np.random.default_rng(0)
        if self.logits == "flat":
            x = rng.standard_normal((self.rows, self.vocab), np.float32)
        else:
            falling = (-1.5 * np.log(np.arange(1, self.vocab + 1))).astype(np.float32)
            x = np.stack([rng.permutation(falling) for _ in range(self.rows)])
        row = np.arange(self.rows)
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        on = {
            "none": {},
            "top_p": {"top_p": 0.95},
            "mixed": {
                "temperature": np.array([0.7, 1.0])[row % 2],
                "top_k": np.array([0, 20, 50])[row % 3],
                "top_p": np.array([0.9, 0.95, 0.95, 1.0])[row % 4],
                "min_p": np.array([0, 0, 0.02])[(row + 1) % 3],
            },
        }[self.filters]
        return x, {
            name: np.broadcast_to(value, row.shape).astype(
                np.int32 if name == "top_k" else np.float32
            )
            for name, value in (off | on).items()
        }


def cases(rows: tuple, vocabs: tuple, dtypes: tuple) -> list[Case]:
    return [
        Case(b, v, dtype, logits, filters)
        for dtype in dtypes
        for v in vocabs
        for b in rows
        for logits in ("peaked", "flat")
        for filters in ("none", "top_p", "mixed")
    ]


CASES = cases((1, 8, 64, 256, 1024), (32_000, 128_256, 151_936, 262_144), ("float32", "bfloat16"))
QUICK = [*cases((8, 64), (32_000,), ("float32",)), *cases((64,), (151_936,), ("float32",))]


def _pick(x_BV, at_B):
    return jnp.take_along_axis(x_BV, at_B[:, None], axis=-1)[:, 0]


def sort(x, keys, *, temperature, top_k, top_p, min_p):
    x = x.astype(jnp.float32)
    vocab = x.shape[1]
    z, index = jax.lax.top_k(x / temperature[:, None], vocab)
    kth = _pick(z, jnp.where(top_k > 0, top_k, vocab) - 1)
    p = jax.nn.softmax(jnp.where(z >= kth[:, None], z, -jnp.inf))
    kept = (jnp.cumsum(p, axis=-1) - p < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1])
    z = jnp.where(kept & (p > 0), z, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, z)
    token = _pick(index, rank)
    return token, _pick(jax.nn.log_softmax(x), token), _pick(jax.nn.log_softmax(z), rank)


def bisection(x, keys, *, temperature, top_k, top_p, min_p):
    x = x.astype(jnp.float32)
    peak = x.max(-1, keepdims=True)
    z = (x - peak) * (1 / temperature)[:, None]
    key, highest = spec.ordered(x), spec.ordered(peak[:, 0])

    def halve(holds, low, high):
        def step(_, bounds):
            low, high = bounds
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            yes = holds(middle)
            return jnp.where(yes, low, jnp.minimum(middle + 1, high)), jnp.where(yes, middle, high)

        return jax.lax.fori_loop(0, 32, step, (low, high))[1]

    lowest = jnp.full_like(highest, spec.ordered(jnp.float32(-jnp.inf)))
    k = jnp.where(top_k > 0, top_k, x.shape[1])
    kth = halve(lambda t: jnp.sum(key >= t[:, None], axis=-1) < k, lowest, highest + 1) - 1
    mass = jnp.where(key >= kth[:, None], jnp.exp(z), 0.0)
    wanted = jnp.where(top_p < 1, top_p * mass.sum(-1), jnp.inf)
    tau = halve(
        lambda t: jnp.sum(jnp.where(key > t[:, None], mass, 0.0), axis=-1) < wanted, kth, highest
    )
    least = peak[:, 0] + temperature * jnp.log(min_p)
    kept = x >= jnp.maximum(spec.from_ordered(tau), least)[:, None]
    z = jnp.where(kept, z, -jnp.inf)
    token = jax.vmap(jax.random.categorical)(keys, z)
    return token, _pick(jax.nn.log_softmax(x), token), _pick(jax.nn.log_softmax(z), token)


def categorical(x, keys, *, temperature, **filters):
    z = x.astype(jnp.float32) / temperature[:, None]
    token = jax.vmap(jax.random.categorical)(keys, z)
    raw = jax.nn.log_softmax(x.astype(jnp.float32))
    return token, _pick(raw, token), _pick(jax.nn.log_softmax(z), token)


class JaxForm:
    """A compiled sampler on the arrays of a case.

    Its calls go on in a loop on the device: starting a program may take longer than a call.
    """

    def __init__(self, case: Case, sampler: Callable):
        x, parameters = case.arrays()
        keys = jax.random.split(jax.random.key(0), case.rows)
        self._arrays = jax.device_put((jnp.asarray(x, case.dtype), keys, parameters))

        @jax.jit
        def call(times, x, keys, parameters):
            def once(_, carry):
                parameters, _ = carry
                # Or every call would be the same one to the compiler.
                return jax.lax.optimization_barrier((parameters, sampler(x, keys, **parameters)))

            drawn = jax.eval_shape(lambda: sampler(x, keys, **parameters))
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), drawn)
            return jax.lax.fori_loop(0, times, once, (parameters, nothing))[1]

        self._compiled = call.lower(1, *self._arrays).compile()

    def __call__(self, times: int = 1):
        """Samples that often and returns the last (token, raw, processed, …)."""
        return jax.block_until_ready(self._compiled(times, *self._arrays))


class TorchForm:
    """The sorting sampler in torch, on its GPU where it has one."""

    def __init__(self, case: Case):
        import torch

        self._torch, self._filtered = torch, case.filters != "none"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x, parameters = case.arrays()
        self._x = torch.from_numpy(x).to(device, getattr(torch, case.dtype))
        self._parameters = {k: torch.from_numpy(v).to(device) for k, v in parameters.items()}

    def __call__(self, times: int = 1):
        """Samples that often and returns the last (token, raw, processed)."""
        for _ in range(times):
            out = self._sample()
        if self._x.is_cuda:
            self._torch.cuda.synchronize()
        return out

    def _sample(self):
        torch, p = self._torch, self._parameters
        x = self._x.float()
        z = x / p["temperature"][:, None]
        if self._filtered:
            z, index = z.sort(dim=-1, descending=True)
            k = torch.where(p["top_k"] > 0, p["top_k"], x.shape[1]).long()
            z = z.masked_fill(z < z.gather(1, k[:, None] - 1), -torch.inf)
            mass = z.softmax(-1)
            above = mass.cumsum(-1) - mass
            out = (above >= p["top_p"][:, None]) | (mass < p["min_p"][:, None] * mass[:, :1])
            z = z.masked_fill(out, -torch.inf)
        rank = torch.multinomial(z.softmax(-1), 1)
        token = index.gather(1, rank) if self._filtered else rank
        raw, processed = x.log_softmax(-1).gather(1, token), z.log_softmax(-1).gather(1, rank)
        return token[:, 0], raw[:, 0], processed[:, 0]


def _forms(case: Case, implementation: str | None) -> dict[str, Callable]:
    """What is measured of a case, by name."""

    def ours(x, keys, **parameters):
        return sample(x, keys, **parameters, implementation=implementation)

    samplers = {"ours": ours, "sort": sort, "bisection": bisection}
    if case.filters == "none":
        samplers["categorical"] = categorical
    forms = {name: lambda f=f: JaxForm(case, f) for name, f in samplers.items()}
    if importlib.util.find_spec("torch") is not None:
        forms["torch"] = lambda: TorchForm(case)
    return forms


def measure(case: Case, rounds: int, implementation: str | None) -> dict:
    """{"seconds": by form, "errors": by form, "fallback_rows"}.

    Raises:
        SystemExit: a form draws tokens that it should not.
    """
    made, outputs, errors = {}, {}, {}
    for name, make in _forms(case, implementation).items():
        try:
            form = make()
            outputs[name] = form()
            made[name] = form
        except Exception as error:
            if not no_room(error):
                raise
            errors[name] = "out of memory"
    if "ours" in outputs:
        _check(case, outputs)

    times, calls = {name: [] for name in made}, {}
    for name, form in made.items():
        began = time.perf_counter()
        form()
        calls[name] = max(1, int(ROUND_SECONDS / (time.perf_counter() - began)))
    for i in range(rounds):
        for name, form in made.items():
            if i and times[name][0] > SLOW_SECONDS:
                continue
            began = time.perf_counter()
            form(calls[name])
            times[name].append((time.perf_counter() - began) / calls[name])
    flags = np.asarray(outputs["ours"].flags) if "ours" in outputs else np.zeros(0, int)
    return {
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "errors": errors,
        "fallback_rows": int(np.count_nonzero(flags & spec.FALLBACK)),
    }


def _check(case: Case, outputs: dict) -> None:
    ours = outputs["ours"]
    x = np.asarray(jnp.asarray(case.arrays()[0], case.dtype).astype(jnp.float32))
    rows = np.arange(case.rows)
    for name, (token, *_) in ((n, out) for n, out in outputs.items() if n != "ours"):
        token = np.asarray(token.cpu() if name == "torch" else token)
        kept = x[rows, token] >= np.asarray(ours.threshold)
        if kept.mean() < LEAST_AGREEMENT:
            raise SystemExit(f"{name} draws tokens of {case} that we do not keep")
        if name == "bisection":
            filtered = np.asarray(ours.flags) & spec.FILTERED > 0
            same = (token == np.asarray(ours.token))[filtered]
            if same.size and same.mean() < LEAST_AGREEMENT:
                raise SystemExit(f"our tokens of {case} are not those of the bisection")


def print_row(case: Case, result: dict, bandwidth: float) -> None:
    seconds = result["seconds"]
    line = f"{case.rows:>5}{case.vocab:>8} {case.dtype:<9}{case.logits:<7}{case.filters:<6}"
    if "ours" not in seconds:
        print(line, result["errors"]["ours"])
        return
    own = seconds["ours"]
    moved = case.rows * case.vocab * jnp.dtype(case.dtype).itemsize
    line += f"{1e3 * own:>9.3f}{moved / own / bandwidth:>9.2f}{result['fallback_rows']:>9}"
    for name in ("sort", "bisection", "categorical", "torch"):
        line += f"{format(seconds[name] / own, '.1f') + 'x' if name in seconds else '-':>13}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what a CPU can do soon")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--implementation", help="of ours; that of the platform if not given")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()

    device = jax.devices()[0]
    bandwidth = copy_bandwidth(arguments.rounds)
    print(f"{device.device_kind}, jax {jax.__version__}, copies {bandwidth / 1e9:.1f} GB/s")
    columns = ("sort/ours", "bisect./ours", "categ./ours", "torch/ours")
    print(
        f"{'B':>5}{'V':>8} {'dtype':<9}{'logits':<7}{'filter':<6}{'ours ms':>9}{'of copy':>9}"
        f"{'fallback':>9}" + "".join(f"{name:>13}" for name in columns)
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
