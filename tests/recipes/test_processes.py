"""One run in several real processes: the numbers of one process, and no end that loses anything.

They are processes of this machine, which talk through gloo.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest

from jaxconv.models import hf
from jaxconv.models.decoder import Decoder
from jaxconv.train import metrics
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.workdir import Workdir

HERE = Path(__file__).parent
STEP = "jaxconv.train.supervised:Supervised.step"
GAME_OVER = "jaxconv.rollout.selfplay:SelfPlay._end"
ROUNDING = "drift/|advantage/zero_fraction"  # metrics that are nothing but rounding errors
ROWS = {"batch.rows": 4}

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the processes of a run ended: statuses, and what each said."""

    statuses: list[int]
    out: list[str]
    err: list[str]
    seconds: float


def run(
    recipe,
    count: int,
    workdir: Path,
    ends: Mapping[int, tuple[str, str]] = MappingProxyType({}),
    *,
    devices: int = 1,
) -> Ended:
    """A run in `count` processes of so many devices; `ends` are (action, point) as of
    `interrupted.py`, by process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(devices))),
    }
    started = []
    for index in range(count):
        program = [str(HERE / "interrupted.py"), *ends.get(index, ("none", "time:time:-1"))]
        several = ["--distributed", f"--coordinator={address}"]
        several += [f"--process_count={count}", f"--process_index={index}"]
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    *program,
                    *recipe.arguments(workdir),
                    *(several if count > 1 else []),
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    began = None
    while any(process.poll() is None for process in started):
        if began is None and any(process.poll() is not None for process in started):
            began = time.monotonic()
        time.sleep(0.1)
    seconds = 0.0 if began is None else time.monotonic() - began
    said = [process.communicate() for process in started]
    return Ended([p.returncode for p in started], *map(list, zip(*said, strict=True)), seconds)


def done(recipe, count: int, workdir: Path, **options) -> Path:
    ended = run(recipe, count, workdir, **options)
    assert ended.statuses == [0] * count, ended.err
    return workdir


def assert_same_numbers(workdir: Path, whole: Path, *, rtol: float = 1e-5) -> None:
    """Every record of a run, and its results, are those of another; but for what took how long."""
    found, expected = (metrics.read(Workdir(place, writer=False)) for place in (workdir, whole))
    steps = [[(r["stage"], r["step"]) for r in records] for records in (found, expected)]
    assert steps[0] == steps[1]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        left_out = f"time|speed/|memory/|stage|{ROUNDING}"
        # Before the first update the policy is the reference: rewards are rounding errors.
        left_out += "|rewards/" if one["step"] == 1 else ""
        for name, value in one.items():
            if not re.match(left_out, name):
                # A difference of log-likelihoods, each of hundreds of nats.
                atol = 2e-4 if re.search("margin|rewards/", name) else 1e-5
                numbers = np.array([value, other[name]], float)  # None, in strict JSON, is NaN
                np.testing.assert_allclose(
                    *numbers, rtol=rtol, atol=atol, err_msg=f"{one['stage']} {name}"
                )
    reports = [json.loads((place / "report.json").read_text()) for place in (workdir, whole)]
    assert reports[0]["results"].keys() == reports[1]["results"].keys()
    for name, result in reports[0]["results"].items():
        other = reports[1]["results"][name]
        assert result["n"] == other["n"]
        assert result["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-3), name


@pytest.fixture(scope="session")
def sft_in_rows(sft):
    """Micro-batches of which four processes get equal shares; one stage is enough here."""
    return dataclasses.replace(sft, fields={**sft.fields, **ROWS, "control.exchanged": False})


@pytest.fixture(scope="session")
def one_sft(sft_in_rows, tmp_path_factory) -> Path:
    return done(sft_in_rows, 1, tmp_path_factory.mktemp("one") / "run")


def test_four_processes_fine_tune_as_one(sft_in_rows, one_sft, tmp_path):
    workdir = tmp_path / "run"
    ended = run(sft_in_rows, 4, workdir)
    assert ended.statuses == [0] * 4, ended.err
    assert_same_numbers(workdir, one_sft)
    assert (workdir / "export" / "model.safetensors").is_file()
    # The first alone says what there is to say.
    assert "report: " in ended.out[0]
    assert not [out for out in ended.out[1:] if "report: " in out or "sft 1/" in out]


def test_a_run_goes_on_in_any_number_of_processes(sft_in_rows, one_sft, tmp_path):
    """SIGTERM to one of them: all save and leave; others go on, each record once."""
    workdir = tmp_path / "run"
    for count, asked in ((4, 2), (1, 0)):
        ended = run(sft_in_rows, count, workdir, {asked: ("SIGTERM", f"{STEP}:1")})
        assert ended.statuses == [4] * count, ended.err
        for said in ended.err:
            assert "stopped: sft stopped after step" in said
    done(sft_in_rows, 2, workdir)
    assert_same_numbers(workdir, one_sft)


def test_a_split_checkpoint_is_fine_tuned_and_speaks_as_a_whole_one(sft_in_rows, one_sft, tmp_path):
    """Read in parts, trained in parts, sampled from by two devices of each process, exported."""
    kept, tokenizer = hf.load_pretrained(one_sft / "export")
    heads = dataclasses.replace(kept.config, num_heads=2, num_kv_heads=2, head_dim=8)
    model = jax.jit(Decoder, static_argnums=0)(heads, jax.random.key(7))
    hf.save_pretrained(model, tokenizer, tmp_path / "start")
    fields = {**sft_in_rows.fields, "model.path": tmp_path / "start"}
    whole = done(dataclasses.replace(sft_in_rows, fields=fields), 1, tmp_path / "one")
    fields |= {"mesh.strategy": "fsdp_tp", "mesh.tensor": 2, "samples.tensor": 2}
    split = dataclasses.replace(sft_in_rows, fields=fields)
    workdir = done(split, 2, tmp_path / "two", devices=2)
    assert_same_numbers(workdir, whole)
    for name in ("start", "sft"):
        marks = [
            json.loads((w / f"artifacts/marks/{name}.json").read_text()) for w in (workdir, whole)
        ]
        assert marks[0]["said"] == marks[1]["said"]
    exports = [hf.load_pretrained(w / "export")[0] for w in (workdir, whole)]
    for one, other in zip(*map(jax.tree.leaves, exports), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("lost", [1, 0])
def test_the_others_leave_when_one_is_killed(lost, sft_in_rows, one_sft, tmp_path):
    workdir = tmp_path / "run"
    ended = run(sft_in_rows, 2, workdir, {lost: ("SIGKILL", f"{STEP}:4")})
    assert ended.statuses[lost] == -signal.SIGKILL
    assert ended.seconds < 60
    other = 1 - lost
    assert ended.statuses[other] == 4
    assert f"jaxconv: stopped: process {lost} (pid " in ended.err[other]
    done(sft_in_rows, 2, workdir)
    assert_same_numbers(workdir, one_sft)


def test_what_the_first_process_refuses_ends_all(sft_in_rows, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "something").write_text("of somebody else")
    (workdir / "config.json").write_text(json.dumps({"config_sha": "x", "config": {"seed": 5}}))
    ended = run(sft_in_rows, 2, workdir)
    assert ended.statuses == [2, 2]
    assert "belongs to another config" in ended.err[0]
    assert "process 0 refused: " in ended.err[1]


def test_rows_that_processes_cannot_share_are_refused_by_name(sft, tmp_path):
    ended = run(sft, 4, tmp_path / "run")
    assert ended.statuses == [2] * 4
    assert (
        "config.batch.rows=2; it must be a multiple of the number of processes, 4" in ended.err[0]
    )


def test_two_processes_learn_from_preferences_as_one(dpo, tmp_path):
    fields = {**dpo.fields, **ROWS, "control.shuffled": False}
    recipe = dataclasses.replace(dpo, fields=fields)
    whole = done(recipe, 1, tmp_path / "whole")
    assert_same_numbers(done(recipe, 2, tmp_path / "run"), whole)


# ---------------------------------------------------------------- self-play

OMAR = {
    "warm_start.rows": 4,
    "warm_start.steps": 2,
    "warm_start.evaluate_every": 2,
    "minibatching.rows": 4,
    "self_play.iterations": 2,
    "arena.games": 2,
    "checkpoint.rollout_seconds": 600.0,
}


@pytest.fixture(scope="session")
def omar(tiny):
    return dataclasses.replace(tiny, fields={**tiny.fields, **OMAR})


@pytest.fixture(scope="session")
def one_omar(omar, tmp_path_factory) -> Path:
    return done(omar, 1, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="session")
def two_omar(omar, tmp_path_factory) -> Path:
    return done(omar, 2, tmp_path_factory.mktemp("two") / "run")


def assert_same_self_play(workdir: Path, whole: Path) -> None:
    assert_same_numbers(workdir, whole, rtol=1e-4)
    spoken = [(place / "artifacts" / "episodes.jsonl").read_bytes() for place in (workdir, whole)]
    assert spoken[0] == spoken[1]
    # What only a run in the middle of its games needs is gone.
    assert {path.name.removesuffix("_best") for path in (workdir / "checkpoints").iterdir()} == {
        "warm_start",
        "self_play",
    }


def tables(workdir: Path) -> list[dict]:
    """The conversations that the last checkpoint has under way, by process."""
    with Checkpoints(workdir / "checkpoints" / "self_play") as checkpoints:
        return checkpoints.host(checkpoints.latest())["work"]["games"]["tables"]


def test_two_processes_play_with_themselves_as_one(omar, one_omar, two_omar):
    assert_same_self_play(two_omar, one_omar)


def test_a_split_model_plays_with_itself_as_a_whole_one(omar, tmp_path):
    """Trained in parts, and each engine on the two devices of a process."""
    fields = {**omar.fields, "model.num_heads": 2, "model.num_kv_heads": 2}
    whole = done(dataclasses.replace(omar, fields=fields), 1, tmp_path / "one")
    fields |= {"mesh.strategy": "fsdp_tp", "mesh.tensor": 2, "rollout.tensor": 2}
    split = dataclasses.replace(omar, fields=fields)
    assert_same_self_play(done(split, 2, tmp_path / "two", devices=2), whole)


def test_conversations_go_on_in_as_many_processes(omar, two_omar, tmp_path):
    """SIGTERM to one of two that play: what follows is what would have followed, bit for bit."""
    workdir = tmp_path / "run"
    ended = run(omar, 2, workdir, {1: ("SIGTERM", f"{GAME_OVER}:2")})
    assert ended.statuses == [4, 4], ended.err
    for said in ended.err:
        assert "stopped: self-play stopped in iteration 1 of 2" in said
    saved = tables(workdir)
    assert len(saved) == 2 and saved[1]["live"] and len(saved[1]["finished"]) < 4
    ended = run(omar, 2, workdir)
    assert ended.statuses == [0, 0], ended.err
    assert "from their start" not in ended.out[0]
    shown = [
        [
            {k: v for k, v in record.items() if not re.match("time|speed/|memory/", k)}
            for record in metrics.read(Workdir(place, writer=False))
        ]
        for place in (workdir, two_omar)
    ]
    assert shown[0] == shown[1]
    for name in ("model", "value_head"):
        files = [place / "export" / f"{name}.safetensors" for place in (workdir, two_omar)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert_same_self_play(workdir, two_omar)


def test_conversations_go_on_in_any_number_of_processes(omar, one_omar, tmp_path):
    """Of four one is stopped, of two that go on one is killed while the other waits for it."""
    workdir = tmp_path / "run"
    ended = run(omar, 4, workdir, {2: ("SIGTERM", f"{GAME_OVER}:3")})
    assert ended.statuses == [4] * 4, ended.err
    saved = tables(workdir)
    over = sum(len(table["finished"]) for table in saved)
    assert len(saved) == 4 and 0 < over < 8
    ended = run(omar, 2, workdir, {1: ("SIGKILL", f"{GAME_OVER}:1")})
    assert f"{over} were over and are kept, {8 - over} are played from" in ended.out[0]
    assert ended.statuses == [4, -signal.SIGKILL]
    assert ended.seconds < 60
    assert "stopped: process 1 (pid " in ended.err[0]
    done(omar, 1, workdir)
    assert_same_self_play(workdir, one_omar)
