"""Memory of loading and saving a sharded checkpoint as deep as a 7B model.

    python benchmarks/checkpoint_memory.py

A checkpoint with the layers and the vocabulary share of Qwen2.5-7B, but narrow, is written in
bfloat16 shards. A process of its own then loads it into float32 weights and saves it again, and
reads its peak resident memory after either. The bounds: loading holds the float32 weights and one
shard at most, saving adds one shard at most. Exits with an error where one does not hold. Linux
only: the peaks are `VmHWM` of /proc, which, unlike `ru_maxrss`, a process does not inherit from the
one that started it and may reset.

Writes `benchmarks/results/checkpoint_memory.json`.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import jaxconv
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.hf import checkpoint_tensors, load_pretrained, save_pretrained
from jaxconv.models.hf_config import to_hf_dict
from jaxconv.models.safetensors_io import Tensor, write_json, write_tensors

MB = 1e6
SLACK = 16 * MB  # of the allocator, the compiler and the interpreter


def reduced(embed_dim: int) -> DecoderConfig:
    """Qwen2.5-7B with `embed_dim` for its 3584 and everything else but the depth in proportion."""
    return DecoderConfig(
        family="qwen2",
        vocab_size=152064 * embed_dim // 3584,
        embed_dim=embed_dim,
        num_layers=28,
        num_heads=4,
        num_kv_heads=1,
        head_dim=embed_dim // 4,
        mlp_dim=18944 * embed_dim // 3584,
        max_positions=64,
        attention_bias=True,
        stored_dtype="bfloat16",
    )


def write_random(config: DecoderConfig, folder: Path, shard_bytes: float) -> None:
    """A checkpoint of random weights, made tensor by tensor."""
    rng = np.random.default_rng(0)
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    tensors = (
        Tensor(x.name, x.shape, x.dtype, lambda x=x: rng.standard_normal(x.shape, np.float32))
        for x in checkpoint_tensors(model, config.stored_dtype)
    )
    folder.mkdir()
    write_json(folder / "config.json", to_hf_dict(config))
    write_tensors(folder, tensors, shard_bytes)


def peak(*, reset: bool = False) -> float:
    """Peak resident bytes of this process since the last reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return 1024.0 * int(line.split()[1])


def load_and_save(folder: Path, copy: Path, shard_bytes: float) -> dict[str, float]:
    """Bytes that loading and saving add to what the process has at the time."""
    # The compiler and what else is loaded at first use is there before anything is measured.
    small = copy.with_name("small")
    save_pretrained(jax.jit(Decoder, static_argnums=0)(reduced(64), jax.random.key(0)), None, small)
    load_pretrained(small)
    peak(reset=True)
    before = peak()
    model, _ = load_pretrained(folder)
    jax.block_until_ready(model)
    loading = peak(reset=True) - before
    loaded = peak()
    save_pretrained(model, None, copy, max_shard_bytes=shard_bytes)
    return {"load": loading, "loaded": loaded - before, "save": peak() - loaded}


def measure(embed_dim: int, shard_bytes: float) -> dict[str, float]:
    """Sizes and peaks in bytes, from a fresh process, and whether the copy is the original."""
    config = reduced(embed_dim)
    with tempfile.TemporaryDirectory() as scratch:
        folder, copy = Path(scratch) / "original", Path(scratch) / "copy"
        write_random(config, folder, shard_bytes)
        command = [sys.executable, __file__, "--measure", folder, copy, str(shard_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        same = all((folder / x).read_bytes() == (copy / x).read_bytes() for x in files)
    weights = 4.0 * config.num_parameters
    return json.loads(done.stdout) | {"weights": weights, "files": len(files), "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embed-dim", type=int, default=512, help="width in place of 3584")
    parser.add_argument("--shards", type=int, default=6, help="about so many files")
    parser.add_argument(
        "--out", default=str(Path(__file__).parent / "results/checkpoint_memory.json")
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, copy, shard_bytes = arguments.measure
        print(json.dumps(load_and_save(Path(folder), Path(copy), float(shard_bytes))))
        return
    shard = 2.0 * reduced(arguments.embed_dim).num_parameters / arguments.shards
    found = measure(arguments.embed_dim, shard)
    weights, load, save = found["weights"], found["load"], found["save"]
    print(f"float32 weights {weights / MB:7.0f} MB, {found['files']} files of {shard / MB:.0f} MB")
    print(f"loading peak    {load / MB:7.0f} MB, {load / weights:.2f} of the weights")
    print(f"saving adds     {save / MB:7.0f} MB, {save / shard:.2f} of a shard")
    out = Path(arguments.out)
    versions = {"jaxconv": jaxconv.__version__, "jax": jax.__version__}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    about = {"unit": "bytes", "machine": machine, "date": f"{datetime.date.today()}"}
    about["command"] = "python benchmarks/checkpoint_memory.py"
    result = {"embed_dim": arguments.embed_dim, "shard": shard, **found, **about}
    result["versions"] = versions
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"wrote {out}")
    if load > weights + shard + SLACK or save > shard + SLACK or not found["same"]:
        sys.exit("memory or contents are not what they must be")


if __name__ == "__main__":
    main()
