"""Kill or stop the recipe anywhere, run the same command again: nobody can tell afterwards."""

import json
import random
import shutil
import signal
import time

import pytest

from jaxconv.train.checkpoint import Checkpoints

ROLLOUT = "jaxconv.rollout.selfplay:SelfPlay.advance"


def test_the_whole_recipe_leaves_what_it_promises(finished):
    made = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert made >= {
        "config.json",
        "metrics.jsonl",
        "report.json",
        "report.md",
        "curves.png",
        "export/README.md",
        "export/config.json",
        "export/generation_config.json",
        "export/model.safetensors",
        "export/tokenizer.json",
        "export/value_head.safetensors",
    }
    assert not [name for name in made if name.endswith((".tmp", ".partial"))]
    report = json.loads((finished / "report.json").read_text())
    assert report["status"] == "done"
    assert {"compile_s", "lower_s"} <= report["compile"].keys()
    text = (finished / "report.md").read_text()
    assert "![Learning curves](curves.png)" in text and "## Cross-play, 2 players" in text


@pytest.mark.slow
def test_stopped_and_killed_runs_end_as_undisturbed_ones(tiny, finished, tmp_path):
    workdir = tmp_path / "run"
    # A polite stop in the middle of the second iteration's conversations …
    stopped = tiny.interrupt("SIGTERM", f"{ROLLOUT}:60", workdir)
    assert stopped.returncode == 4, stopped.stderr
    assert (
        "stopped: self-play stopped in iteration 2 of 3; to go on, run the same" in stopped.stderr
    )
    assert "Traceback" not in stopped.stderr
    assert json.loads((workdir / "report.json").read_text())["status"] == "stopped"
    with Checkpoints(workdir / "checkpoints" / "self_play") as checkpoints:
        host = checkpoints.host(checkpoints.latest())
    assert host["done"] == 1
    [table] = host["work"]["games"]["tables"]
    assert any(game["played"]["transcript"] for game in table["live"])
    # … a kill between an update and its record …
    tiny.killed("jaxconv.train.ppo:PPO.iterate:2+", workdir)
    # … a disk that is full when the checkpoint is exported …
    full = tiny.interrupt("full", "jaxconv.recipes.omar:export:1", workdir)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    # A warning of the compile cache may stand before it, which has no room either.
    [line] = [x for x in full.stderr.splitlines() if x.startswith("jaxconv: ")]
    assert line.startswith("jaxconv: failed: ") and str(workdir / "export") in line
    assert "File too large" in line or "disk full" in line
    left = [path.name for path in workdir.iterdir()]
    assert not {"export", "report.json"} & set(left)
    assert not [name for name in left if "partial" in name or "tmp" in name]
    # … and the rest.
    done = tiny.run(workdir)
    assert done.returncode == 0, done.stderr
    tiny.assert_same_run(workdir, finished)


POINTS = (
    "jaxconv.train.starting_point:train_tokenizer:1+",
    "jaxconv.train.supervised:Supervised.step:1",  # before the first update
    "jaxconv.train.supervised:Supervised.step:4+",
    "jaxconv.train.checkpoint:Checkpoints.save:1+",  # while it is written in the background
    "jaxconv.train.metrics:MetricsWriter.write:2+",  # recorded, not saved
    "jaxconv.models.hf:save_value_head:1",  # half of the warm start's artifact
    "jaxconv.models.hf:save_value_head:1+",
    f"{ROLLOUT}:1",
    f"{ROLLOUT}:50",
    "jaxconv.train.checkpoint:Checkpoints.save:1+",
    "jaxconv.rollout.selfplay:SelfPlay.restore:1+",
    "jaxconv.train.ppo:PPO.iterate:1",
    "jaxconv.train.metrics:MetricsWriter.write:1+",
    "jaxconv.train.ppo:PPO.iterate:2+",
    "jaxconv.train.checkpoint:Checkpoints.close:1+",  # self-play is over
    "jaxconv.models.hf:save_pretrained:1+",
    "jaxconv.evals.arena:play_all:1",
    f"{ROLLOUT}:100",  # in the arena
    "jaxconv.recipes.omar:say_the_same:1+",
    "jaxconv.evals.self_play_report:write_model_card:1+",
    "jaxconv.train.atomic:write_json:2",  # report.md is there, report.json is not
)


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(tiny, finished, tmp_path):
    workdir = tmp_path / "run"
    for point in POINTS:
        tiny.killed(point, workdir)
    done = tiny.run(workdir)
    assert done.returncode == 0, done.stderr
    tiny.assert_same_run(workdir, finished)


@pytest.mark.slow
def test_killed_and_stopped_at_random_moments(tiny, finished, tmp_path):
    workdir = tmp_path / "run"
    rng = random.Random(0)
    kinds = []
    for attempt in range(8):
        process = tiny.start(["-m", "jaxconv.launch", *tiny.arguments(workdir)])
        while not (workdir / "config.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.2, 2))
        kind = signal.SIGTERM if attempt % 3 == 2 else signal.SIGKILL
        process.send_signal(kind)
        _, err = process.communicate(timeout=120)
        kinds.append(process.returncode)
        assert process.returncode in (0, 4, -signal.SIGKILL, -signal.SIGTERM), err
    assert kinds.count(-signal.SIGKILL) >= 3
    done = tiny.run(workdir)
    assert done.returncode == 0, done.stderr
    tiny.assert_same_run(workdir, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("jaxconv.train.supervised:Supervised.step:3", "warm-start stopped after step 3 of 6"),
        (f"{ROLLOUT}:60", "self-play stopped in iteration "),
        ("jaxconv.train.ppo:PPO.iterate:3", "self-play stopped after step 3 of 3"),
    ],
)
def test_a_stop_is_polite_in_every_stage(point, said, tiny, finished, tmp_path):
    workdir = tmp_path / "run"
    stopped = tiny.interrupt("SIGTERM", point, workdir)
    assert stopped.returncode == 4, stopped.stderr
    line = stopped.stderr.strip().splitlines()[-1]
    assert line.startswith(f"jaxconv: stopped: {said}"), line
    done = tiny.run(workdir)
    assert done.returncode == 0, done.stderr
    tiny.assert_same_run(workdir, finished)


@pytest.mark.slow
def test_an_early_stop_stays_one_after_a_kill(tiny, tmp_path):
    # The spread of rewards is below this at once, so the third iteration after the warm-up stops.
    alarmed = {"alarm__reward_std_low": 10.0, "self_play__iterations": 6, "arena__games": 2}
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert tiny.run(whole, **alarmed).returncode == 0
    tiny.killed("jaxconv.train.checkpoint:Checkpoints.close:2+", workdir, **alarmed)
    assert tiny.run(workdir, **alarmed).returncode == 0
    found, expected = tiny.outcome(workdir), tiny.outcome(whole)
    assert "stopped early" in (note := expected["notes"][-1]) and "after iteration 4 is" in note
    assert found == expected
    shutil.rmtree(whole)
