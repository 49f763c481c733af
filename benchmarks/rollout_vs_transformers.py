"""Rollout on a CPU: our engine against `generate` of transformers on torch, same small Llama.

    python benchmarks/rollout_vs_transformers.py

Both sides hold the same weights (exported by `save_pretrained`, loaded by `AutoModelForCausalLM`),
take the same batch and sample at temperature 1 with no end token. Each has a process of its own, so
that neither's waiting threads slow the other; rounds are interleaved, so that other work on the
machine disturbs both alike; the table shows medians. We run one engine on each core, each driven by
a thread, and keep the cache of a conversation between its turns; the peer runs with the number of
threads that is fastest for it, and does what its API offers: static batches, one `generate` a turn
with a key-value cache inside the call, and the whole history again at every turn.
First both sides decode greedily, and unless 99 % of their tokens agree nothing is measured.

Needs the `parity` extra. Writes `benchmarks/results/rollout_cpu.json`.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np

import jaxconv
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import DeviceGroup
from jaxconv.models.hf import save_pretrained
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.train import compile_cache
from jaxconv.train.mesh import split_cpu

BATCH = 32
HEARD, SAID = 24, 24  # tokens a turn of the other side and of the model
LONG = 192  # new tokens of one long turn
MIN_AGREEMENT = 0.99  # of greedy tokens: below it the two sides do not run the same model
LENGTHS = (*range(64, 512, 64), *range(512, 2049, 128))  # cache buckets
TURNS = (4, 8, 16, 32)
PEER_TURNS = (4, 8, 16)
CONFIG = DecoderConfig(
    family="llama",
    vocab_size=512,
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=192,
    max_positions=2048,
)


def heard(turns: int, seed: int = 0) -> np.ndarray:
    """What the other side says, [turns, BATCH, HEARD]."""
    return np.random.default_rng(seed).integers(1, CONFIG.vocab_size, (turns, BATCH, HEARD))


class Ours:
    """Conversations of one length on our engines, one a core; every call starts with free slots."""

    def __init__(self, model: Decoder, said: int, turns: int, temperature: float = 1.0):
        self.said, self.turns = said, turns
        tokens = turns * (HEARD + said) + 1
        longest = next(i for i, n in enumerate(LENGTHS) if n >= tokens)
        devices = jax.local_devices()
        slots = BATCH // len(devices)
        shape = EngineShape(
            slots=slots,
            lengths=LENGTHS[: longest + 1],
            burst=min(said, 64),
            leave=1.0,
            prefill_rows=(slots,),
            prefill_tokens=(HEARD,),
        )
        self.engines = [
            Engine(
                CONFIG,
                shape,
                stop_ids=[-1],
                key=jax.random.key(0),
                sampling=Sampling(temperature=temperature),
                group=DeviceGroup((device,)),
            )
            for device in devices
        ]
        weights = unstack(model)
        for engine in self.engines:
            engine.weights = jax.device_put(weights, engine.device)

    def __call__(self, words: np.ndarray) -> np.ndarray:
        """Sampled tokens [turns, BATCH, said]."""
        out = np.zeros((self.turns, BATCH, self.said), np.int32)
        first_rows = range(0, BATCH, BATCH // len(self.engines))
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(
                threads.map(lambda e, row: self._play(e, row, words, out), self.engines, first_rows)
            )
        return out

    def _play(self, engine: Engine, first_row: int, words: np.ndarray, out: np.ndarray) -> None:
        """The conversations of one engine, from row `first_row` of the batch on."""
        engine.reset()
        row, turn = {}, {}
        for at in range(first_row, first_row + engine.shape.slots):
            slot = engine.open(at)
            row[slot], turn[slot] = at, 0
            engine.say(slot, words[0, at].tolist(), self.said)
        while engine.speaking:
            engine.dispatch()
            for done in engine.collect():
                slot = done.slot
                out[turn[slot], row[slot]] = done.tokens
                turn[slot] += 1
                if turn[slot] < self.turns:
                    engine.say(slot, words[turn[slot], row[slot]].tolist(), self.said)


class Peer:
    """The same conversations on transformers; the history is sent again at every turn."""

    def __init__(self, folder: str, said: int, turns: int, temperature: float = 1.0):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.torch, self.said, self.turns = torch, said, turns
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.settings = GenerationConfig(
            max_new_tokens=said,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )

    def __call__(self, words: np.ndarray) -> np.ndarray:
        torch = self.torch
        out = np.zeros((self.turns, BATCH, self.said), np.int32)
        with torch.inference_mode():
            history = torch.empty((BATCH, 0), dtype=torch.long)
            for turn in range(self.turns):
                history = torch.cat([history, torch.from_numpy(words[turn])], dim=1)
                history = self.model.generate(
                    history,
                    attention_mask=torch.ones_like(history),
                    generation_config=self.settings,
                )
                out[turn] = history[:, -self.said :].numpy()
        return out


SIDES = {"ours": Ours, "peer": Peer}
_model = None  # of this process's side: the weights, or the folder they are in
_runs: dict[tuple, Ours | Peer] = {}  # of this process's side, by what they were made with


def enter_ours() -> None:
    """Makes this process our side."""
    global _model
    compile_cache.enable()
    split_cpu()
    _model = Decoder(CONFIG, jax.random.key(0))


def enter_peer(folder: str, threads: int) -> None:
    """Makes this process the peer's side."""
    global _model
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    _model = folder


def play(side: str, said: int, turns: int, temperature: float, seed: int) -> tuple:
    """(seconds, sampled tokens) of one run on this process's side, made when first asked for."""
    key = (said, turns, temperature)
    if key not in _runs:
        _runs[key] = SIDES[side](_model, said, turns, temperature)
    words = heard(turns, seed)
    start = time.perf_counter()
    tokens = _runs[key](words)
    return time.perf_counter() - start, tokens


def process_of(enter, *arguments) -> concurrent.futures.ProcessPoolExecutor:
    """A process that waits for work, one run at a time."""
    return concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=enter, initargs=arguments
    )


def seconds(process, side: str, said: int, turns: int) -> float:
    return process.submit(play, side, said, turns, 1.0, 0).result()[0]


def interleave(processes: dict, cases: dict, rounds: int) -> dict[tuple, list[float]]:
    """Seconds of each case on each side, `rounds` times in turn, after one that is not counted.

    Args:
        processes: by side.
        cases: (name, side) to (tokens said a turn, turns).
    """
    times: dict[tuple, list[float]] = {case: [] for case in cases}
    for counted in [False] + [True] * rounds:
        for (name, side), (said, turns) in cases.items():
            took = seconds(processes[side], side, said, turns)
            if counted:
                times[name, side].append(took)
    return times


def check_agreement(processes: dict) -> float:
    """Share of greedy tokens on which both sides agree over a conversation of four turns."""
    ours, peer = (
        process.submit(play, side, SAID, 4, 0.0, 1).result()[1]
        for side, process in processes.items()
    )
    return float((ours == peer).mean())


def best_threads(folder: str) -> int:
    """Threads of torch with which the peer is quickest: one, or all cores."""
    quickest = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        with process_of(enter_peer, folder, threads) as process:
            quickest[threads] = min(seconds(process, "peer", SAID, 2) for _ in range(4))
    return min(quickest, key=quickest.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/rollout_cpu.json"))
    arguments = parser.parse_args()

    import torch
    import transformers

    cases = {}
    for name, said, turns, peer in (
        ("one long turn", LONG, 1, True),
        *((f"{n} turns", SAID, n, n in PEER_TURNS) for n in TURNS),
    ):
        for side in ("ours", "peer") if peer else ("ours",):
            cases[name, side] = (said, turns)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Decoder(CONFIG, jax.random.key(0)), None, folder)
        threads = best_threads(folder)
        print(f"threads of torch: {threads}")
        with process_of(enter_ours) as ours, process_of(enter_peer, folder, threads) as peer:
            processes = {"ours": ours, "peer": peer}
            agreement = check_agreement(processes)
            print(f"greedy tokens on which both sides agree: {agreement:.4f}")
            if agreement < MIN_AGREEMENT:
                sys.exit(f"agreement is {agreement:.4f}; it must be at least {MIN_AGREEMENT}")
            times = interleave(processes, cases, arguments.rounds)

    def row(name: str, said: int, turns: int) -> dict:
        out = {"name": name, "turns": turns, "new_tokens": BATCH * said * turns}
        for side in ("ours", "peer"):
            if (name, side) in times:
                median = statistics.median(times[name, side])
                out[side] = {
                    "seconds": median,
                    "tokens_per_s": out["new_tokens"] / median,
                    "ms_per_turn": 1e3 * median / turns,
                    "all_seconds": times[name, side],
                }
        if "peer" in out:
            pairs = zip(times[name, "ours"], times[name, "peer"], strict=True)
            out["ratio"] = statistics.median(theirs / own for own, theirs in pairs)
        return out

    rows = [row("one long turn", LONG, 1), *(row(f"{n} turns", SAID, n) for n in TURNS)]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "python": platform.python_version(),
            "jaxconv": jaxconv.__version__,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "batch": BATCH,
            "heard_per_turn": HEARD,
            "said_per_turn": SAID,
            "long_turn": LONG,
            "rounds": arguments.rounds,
            "torch_threads": threads,
            "model": dataclasses.asdict(CONFIG),
        },
        "greedy_agreement": agreement,
        "rows": rows,
    }
    _print_table(rows)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def _print_table(rows: list[dict]) -> None:
    head = ("", "ours tok/s", "peer tok/s", "ratio", "ours s", "ours ms/turn", "peer ms/turn")
    print("{:<14}{:>12}{:>12}{:>8}{:>9}{:>14}{:>14}".format(*head))
    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        print(
            f"{row['name']:<14}{ours['tokens_per_s']:>12.0f}"
            f"{format(peer['tokens_per_s'], '.0f') if peer else '-':>12}"
            f"{format(row['ratio'], '.1f') + '×' if peer else '-':>8}"
            f"{ours['seconds']:>9.3f}{ours['ms_per_turn']:>14.1f}"
            f"{format(peer['ms_per_turn'], '.1f') if peer else '-':>14}"
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
