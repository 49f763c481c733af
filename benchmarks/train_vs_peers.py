"""Fine-tuning on a CPU: our update against those of torch/transformers and TRL, same small Llama.

    python benchmarks/train_vs_peers.py

Both sides start from the same weights, learn from the same examples in the same updates, about 16
an update, in float32 with AdamW and clipping. The text is already in tokens. What is timed is all
else: batches from token ids, losses, gradients, optimizer. The peer of SFT is a loop in plain torch
around `AutoModelForCausalLM` (SDPA attention, fused AdamW); that of DPO is the collator and the
`training_step` of `trl.DPOTrainer`, without its default gradient checkpointing and bfloat16. In DPO
both have the reference's log-probs beforehand. Ours is the step of `fine_tuning.fit`.

Only the examples' own tokens count, padding does not; three comparisons of each kind differ in it:

one width   Unpacked. The peer pads all rows to the longest example of the data set; ours pads those
            of an update to a multiple of 64 tokens, so that few shapes are compiled.
unpacked    Ours is the same. The peer pads to the longest stream of its batch, which is what its
            collators do by default.
packed      Ours packs rows of 256 tokens, or as many as the longest example needs. The peer pads
            to the longest stream of its batch.

A pair shares a row on our side, so unpacked its two streams are padded together.

Each side has a process of its own, so that neither's waiting threads slow the other, and both keep
freed memory; rounds are interleaved, so that other work on the machine disturbs both alike; the
table shows medians. Ours is data-parallel over the cores, the peer runs with the number of threads
that is fastest for it in that case. Before anything is timed, losses and gradient norms are
compared: those of the first update, which see the same weights, and losses after three updates.

Needs the `parity` extra. Writes `benchmarks/results/train_cpu.json`.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from train_cases import LARGER, SMALL, Case, cases, up
from train_sides import B2, BETA, CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, Ours, Peer

import jaxconv
from jaxconv.data import token_store
from jaxconv.models.decoder import Decoder
from jaxconv.models.hf import save_pretrained
from jaxconv.train import compile_cache, host_memory
from jaxconv.train.mesh import split_cpu

SAME_START, SAME_AFTER_3 = 1e-4, 1e-3  # how far apart losses may be


# ---------------------------------------------------------------- processes

_runs: dict[tuple, Ours | Peer] = {}  # of this process's side, by what they were made with


def enter_ours() -> None:
    """Makes this process our side."""
    host_memory.keep()
    compile_cache.enable()
    split_cpu()


def enter_peer() -> None:
    """Makes this process the peer's side."""
    import datasets
    import transformers

    host_memory.keep()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers about TRL's settings
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_ours(case: Case, pack: bool) -> tuple[float, list[tuple[float, float]]]:
    """(seconds, numbers of the updates) of one round, on a run made when first asked for."""
    if (case, pack) not in _runs:
        _runs[case, pack] = Ours(case, pack)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of the memory that it takes
        return _timed(_runs[case, pack])


def run_peer(
    case: Case, pack: bool, width: int | None, folder: Path, threads: int
) -> tuple[float, list[tuple[float, float]]]:
    """The same with so many threads of torch."""
    import torch

    torch.set_num_threads(threads)
    key = (case, pack, width)
    if key not in _runs:
        _runs[key] = Peer(case, pack, width, folder)
    return _timed(_runs[key])


def _timed(run) -> tuple[float, list[tuple[float, float]]]:
    start = time.perf_counter()
    numbers = run()
    return time.perf_counter() - start, numbers


def process_of(enter) -> concurrent.futures.ProcessPoolExecutor:
    """A process that waits for work, one run at a time."""
    return concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=enter
    )


# ---------------------------------------------------------------- measurements


class Disagreement(Exception):
    """The two sides do not compute the same."""


def agreement(ours: list[tuple[float, float]], peers: list[tuple[float, float]]) -> dict:
    """How far apart the sides are in the updates of their first round.

    Raises:
        Disagreement: further than they may be.
    """
    found = {
        "first_loss": abs(ours[0][0] - peers[0][0]),
        "first_gradient_norm": abs(ours[0][1] / peers[0][1] - 1),
        "loss_after_3": abs(ours[3][0] - peers[3][0]),
    }
    allowed = dict(zip(found, (SAME_START, SAME_AFTER_3, SAME_AFTER_3), strict=True))
    for name, difference in found.items():
        if not difference <= allowed[name]:
            raise Disagreement(f"{name} differs by {difference:.2e}; at most {allowed[name]:.0e}")
    return found


def measure(case: Case, processes: dict, folder: Path, rounds: int) -> list[dict]:
    """The rows of the table for one case.

    Args:
        processes: "ours" and "peer".
        folder: of the weights.
    """
    cores = len(os.sched_getaffinity(0))
    longest = up(token_store.load(case.store).stream_lengths.max(), 16)
    peers = {"one width": (False, longest), "unpacked": (False, None), "packed": (True, None)}

    def ours(pack: bool):
        return processes["ours"].submit(run_ours, case, pack).result()

    def peer(name: str, threads: int):
        return processes["peer"].submit(run_peer, case, *peers[name], folder, threads).result()

    first = {pack: ours(pack)[1] for pack in (False, True)}
    agreed = {name: agreement(first[peers[name][0]], peer(name, 1)[1]) for name in peers}
    threads = {
        name: min(
            sorted({1, cores}), key=lambda n, name=name: min(peer(name, n)[0] for _ in range(2))
        )
        for name in peers
    }
    times: dict = {key: [] for key in (*first, *peers)}
    for _ in range(rounds):
        for pack in first:
            times[pack].append(ours(pack)[0])
        for name in peers:
            times[name].append(peer(name, threads[name])[0])
    return [
        {
            "model": case.model,
            "data": case.data,
            "method": case.method,
            "padding": name,
            "examples_per_update": statistics.mean(len(p.records) for p in case.placements(pack)),
            "ours": _speed(case, pack, times[pack]) | {"fill": _our_fill(case, pack)},
            "peer": _speed(case, pack, times[name])
            | {"fill": _peer_fill(case, pack, width), "threads": threads[name]},
            "ratio": statistics.median(
                theirs / own for own, theirs in zip(times[pack], times[name], strict=True)
            ),
            "apart": agreed[name],
        }
        for name, (pack, width) in peers.items()
    ]


def _speed(case: Case, pack: bool, seconds: list[float]) -> dict:
    tokens = sum(int(placement.packing.length.sum()) for placement in case.placements(pack))
    median = statistics.median(seconds)
    return {
        "tokens_per_s": tokens / median,
        "ms_per_update": 1e3 * median / case.updates,
        "all_seconds": seconds,
    }


def _our_fill(case: Case, pack: bool) -> float:
    """Share of the cells of all rows that hold a token."""
    packings = [placement.packing for placement in case.placements(pack)]
    return sum(p.length.sum() for p in packings) / sum(p.rows * p.width for p in packings)


def _peer_fill(case: Case, pack: bool, width: int | None) -> float:
    lengths = token_store.load(case.store).stream_lengths
    batches = [lengths[placement.records] for placement in case.placements(pack)]
    cells = sum(batch.size * (width or batch.max()) for batch in batches)
    return sum(batch.sum() for batch in batches) / cells


def compare(todo: Sequence[Case], folder: Path, rounds: int) -> Iterator[dict]:
    """The rows of all cases; each model's weights are kept in `folder`."""
    with process_of(enter_ours) as ours, process_of(enter_peer) as peer:
        for config, group in itertools.groupby(todo, key=lambda case: case.config):
            weights = folder / f"weights {config.embed_dim}"
            save_pretrained(Decoder(config, jax.random.key(0)), None, weights)
            for case in group:
                yield from measure(case, {"ours": ours, "peer": peer}, weights, rounds)


# ---------------------------------------------------------------- what comes out

_LINE = "{:<8}{:<13}{:<8}{:<11}{:>12}{:>12}{:>8}{:>10}{:>10}{:>11}{:>11}{:>9}"
HEAD = _LINE.format(
    *("model", "data", "method", "padding", "ours tok/s", "peer tok/s", "ratio"),
    *("ours ms", "peer ms", "ours fill", "peer fill", "threads"),
)


def line(row: dict) -> str:
    """A row of the table; ms are of an update, fill is the share of cells that hold a token."""
    ours, peer = row["ours"], row["peer"]
    return _LINE.format(
        *(row[name] for name in ("model", "data", "method", "padding")),
        *(f"{side['tokens_per_s']:.0f}" for side in (ours, peer)),
        f"{row['ratio']:.2f}×",
        *(f"{side['ms_per_update']:.1f}" for side in (ours, peer)),
        *(f"{side['fill']:.2f}" for side in (ours, peer)),
        peer["threads"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each measurement")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/train_cpu.json"))
    arguments = parser.parse_args()

    import torch
    import transformers
    import trl

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        print(HEAD)
        try:
            for row in compare(list(cases(Path(folder))), Path(folder), arguments.rounds):
                rows.append(row)
                print(line(row), flush=True)
        except Disagreement as error:
            sys.exit(f"the two sides do not compute the same: {error}")
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "python": platform.python_version(),
            "jaxconv": jaxconv.__version__,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "settings": {
            "rounds": arguments.rounds,
            "learning_rate": LEARNING_RATE,
            "b2": B2,
            "weight_decay": WEIGHT_DECAY,
            "clip_norm": CLIP_NORM,
            "beta": BETA,
            "models": {"small": dataclasses.asdict(SMALL), "larger": dataclasses.asdict(LARGER)},
        },
        "rows": rows,
    }
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
