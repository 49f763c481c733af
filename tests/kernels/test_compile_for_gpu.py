"""The script that compiles for a GPU which is not there: what it reads, and its calls, lowered."""

import importlib.util
from pathlib import Path

import jax
import pytest

PATH = Path(__file__).parents[2] / "kernels/bench/compile_for_gpu.py"
SAID = """
ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
    16 bytes stack frame, 252 bytes spill stores, 248 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("compile_for_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ptxas(tmp_path):
    """What a compilation leaves of one kernel."""
    (tmp_path / "kernel_0.ptx").write_text(".visible .entry kernel()\n.maxntid 128, 1, 1\n{}")
    resources = "Resources(smem_scratch_bytes=207872, tmem_scratch_cols=0)"
    (tmp_path / "kernel_0.resources.txt").write_text(resources)
    path = tmp_path / "kernel_0.ptxas"
    path.write_text(SAID)
    return path


def test_a_kernel_is_what_the_assembler_says(script, ptxas):
    assert script.described(ptxas) == script.Kernel(255, threads=128, spilled=500, shared=207_872)


def test_other_words_are_told(script, ptxas):
    ptxas.write_text(SAID.replace("registers", "slots"))
    with pytest.raises(SystemExit, match="has no 'Used"):
        script.described(ptxas)


@pytest.mark.parametrize(
    "kernel, programs",
    [((255, 128, 0, 3072), 2), ((122, 128, 0, 3072), 4), ((32, 128, 0, 84_992), 2)],
)
def test_registers_and_shared_memory_bound_the_programs(script, kernel, programs):
    assert script.Kernel(*kernel).programs(65_536, 233_472) == programs


def test_a_case_of_each_lowers_to_its_kernels(script, lower):
    sampler, attention = (
        script.sampler(*script.SAMPLERS[1]),
        script.attention(*script.ATTENTIONS[2]),
    )
    for kernels, (call, *shapes) in ((3, sampler), (1, attention)):
        arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        assert lower("cuda", call, *arrays).count("@mosaic_gpu_v2") == kernels
