"""An engine that spans the four chips of a v5e, compiled for them with libtpu and without a TPU."""

import pytest

SLOTS, LENGTH, LAYERS, WIDTH, ROWS, TOKENS = 64, 1024, 2, 256, 16, 64
CACHE = 2 * LAYERS * SLOTS * LENGTH * 128 * 2  # of one key head, which is what a chip has

PROGRAM = f"""
import collections, json, math, re
from jaxconv.models.config import DecoderConfig
from jaxconv.models.device_group import DeviceGroup
from jaxconv.perf.chips import describe, topology
from jaxconv.perf.hlo import program_cost
from jaxconv.rollout.programs import lower
from jaxconv.rollout.shape import EngineShape

CONFIG = DecoderConfig(
    family="llama", vocab_size=8292, embed_dim={WIDTH}, num_layers={LAYERS}, num_heads=16,
    num_kv_heads=4, head_dim=128, mlp_dim=512, max_positions={LENGTH}, dtype="bfloat16",
    kernels="tpu",
)
SHAPE = EngineShape(
    slots={SLOTS}, lengths=({LENGTH},), burst=4, prefill_rows=({ROWS},), prefill_tokens=({TOKENS},)
)
group = DeviceGroup(tuple(describe(topology("v5e:2x2")).devices))
found = {{}}
for name, lowered in lower(CONFIG, SHAPE, group).items():
    done = lowered.compile()
    results = re.findall(r" = \\w+\\[([\\d,]+)\\]\\S* ([\\w-]+)\\(", done.as_text())
    made = [operation for shape, operation in results
            if math.prod(map(int, shape.split(","))) >= {SLOTS * LENGTH} * 128]
    memory = done.memory_analysis()
    found[name] = {{
        "made": sorted(set(made)),
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "kernels": done.as_text().count('custom_call_target="tpu_custom_call"'),
        "exchanged": [[c.kind, c.bytes, c.scope] for c in program_cost(done).collectives],
    }}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(run_with_libtpu):
    return run_with_libtpu(PROGRAM)


@pytest.mark.slow
def test_a_chip_attends_to_its_own_part_of_the_cache_where_it_lies(compiled):
    for name, written in (("decode_burst", set()), ("prefill", {"fusion", "scatter", "bitcast"})):
        found = compiled[name]
        assert set(found["made"]) <= {"parameter", "get-tuple-element"} | written, name
        assert found["temporary"] < 0.3 * CACHE, name
        assert found["aliased"] >= CACHE, name
        assert found["kernels"] == LAYERS if name == "decode_burst" else found["kernels"] >= 1


@pytest.mark.slow
def test_chips_exchange_activations_and_what_the_sampler_has_found(compiled):
    told = compiled["decode_burst"]["exchanged"]
    step = [c for c in told if "decode_step" in c[2]]
    assert [c[:2] for c in step] == [["all-reduce", SLOTS * WIDTH * 2]] * (2 * LAYERS + 1)
    rest = [c for c in told if "decode_step" not in c[2]]
    assert rest and all("sample" in c[2] for c in rest)
    assert max(c[1] for c in rest) <= SLOTS * 16 * 1024 * 4  # candidates, of filtered rows
    piece = ROWS * TOKENS * WIDTH * 2
    told = compiled["prefill"]["exchanged"]
    assert [c[:2] for c in told] == [["all-reduce", piece]] * (2 * LAYERS - 1)
