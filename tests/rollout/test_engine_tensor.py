"""An engine that spans several devices says what one on a single device says, and its weights get
there without the host.

Run as a program it prints what was found on 8 fake devices.
"""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxconv.errors import Refused
from jaxconv.models import decode, handover
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import DeviceGroup, device_groups
from jaxconv.models.handover import hand_over
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.kernels import chosen
from jaxconv.models.lora import LoraConfig
from jaxconv.models.sharding import device_mesh, loosened
from jaxconv.perf.hlo import program_cost
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.rollout.programs import lower
from jaxconv.train.mesh import data_mesh, place
from jaxconv.train.trainable import join, split

CONFIG = DecoderConfig(
    family="qwen2",
    vocab_size=280,
    embed_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=48,
    max_positions=64,
    attention_bias=True,
    sliding_window=6,
    sliding_layers=(False, True),
)
# Neither comes out even; the larger one is sampled from by cells.
VOCABULARIES = {"small": 280, "odd": 281, "large": 5000}
FAMILIES = {
    "qwen2": {},
    "qwen3": {"family": "qwen3", "attention_bias": False, "qk_norm": True},
    "gemma2": {
        "family": "gemma2",
        "attention_bias": False,
        "attention_softcap": 20.0,
        "final_softcap": 15.0,
        "tie_embeddings": True,
    },
    "llama": {
        "family": "llama",
        "attention_out_bias": True,
        "mlp_bias": True,
        "sliding_window": None,
        "sliding_layers": (),
    },
}
LORA = LoraConfig(2, 4.0, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
SHAPE = EngineShape(
    slots=4, lengths=(64,), burst=8, leave=0.5, prefill_rows=(4,), prefill_tokens=(8,)
)
GROWING = dataclasses.replace(SHAPE, lengths=(32, 64))
MESHES = {
    "one device": None,
    "ddp": {"data": 8},
    "fsdp": {"fsdp": 8},
    "fsdp in another order": {"fsdp": 8},
    "fsdp_tp": {"fsdp": 2, "tensor": 4},
    "fsdp_tp and copies": {"data": 2, "fsdp": 2, "tensor": 2},
}
SAMPLINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0),
    "filtered": Sampling(temperature=0.8, top_k=20, top_p=0.9),
    "all": Sampling(top_k=100_000, min_p=0.01),
}


def make_model(config: DecoderConfig, lora: bool):
    """An actor-critic whose values vary."""
    decoder = jax.jit(Decoder, static_argnums=0)(config, jax.random.key(0))
    head = ValueHead(config.embed_dim, 0.5)
    head.kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), head.kernel.shape)
    model = ActorCritic(decoder, head)
    if not lora:
        return model
    adapter, base = split(model, LORA, jax.random.key(2))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), adapter)
    return join(adapter, base)


def placed(model, name: str):
    """The model as the trainer has it."""
    if MESHES[name] is None:
        return model
    if name == "ddp":
        return place(model, data_mesh(8))
    devices = jax.devices()
    if name == "fsdp in another order":
        devices = [devices[i] for i in (3, 1, 0, 2, 7, 5, 6, 4)]
    return place(model, device_mesh(**MESHES[name], devices=devices))


def turns_of(engine: Engine, again: bool = False) -> list:
    """Three streams hear and speak twice; the second time from a snapshot, if `again`."""
    engine.reset()
    rng = np.random.default_rng(0)
    slots, turns = [engine.open(stream) for stream in range(3)], []
    for heard in (3, 9):
        for i, slot in enumerate(slots):
            if engine.room(slot) > heard + 8 * i:
                words = rng.integers(2, engine.config.vocab_size, heard + 8 * i).tolist()
                engine.say(slot, words, 12)
        engine.dispatch()
        if again:
            arrays, host = engine.snapshot()
            arrays = jax.tree.map(np.array, arrays)
            assert jax.tree.map(np.shape, arrays) == jax.tree.map(
                lambda x: x.shape, engine.like(host)
            )
            engine.reset()
            engine.restore(arrays, json.loads(json.dumps(host)))
        while engine.speaking:
            engine.dispatch()
            turns += engine.collect()
        while engine.flying:
            turns += engine.collect()
    return sorted((t.slot, len(t.tokens), t.tokens, t.logprobs, t.values, t.end) for t in turns)


def compare(mesh_name: str, family: str, vocab: str, lora: str, *tensors: str) -> dict:
    """What engines of so many devices say, beside what one of a single device says.

    The caches of those of several devices have to grow.
    """
    config = dataclasses.replace(CONFIG, vocab_size=VOCABULARIES[vocab], **FAMILIES[family])
    model = make_model(config, bool(lora))

    def speak(model, tensor: int) -> dict:
        group = device_groups(tensor, jax.local_devices())[-1]
        engine = Engine(
            config,
            SHAPE if tensor == 1 or tensors == ("4",) else GROWING,
            stop_ids=range(0, config.vocab_size, 20),
            key=jax.random.key(0),
            group=group,
        )
        jax.block_until_ready(model)
        with jax.transfer_guard("disallow"):
            engine.weights = hand_over(model, [group])[group]
        held = {
            len(x.sharding.device_set) for x in jax.tree.leaves((engine.weights, engine._state))
        }
        assert held == {tensor}
        said = {}
        for name, sampling in SAMPLINGS.items():
            engine.sampling = sampling
            said[name] = turns_of(engine)
        assert turns_of(engine, again=True) == said[name]
        return said

    expected = speak(model, 1)
    model = placed(model, mesh_name)
    found = {}
    for tensor in tensors:
        said = speak(model, int(tensor))
        found[tensor] = [
            [(*a[:3], a[5]) == (*b[:3], b[5]), np.max(np.abs(np.array(a[3:5]) - b[3:5]), initial=0)]
            for name in SAMPLINGS
            for a, b in zip(said[name], expected[name], strict=True)
        ]
    return {"found": found, "tokens": sum(turn[1] for turn in expected["plain"])}


def exchanged(program) -> list[list]:
    """[kind, bytes, how many devices, scope] of each collective."""
    return [[c.kind, c.bytes, len(c.group), c.scope] for c in program_cost(program).collectives]


def exchanges() -> dict:
    """What devices tell each other: in the programs of an engine, and as it gets its weights."""
    group = device_groups(4, jax.local_devices())[-1]
    programs = {name: exchanged(p.compile()) for name, p in lower(CONFIG, SHAPE, group).items()}
    model = loosened(placed(make_model(CONFIG, lora=False), "fsdp_tp"))
    index, mesh = jax.device_put(np.int32(0)), model.decoder.embed[...].sharding.mesh
    take_out = decode._rollout_layer.lower(model.decoder, index, mesh, True).compile()
    programs["take out"] = exchanged(take_out)
    layer = decode.rollout_layer(model, 0, split=True)
    wanted = handover._mesh_of_groups(model, [group])
    specs = handover._layer_specs(layer, wanted)
    wanted = tuple(jax.sharding.NamedSharding(wanted, s) for s in jax.tree.leaves(specs))
    reshard = handover._constrained.lower(tuple(jax.tree.leaves(layer)), wanted).compile()
    programs["reshard"] = exchanged(reshard)
    return programs


def start(*arguments: str, devices: int = 8, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@functools.cache
def run(*arguments: str) -> dict:
    return result_of(start(*arguments))


def check(result: dict, *tensors: str) -> None:
    assert result["tokens"] > 20 and set(result["found"]) == set(tensors)
    for turns in result["found"].values():
        assert len(turns) > 4 * len(SAMPLINGS)
        assert all(same for same, _ in turns)
        assert max(apart for _, apart in turns) < 2e-5


def test_four_devices_say_what_one_says():
    check(run()["compared"], "4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "family", "vocab", "lora"),
    [
        *((mesh, "qwen2", "large", "") for mesh in MESHES),
        ("ddp", "qwen3", "odd", ""),
        ("fsdp", "gemma2", "odd", ""),
        ("fsdp_tp", "gemma2", "large", ""),
        ("fsdp", "llama", "odd", ""),
        ("fsdp_tp", "qwen2", "small", "lora"),
        ("one device", "qwen2", "odd", "lora"),
    ],
)
def test_engines_of_any_size_say_the_same_from_any_layout(mesh, family, vocab, lora):
    check(run(mesh, family, vocab, lora, "2", "4"), "2", "4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["ddp", "fsdp_tp and copies"])
def test_each_of_two_processes_gets_the_weights_of_its_own_engines(mesh):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        start(
            *(mesh, "qwen2", "large", "", "2"),
            devices=4,
            JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
            COORDINATOR=address,
            PROCESS=str(process),
        )
        for process in range(2)
    ]
    for process in started:
        check(result_of(process), "2")


ACTIVATION = SHAPE.slots * CONFIG.embed_dim * 4


def test_a_decode_step_adds_up_attention_mlp_and_the_embedding():
    told = run()["exchanged"]["decode_burst"]
    step = [c for c in told if "decode_step" in c[3]]
    assert step == [["all-reduce", ACTIVATION, 4, c[3]] for c in step]
    assert len(step) == 2 * CONFIG.num_layers + 1
    rest = [c for c in told if "decode_step" not in c[3]]
    assert rest and all("sample" in c[3] for c in rest)
    # Of a small vocabulary the logits.
    assert [c[:3] for c in rest] == [["all-gather", SHAPE.slots * CONFIG.vocab_size * 4, 4]]


def test_a_prefill_adds_up_the_same_but_what_nobody_reads():
    told = run()["exchanged"]["prefill"]
    piece = SHAPE.prefill_rows[-1] * SHAPE.prefill_tokens[-1] * CONFIG.embed_dim * 4
    assert [c[:3] for c in told] == [["all-reduce", piece, 4]] * (2 * CONFIG.num_layers - 1)


def test_weights_of_the_same_split_are_gathered_over_fsdp_alone():
    """No device gets a whole matrix of a layer, nor anything of the other layers."""
    told = run()["exchanged"]
    assert told["take out"] == []
    matrices = (
        4
        * CONFIG.embed_dim
        * np.array([h * CONFIG.head_dim for h in (8, 8, 4, 4)] + [CONFIG.mlp_dim] * 3)
    )
    gathered = [c for c in told["reshard"] if c[0] == "all-gather"]
    assert len(gathered) == len(told["reshard"]) == len(matrices)
    assert sorted(c[1] for c in gathered) == sorted(matrices / 4)
    assert {c[2] for c in gathered} == {2}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"num_heads": 6, "num_kv_heads": 3}, "it must divide the model's num_heads=6"),
        ({"num_kv_heads": 2}, "it must divide the model's num_kv_heads=2"),
        ({"mlp_dim": 46}, "it must divide the model's mlp_dim=46"),
    ],
)
def test_models_that_do_not_come_out_even_are_refused(changed, line):
    config = dataclasses.replace(CONFIG, **changed)
    group = DeviceGroup(tuple(jax.devices()[:1]) * 4)
    with pytest.raises(Refused) as refused:
        Engine(config, SHAPE, stop_ids=[0], key=jax.random.key(0), group=group)
    assert str(refused.value) == f"config.rollout.tensor=4; {line}"


@pytest.mark.parametrize("tensor", [3, 16, 0])
def test_engines_that_do_not_share_the_devices_out_are_refused(tensor):
    with pytest.raises(Refused) as refused:
        device_groups(tensor, jax.devices()[:1] * 8)
    assert str(refused.value) == (
        f"config.rollout.tensor={tensor}; it must divide the 8 devices of a process"
    )


def test_a_split_vocabulary_is_sampled_from_in_xla_and_a_report_says_so():
    config = dataclasses.replace(CONFIG, vocab_size=8192, kernels="tpu")
    alone, shared = chosen(config, [128]), chosen(config, [128], 4)
    assert alone["sample"] == alone["decode_attention"] == "tpu"
    assert shared == alone | {"sample": "xla"}


if __name__ == "__main__":
    if "COORDINATOR" in os.environ:
        jax.distributed.initialize(os.environ["COORDINATOR"], 2, int(os.environ["PROCESS"]))
    if sys.argv[1:]:
        found = compare(*sys.argv[1:])
    else:
        quick = compare("fsdp_tp", "qwen2", "small", "", "4")
        found = {"compared": quick, "exchanged": exchanges()}
    print(json.dumps(found))
