"""Log-probs of chosen tokens, forward and backward: ours against forms that hold all logits.

    python kernels/bench/linear_logprob.py            shapes of training on one accelerator
    python kernels/bench/linear_logprob.py --quick    those that a CPU can do in a minute
    python kernels/bench/linear_logprob.py --out FILE also writes a JSON with machine and versions

Every form gives the sum of the negative log-probs and its gradients by the hidden states and by the
head, from products in the dtype of the case that are summed in float32. Ours also makes the
entropies. Before anything is timed the sums must agree. Rounds are interleaved, so that other work
on the machine disturbs all alike; the table shows medians, and each form over the naive one.

naive is `jax.nn.log_softmax`, optax its `softmax_cross_entropy_with_integer_labels`; torch and
tokamax are measured where they are installed. Temporary memory is what the compiler asks for beside
arguments and results, for torch on a GPU the peak of its allocator, on a CPU unknown.
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
import optax
from jaxconv_kernels import linear_logprob
from machine import no_room, write_report

MAX_DISAGREEMENT = 2e-3  # of the sums, relative


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one measurement: hidden [tokens, width], head [width, vocab]."""

    tokens: int
    width: int
    vocab: int
    dtype: str

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hidden, head, targets) in float32, with logits of unit size."""
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((self.tokens, self.width), np.float32)
        head = rng.standard_normal((self.width, self.vocab), np.float32) / self.width**0.5
        return hidden, head, rng.integers(0, self.vocab, self.tokens, np.int32)


CASES = [
    *(Case(tokens, 1024, 151_936, "bfloat16") for tokens in (1024, 8192, 32_768)),
    *(Case(tokens, 4096, 151_936, "bfloat16") for tokens in (1024, 8192, 32_768)),
    Case(8192, 4096, 128_256, "bfloat16"),
    Case(8192, 2304, 262_144, "bfloat16"),
    Case(8192, 1024, 151_936, "float32"),
]
QUICK = [Case(1024, 128, 32_000, "float32"), Case(1280, 64, 151_936, "float32")]


def _logits(hidden, head):
    return jnp.dot(hidden, head, preferred_element_type=jnp.float32)


def ours(hidden, head, targets):
    return -linear_logprob(hidden, head, targets)[0].sum()


def naive(hidden, head, targets):
    logp = jax.nn.log_softmax(_logits(hidden, head))
    return -jnp.take_along_axis(logp, targets[:, None], axis=-1).sum()


def optax_loss(hidden, head, targets):
    logits = _logits(hidden, head)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()


def tokamax_loss(hidden, head, targets):
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, head, reduction="sum")


class JaxForm:
    """A compiled loss, and its value and gradients.

    Raises:
        jax.errors.JaxRuntimeError: at any step, where the device has too little memory.
    """

    def __init__(self, case: Case, loss: Callable):
        self._arrays = [
            jnp.asarray(x, case.dtype if x.dtype == np.float32 else None) for x in case.arrays()
        ]
        step = jax.value_and_grad(loss, argnums=(0, 1))
        self._compiled = {
            name: jax.jit(f).lower(*self._arrays).compile()
            for name, f in (("forward", loss), ("step", step))
        }

    def temporary_bytes(self) -> int | None:
        return self._compiled["step"].memory_analysis().temp_size_in_bytes

    def __call__(self, part: str) -> float:
        """Runs "forward" or "step" to the end and returns the sum."""
        out = jax.block_until_ready(self._compiled[part](*self._arrays))
        return float(out if part == "forward" else out[0])


class TorchForm:
    """The same in torch, on its GPU where it has one.

    Raises:
        torch.OutOfMemoryError: at any step, where the device has too little memory.
    """

    def __init__(self, case: Case):
        import torch

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, case.dtype)
        hidden, head, targets = (torch.from_numpy(x).to(self._device) for x in case.arrays())
        self._hidden, self._head = (x.to(dtype).requires_grad_() for x in (hidden, head))
        self._targets = targets.long()

    def temporary_bytes(self) -> int | None:
        if self._device == "cpu":
            return None
        torch = self._torch
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self("step")
        gradients = sum(x.numel() * x.element_size() for x in (self._hidden, self._head))
        return torch.cuda.max_memory_allocated() - before - gradients

    def __call__(self, part: str) -> float:
        """Runs "forward" or "step" to the end and returns the sum."""
        torch = self._torch
        with torch.set_grad_enabled(part == "step"):
            logits = (self._hidden @ self._head).float()
            loss = torch.nn.functional.cross_entropy(logits, self._targets, reduction="sum")
        if part == "step":
            torch.autograd.grad(loss, (self._hidden, self._head))
        if self._device == "cuda":
            torch.cuda.synchronize()
        return loss.item()


def _forms(case: Case) -> dict[str, Callable[[], JaxForm | TorchForm]]:
    """What is measured here, by name; the naive form comes first."""
    forms = {
        name: lambda loss=loss: JaxForm(case, loss)
        for name, loss in (("naive", naive), ("ours", ours), ("optax", optax_loss))
    }
    if importlib.util.find_spec("torch") is not None:
        forms["torch"] = lambda: TorchForm(case)
    if importlib.util.find_spec("tokamax") is not None:
        forms["tokamax"] = lambda: JaxForm(case, tokamax_loss)
    return forms


def measure(case: Case, rounds: int) -> list[dict]:
    """One row a form: {"form", "forward_s", "step_s", "temporary_bytes"}, or {"form", "error"}.

    Raises:
        SystemExit: the sums of two forms do not agree.
    """
    made, sums, errors = {}, {}, {}
    for name, make in _forms(case).items():
        try:
            form = make()
            sums[name] = form("forward"), form("step")
            made[name] = form, form.temporary_bytes()
        except Exception as error:
            if not no_room(error):
                raise
            errors[name] = "out of memory"
    expected = next(iter(sums.values()), (0.0, 0.0))[0]
    for name, values in sums.items():
        for got in values:
            if not abs(got - expected) <= MAX_DISAGREEMENT * abs(expected):
                raise SystemExit(f"{name} gives {got} for {case}; {next(iter(sums))} {expected}")

    times = {(name, part): [] for name in made for part in ("forward", "step")}
    for _ in range(rounds):
        for name, part in times:
            began = time.perf_counter()
            made[name][0](part)
            times[name, part].append(time.perf_counter() - began)
    rows = [
        {
            "form": name,
            "forward_s": statistics.median(times[name, "forward"]),
            "step_s": statistics.median(times[name, "step"]),
            "temporary_bytes": temporary,
        }
        for name, (_, temporary) in made.items()
    ]
    return rows + [{"form": name, "error": error} for name, error in errors.items()]


def print_table(case: Case, rows: list[dict]) -> None:
    naive_row = next((row for row in rows if row["form"] == "naive" and "error" not in row), None)

    def ratio(row: dict, field: str) -> str:
        if naive_row is None or row[field] is None:
            return "-"
        return f"{row[field] / naive_row[field]:.2f}"

    print(f"\n{case.tokens} x {case.width} x {case.vocab} {case.dtype}")
    head = ("", "forward ms", "/naive", "fwd+bwd ms", "/naive", "temporary MB", "/naive")
    print("{:<16}{:>12}{:>8}{:>12}{:>8}{:>14}{:>8}".format(*head))
    for row in rows:
        if "error" in row:
            print(f"{row['form']:<16}{row['error']:>20}")
            continue
        temporary = row["temporary_bytes"]
        print(
            f"{row['form']:<16}{1e3 * row['forward_s']:>12.2f}{ratio(row, 'forward_s'):>8}"
            f"{1e3 * row['step_s']:>12.2f}{ratio(row, 'step_s'):>8}"
            f"{'-' if temporary is None else format(temporary / 1e6, '.0f'):>14}"
            f"{ratio(row, 'temporary_bytes'):>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what a CPU can do in a minute")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()

    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    results = []
    for case in QUICK if arguments.quick else CASES:
        rows = measure(case, arguments.rounds)
        print_table(case, rows)
        results.append({**dataclasses.asdict(case), "forms": rows})
    if arguments.out:
        write_report(arguments.out, rounds=arguments.rounds, cases=results)


if __name__ == "__main__":
    main()
