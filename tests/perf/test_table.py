"""The table and the dictionary, of one program that fits and one that does not."""

import json
import re

import pytest

from jaxconv.perf.chips import topology
from jaxconv.perf.collectives import Collective
from jaxconv.perf.compiling import Compilation
from jaxconv.perf.hlo import Cost, Work
from jaxconv.perf.memory import Buffer, Memory, Shortage
from jaxconv.perf.roofline import estimate
from jaxconv.perf.table import Program, fits, render, to_dict

TOPOLOGY = topology("v5e:2x4")
PLACES = [(0, i, j) for i in range(2) for j in range(4)]
GIB = 1 << 30


def program(name: str, temporaries: int, shortage: Shortage | None = None) -> Program:
    work = Work("fusion.1", "jit(step)/mlp", flops=197e12, dtype="bf16", bytes=0, times=2)
    gather = Collective(
        "all-gather", "all-gather.1", "layers/all_gather", 50e6, tuple(range(4)), 3, True
    )
    small = Collective("all-reduce", "all-reduce.7", "", 4, tuple(range(8)))
    cost = Cost((work,), (small, gather), ("loop burst: 32 iterations, as given",))
    memory = Memory(3 * GIB, 2 * GIB, 2 * GIB, temporaries, 0)
    buffers = (Buffer("fusion.2", "f32[8,4096]", "temporary", 5 * GIB, "jit(step)/softmax"),)
    done = Compilation(cost, memory, shortage, buffers, 12.34)
    return Program(name, done, estimate(cost, TOPOLOGY, PLACES, tokens=4e4, model_flops=1.6e15))


STEP = program("train step", 4 * GIB)
LARGE = program("decode burst", 14 * GIB, Shortage(17 * GIB, 15 * GIB))


def test_a_program_fits_if_its_peak_does_and_the_compiler_did_not_give_up():
    assert fits(STEP, TOPOLOGY) and not fits(LARGE, TOPOLOGY)
    usable = 51 * GIB // 4  # 15.75 without the three that the run holds beside it
    assert not fits(program("p", usable + 1), TOPOLOGY) and fits(program("p", usable), TOPOLOGY)
    assert not fits(program("p", 0, Shortage(2, 1)), TOPOLOGY)


def test_the_table_has_a_column_a_program():
    lines = render([STEP, LARGE], TOPOLOGY).splitlines()
    assert lines[0] == "v5e:2x4: 8 devices"
    rows = [re.split(r" {2,}", line) for line in lines[1:15]]
    cells = {label: columns for label, *columns in rows}
    assert cells["one device"] == ["train step", "decode burst"]
    assert cells["temporaries"] == ["4.0 GiB", "14.0 GiB"]
    assert cells["outputs, new"] == ["0 bytes", "0 bytes"]
    assert cells["peak, of 15.8 GiB"] == ["7.0 GiB", "17.0 GiB: does not fit"]
    assert cells["FLOPs"] == ["3.94e+14", "3.94e+14"]
    assert cells["limited by"] == ["compute", "compute"]
    assert cells["tokens per second"] == ["20,000", "20,000"]
    assert cells["MFU"] == [f"{1.6e15 / (2 * 8 * 197e12):.0%}"] * 2
    rest = lines[15:]
    # The largest collectives first; buffers only of what does not fit.
    assert rest[0] == (
        "train step: all-gather of 47.7 MiB over 4 devices, 3 times, asynchronous: "
        "layers/all_gather"
    )
    assert rest[1].endswith("all-reduce of 4 bytes over 8 devices, 1 times: all-reduce.7")
    assert "train step: loop burst: 32 iterations, as given" in rest
    assert not any("f32[8,4096]" in line for line in rest if line.startswith("train step"))
    assert rest[-2] == "decode burst: the compiler needs 17.0 GiB and finds 15.0 GiB"
    assert rest[-1] == "decode burst: temporary f32[8,4096] of 5.0 GiB: jit(step)/softmax"


def test_the_dictionary_is_json_with_the_same_numbers():
    told = json.loads(json.dumps(to_dict([STEP, LARGE], TOPOLOGY)))
    assert (
        told["topology"] == "v5e:2x4"
        and told["devices"] == 8
        and told["usable_bytes"] == 15.75 * GIB
    )
    step, large = told["programs"]["train step"], told["programs"]["decode burst"]
    assert step["fits"] and not large["fits"]
    assert step["shortage"] is None
    assert large["shortage"] == {"needed": 17 * GIB, "available": 15 * GIB}
    assert step["memory"]["peak"] == 7 * GIB and step["flops"] == 2 * 197e12
    assert [c["kind"] for c in step["collectives"]] == ["all-gather", "all-reduce"]
    assert step["estimate"]["limit"] == "compute"
    assert step["estimate"]["seconds"] == pytest.approx(2, rel=1e-3)
    assert step["buffers"][0]["scope"] == "jit(step)/softmax"
    assert step["compile_seconds"] == 12.34
