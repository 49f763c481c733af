"""Kernels without an accelerator: lowering for one, compiling for TPUs, processes of their own."""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

CHIPS = {
    "tpu": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
}
# Calls of Pallas kernels and of cuDNN, which make no promise to run under a later version of jax.
UNCHECKED = [
    export.DisabledSafetyCheck.custom_call(target)
    for target in (
        "mosaic_gpu_v2",
        "__gpu$xla.gpu.triton",
        *(
            f"__cudnn$fmha{bias}Softmax{way}"
            for bias in ("", "ScaleBias")
            for way in ("", "Backward")
        ),
    )
]

# What follows the source of a program that defines `cases`: {name: (call, [(shape, dtype), …])},
# where a call may be compiled by `jax.jit` in a way of its own.
COMPILE = """
import json
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

compiled = {{}}
for chip, topology in {tpus!r}.items():
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    for name, (call, shapes) in cases.items():
        arrays = [
            jax.ShapeDtypeStruct(*shape, sharding=SingleDeviceSharding(device)) for shape in shapes
        ]
        jitted = call if hasattr(call, "lower") else jax.jit(call)
        done = jitted.lower(*arrays).compile()
        compiled.setdefault(name, {{}})[chip] = {{
            "temporary_bytes": done.memory_analysis().temp_size_in_bytes,
            "kernels": done.as_text().count('custom_call_target="tpu_custom_call"'),
        }}
print(json.dumps(compiled))
"""


@dataclasses.dataclass
class Loop:
    """A loop of a compiled TPU kernel.

    Attributes:
        depth: 1 for the loop over the grid, which is in no other.
        bundles: instruction bundles of its body without the loops in it: cycles of a turn, where
            nothing waits and no branch leaves any out.
        operations: instructions in those, by their first name, such as "vsel" or "vpow2".
    """

    depth: int
    bundles: int = 0
    operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)


@pytest.fixture
def lower() -> Callable[..., str]:
    """lower(platform, call, *shapes): the StableHLO of `call` for "tpu" or "cuda"."""

    def lower(platform: str, call: Callable, *shapes: jax.ShapeDtypeStruct) -> str:
        mesh = AbstractMesh((), (), abstract_device=CHIPS[platform])
        with jax.sharding.use_abstract_mesh(mesh):
            exported = export.export(
                jax.jit(call), platforms=[platform], disabled_checks=UNCHECKED
            )(*shapes)
        return exported.mlir_module()

    return lower


@pytest.fixture
def run_program() -> Callable[..., str]:
    """run_program(source, **environment): what a Python of its own prints; it must succeed.

    The number of CPU devices and the loading of libtpu are matters of a whole process.
    """

    def run_program(source: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run_program


@pytest.fixture
def run_with_libtpu(run_program) -> Callable[..., str]:
    """As `run_program`, for programs that compile for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra tpu-aot): nothing compiles for TPUs")

    def run_with_libtpu(source: str, **environment: str) -> str:
        return run_program(
            source, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", **environment
        )

    return run_with_libtpu


@pytest.fixture
def compile_cases_for_tpu(run_with_libtpu) -> Callable[[str], dict[str, dict[str, dict]]]:
    """compile_cases_for_tpu(source): real TPU executables of programs, for every chip of `TPUS`.

    `source` defines `cases`, {name: (call, [(shape, dtype), …])}. For each name and chip comes back
    {"temporary_bytes", "kernels": number of Pallas calls}. What the chip has no room for, or no
    layout, fails as it would there.
    """

    def compile_cases_for_tpu(source: str) -> dict[str, dict[str, dict]]:
        printed = run_with_libtpu(source + COMPILE.format(tpus=TPUS))
        return json.loads(printed.splitlines()[-1])

    return compile_cases_for_tpu


@pytest.fixture
def compile_for_tpu(compile_cases_for_tpu) -> Callable[[str], dict[str, dict[str, int]]]:
    """As `compile_cases_for_tpu` for one: `source` defines `call` and `shapes`."""

    def compile_for_tpu(source: str) -> dict[str, dict[str, int]]:
        return compile_cases_for_tpu(f"{source}\ncases = {{'': (call, shapes)}}\n")[""]

    return compile_for_tpu


@pytest.fixture
def loops_on_v6e(run_with_libtpu) -> Callable[[str, str], list[list[Loop]]]:
    """loops_on_v6e(source, kernel): loops of that Pallas kernel in each of the source's `cases`.

    They come in the order of the program, a loop before those in it.
    """

    def loops_on_v6e(source: str, kernel: str) -> list[list[Loop]]:
        # The dump takes some 70 MB for each program: more than should stay, as `tmp_path` does.
        with tempfile.TemporaryDirectory() as folder:
            run_with_libtpu(
                source + COMPILE.format(tpus={"v6e": TPUS["v6e"]}),
                LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
                JAX_ENABLE_COMPILATION_CACHE="false",  # what is not compiled is not dumped
            )
            # A file's name begins with the time.
            files = sorted(Path(folder).glob(f"*-{kernel}.*-final_bundles.txt"))
            return [
                _loops(path.read_text()) for path in files if "schedule-analysis" not in path.name
            ]

    return loops_on_v6e


def _loops(listing: str) -> list[Loop]:
    """Loops in a listing of final bundles: `address label : depth {operations}`, depth in `>`."""
    found, around = [], []
    for line in listing.splitlines():
        bundle = re.match(r"\s*0x[0-9a-f]+\s+(LB)?(?:L[HE]|P[BF]|CT)?\s*: (>*) ?\{(.*)", line)
        if bundle is None:
            continue
        begins, depth, operations = bundle[1] is not None, len(bundle[2]), bundle[3]
        # An empty bundle shows no depth: it belongs where the one before it does.
        while around and operations[0] != "}" and depth < around[-1].depth + begins:
            around.pop()
        if begins:
            around.append(Loop(depth))
            found.append(around[-1])
        if around:
            around[-1].bundles += 1
            names = re.findall(r"= ([vs][a-z0-9_]+)", operations)
            around[-1].operations.update(names)
    return found


@pytest.fixture
def load_bench(monkeypatch) -> Callable[[str], types.ModuleType]:
    """load_bench(name): a script of kernels/bench as a module; what stands beside it is found."""
    folder = Path(__file__).parents[2] / "kernels/bench"
    monkeypatch.syspath_prepend(folder)

    def load_bench(name: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_bench", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_bench
