"""Compiles the GPU kernels for a GPU that is not there and prints what each takes of it.

Wants the CUDA plugin of jax (the extra `cuda`) and a target config: the description of the GPU as a
text proto `stream_executor.GpuTargetConfigProto`, which XLA's sources have for many GPUs under
`xla/backends/gpu/target_config/specs`, such as `h200.txtpb`. The kernels are for Hopper GPUs.

A row of the table is a kernel: registers of a thread, bytes that spill to memory, shared memory of
a program, and how many programs a multiprocessor has room for at once.
"""

import argparse
import dataclasses
import os
import re
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxconv_kernels import sample
from jaxconv_kernels.decode_attention import gpu

# Rows, vocabulary, dtype, whether masked. A row of a small batch is read by several programs.
SAMPLERS = [
    (256, 151_936, "float32", False),
    (256, 151_936, "bfloat16", True),
    (3, 50_257, "bfloat16", False),
    (64, 262_144, "float32", True),
]
# Rows, query heads, key heads, keys, width of a head, window, soft cap.
ATTENTIONS = [
    (64, 14, 2, 2048, 64, None, None),
    (32, 28, 4, 32_768, 128, None, None),
    (8, 8, 4, 8192, 256, 4096, 50.0),
]
RESERVED_SHARED = 1024  # bytes of each program, for the system


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler says of a kernel.

    Attributes:
        registers: of a thread.
        threads: of a program.
        spilled: bytes stored to and loaded from memory for want of registers.
        shared: bytes of shared memory of a program.
    """

    registers: int
    threads: int
    spilled: int
    shared: int

    def programs(self, registers: int, shared: int) -> int:
        """That a multiprocessor of so many registers and bytes of shared memory has room for."""
        # Registers are given to a warp of 32 threads, 256 at a time.
        taken = -(-self.registers * 32 // 256) * 256 * self.threads // 32
        return min(registers // taken, shared // (self.shared + RESERVED_SHARED))


def compiled(call, *shapes, device) -> list[Kernel]:
    """Compiles a call of arrays (shape, dtype) and describes its kernels, in the order they run."""
    sharding = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        jax.jit(call).lower(*arrays).compile()
        return [described(path) for path in sorted(Path(folder).glob("*.ptxas"))]


def described(ptxas: Path) -> Kernel:
    """A kernel from what the assembler said of it; what else was dumped lies beside that.

    Raises:
        SystemExit: it says something else than it used to.
    """
    said, ptx = ptxas.read_text(), ptxas.with_suffix(".ptx").read_text()
    resources = ptxas.with_suffix(".resources.txt").read_text()

    def number(pattern, text):
        found = re.search(pattern, text)
        if found is None:
            raise SystemExit(
                f"{ptxas.name} has no {pattern!r}; this version of jax says it otherwise"
            )
        return int(found[1])

    return Kernel(
        registers=number(r"Used (\d+) registers", said),
        threads=number(r"\.maxntid (\d+)", ptx),
        spilled=number(r"(\d+) bytes spill stores", said)
        + number(r"(\d+) bytes spill loads", said),
        shared=number(r"smem_scratch_bytes=(\d+)", resources),
    )


def sampler(rows: int, vocab: int, dtype: str, masked: bool):
    """(call, shape, …) of the sampler."""

    def call(logits, key_data, temperature, top_k, top_p, min_p, *mask):
        return sample(
            logits,
            jax.random.wrap_key_data(key_data, impl="threefry2x32"),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            mask=mask[0] if mask else None,
            implementation="gpu",
        )

    numbers = [((rows,), kind) for kind in ("float32", "int32", "float32", "float32")]
    words = [((rows, -(-vocab // 32)), "uint32")] if masked else []
    return call, ((rows, vocab), dtype), ((rows, 2), "uint32"), *numbers, *words


def attention(rows, heads, kv_heads, keys, width, window, softcap):
    """(call, shape, …) of decode attention."""

    def call(*arrays):
        return gpu.attend(*arrays, scale=0.1, window=window, softcap=softcap)

    cache = (rows, kv_heads, keys, width), "bfloat16"
    return call, ((rows, heads, width), "bfloat16"), cache, cache, ((rows,), "int32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target-config", type=Path, required=True, help="text proto that describes the GPU"
    )
    # Nothing runs on a GPU, so none is looked for; and what is not compiled is not dumped.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    config = parser.parse_args().target_config.read_text(encoding="utf-8")
    (device,) = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=config
    ).devices

    def of_multiprocessor(name: str) -> int:
        return int(re.search(rf"\b{name}: (\d+)", config)[1])

    room = (
        of_multiprocessor("registers_per_core_limit"),
        of_multiprocessor("shared_memory_per_core"),
    )
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'kernel':<16}{'of':<46}{'registers':>10}{'spilled':>9}{'shared':>9}{'programs':>10}")
    cases = [
        (("sample: read", "sample: draw", "sample: exact"), case, sampler(*case))
        for case in SAMPLERS
    ]
    cases += [(("decode attention",), case, attention(*case)) for case in ATTENTIONS]
    for names, case, arguments in cases:
        for name, kernel in zip(names, compiled(*arguments, device=device), strict=True):
            print(
                f"{name:<17}{', '.join(map(str, case)):<45}{kernel.registers:>10}"
                f"{kernel.spilled:>9}{kernel.shared:>9}{kernel.programs(*room):>10}",
                flush=True,
            )


if __name__ == "__main__":
    main()
