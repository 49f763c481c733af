"""Kill or stop fine-tuning anywhere, run the same command again: nobody can tell afterwards."""

import json
import random
import signal
import time

import pytest

from jaxconv.train.checkpoint import Checkpoints

STEP = "jaxconv.train.supervised:Supervised.step"
SAVE = "jaxconv.train.checkpoint:Checkpoints.save"
RESTORE = "jaxconv.train.checkpoint:Checkpoints.restore:1+"


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(dpo, finished_dpo, tmp_path):
    """The start is fine-tuned, then it learns from pairs: both objectives, packed, in one run."""
    workdir = tmp_path / "run"
    # The first checkpoint is being written in the background …
    dpo.killed(f"{SAVE}:2+", workdir)
    # … an update of the second stage has just been dispatched: its micro-batches are added up …
    dpo.killed(f"{STEP}:7+", workdir)
    marks = workdir / "artifacts" / "marks" / "start.json"
    measured = marks.stat().st_mtime_ns
    with Checkpoints(workdir / "checkpoints" / "sft") as checkpoints:
        assert checkpoints.latest() == 4  # the stage before is not gone through again
    # … and the rest.
    done = dpo.run(workdir)
    assert done.returncode == 0, done.stderr
    dpo.assert_same_run(workdir, finished_dpo)
    assert marks.stat().st_mtime_ns == measured  # the start was not measured again
    assert not [path for path in workdir.rglob("*") if "partial" in path.name]


SFT_POINTS = (
    "jaxconv.train.starting_point:train_tokenizer:1+",
    "jaxconv.data.token_store:build:1",
    "jaxconv.data.examples:encode:1",
    "jaxconv.data.token_store:build:2+",
    "jaxconv.evals.exam:Exam.marks:1",
    "jaxconv.rollout.engine:Engine.dispatch:1+",
    "jaxconv.data.batches:Assembler.__call__:3",  # in a thread of the loader
    f"{STEP}:1",  # before the first update
    f"{STEP}:3+",  # while the third is under way
    f"{SAVE}:2+",  # the weights with the best number are being written
    f"{SAVE}:1+",
    "jaxconv.train.metrics:MetricsWriter.write:1+",  # recorded, not saved
    "jaxconv.train.loop:Loop._evaluated:1+",  # the best are on disk, the state is not
    RESTORE,
    f"{STEP}:2+",
    "jaxconv.train.checkpoint:Checkpoints.close:1+",  # the stage is over
    "jaxconv.evals.exam:Exam.marks:1",  # the start has its marks, the trained model has not
    "jaxconv.rollout.engine:Engine.dispatch:1+",
    f"{STEP}:3+",  # of the control
    "jaxconv.models.hf:write_tensors:1+",  # half of the export
    "jaxconv.models.hf:save_pretrained:1+",
    "jaxconv.evals.fine_tuning_report:learning_curves:1",
    "jaxconv.train.atomic:write_json:2",  # report.md is there, report.json is not
)
DPO_POINTS = (
    "jaxconv.data.token_store:build:2+",
    f"{STEP}:2+",
    "jaxconv.models.hf:write_tensors:1+",  # half of the fine-tuned start
    "jaxconv.models.hf:save_pretrained:1+",
    "jaxconv.recipes.dpo:reference_logprobs:1",
    "numpy:save:1+",  # the reference's log-probs have no name yet
    "jaxconv.recipes.dpo:reference_logprobs:1+",
    "jaxconv.data.batches:Assembler.__call__:2",
    f"{STEP}:1+",
    f"{SAVE}:1+",
    f"{STEP}:2",
    f"{SAVE}:2+",
    "jaxconv.train.metrics:MetricsWriter.write:2+",
    "jaxconv.train.loop:Loop._evaluated:1+",
    "jaxconv.evals.exam:Exam.marks:1+",
    "jaxconv.recipes.dpo:reference_logprobs:2",  # of the control's pairs
    f"{STEP}:3+",
    "jaxconv.models.hf:save_pretrained:1",
    "jaxconv.train.atomic:write_json:2",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_killed_at_every_kind_of_moment(name, request, tmp_path):
    recipe, whole = request.getfixturevalue(name), request.getfixturevalue(f"finished_{name}")
    workdir = tmp_path / "run"
    for point in {"sft": SFT_POINTS, "dpo": DPO_POINTS}[name]:
        if point == RESTORE:  # so far every save may have been killed before it was on disk
            stopped = recipe.interrupt("SIGTERM", f"{STEP}:1", workdir)
            assert stopped.returncode == 4, stopped.stderr
        recipe.killed(point, workdir)
    done = recipe.run(workdir)
    assert done.returncode == 0, done.stderr
    recipe.assert_same_run(workdir, whole)


# Updates of half a second in many micro-batches: most of the time one is under way.
LONG = {"batch__microbatches": 24, "batch__rows": 4, "checkpoint__every": 1, "train__epochs": 20}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_killed_at_random_moments_of_long_updates(name, request, tmp_path):
    recipe = request.getfixturevalue(name)
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert recipe.run(whole, **LONG).returncode == 0
    rng = random.Random(name)
    ended = []
    for _ in range(6):
        process = recipe.start(["-m", "jaxconv.launch", *recipe.arguments(workdir, **LONG)])
        for line in process.stdout:
            if line.startswith("an update takes"):  # the next one begins
                break
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
        ended.append(process.returncode)
    assert ended.count(-signal.SIGKILL) >= 3
    done = recipe.run(workdir, **LONG)
    assert done.returncode == 0, done.stderr
    assert recipe.outcome(workdir) == recipe.outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "point", "said"),
    [
        ("sft", f"{STEP}:4", "sft stopped after step 4 of 9"),
        ("sft", "jaxconv.evals.exam:Exam.marks:1", "while measuring a model"),
        ("sft", f"{STEP}:12", "control stopped after step 3 of 9"),
        ("dpo", "jaxconv.data.token_store:build:1", "while tokenising"),
        ("dpo", "jaxconv.rollout.engine:Engine.dispatch:1", "while scoring pairs"),
        ("dpo", "jaxconv.recipes.dpo:reference_logprobs:1", "while scoring pairs"),
        ("dpo", f"{STEP}:2", "sft stopped after step 2 of "),
        ("dpo", f"{STEP}:7", "dpo stopped after step "),
    ],
)
def test_a_stop_is_polite_in_every_stage(name, point, said, request, tmp_path):
    recipe, whole = request.getfixturevalue(name), request.getfixturevalue(f"finished_{name}")
    workdir = tmp_path / "run"
    stopped = recipe.interrupt("SIGTERM", point, workdir)
    assert stopped.returncode == 4, stopped.stderr
    line = stopped.stderr.strip().splitlines()[-1]
    assert line.startswith(f"jaxconv: stopped: {said}"), line
    assert "to go on, run the same" in line and "Traceback" not in stopped.stderr
    assert json.loads((workdir / "report.json").read_text())["status"] == "stopped"
    done = recipe.run(workdir)
    assert done.returncode == 0, done.stderr
    recipe.assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "jaxconv.data.token_store:build:1",
        "jaxconv.recipes.dpo:reference_logprobs:1",
        f"{STEP}:2",
        "jaxconv.recipes.sft:export:1",
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_room(point, dpo, finished_dpo, tmp_path):
    workdir = tmp_path / "run"
    full = dpo.interrupt("full", point, workdir)
    assert full.returncode == 1, full.stderr
    # While a checkpoint is written, Orbax's threads print tracebacks of their own beside it.
    [line] = [x for x in full.stderr.splitlines() if x.startswith("jaxconv: ")]
    assert line.startswith("jaxconv: failed: ")
    assert "File too large" in line or "disk full" in line
    done = dpo.run(workdir)
    assert done.returncode == 0, done.stderr
    dpo.assert_same_run(workdir, finished_dpo)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(sft, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {i}?"},
                {"role": "assistant", "content": f"answer {i}"},
            ]
        }
        for i in range(40)
    ]
    path, workdir = tmp_path / "talks.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"data__path": path, "control__exchanged": False, "train__steps": 4}
    assert sft.interrupt("SIGTERM", f"{STEP}:2", workdir, **fields).returncode == 4
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"answer 7", b"answer 8"))
    refused = sft.run(workdir, **fields)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"store {workdir / 'artifacts' / 'tokens' / 'train'} was made of" in refused.stderr
    assert "talks.jsonl was " in refused.stderr and "--overwrite starts anew" in refused.stderr
    path.write_bytes(whole)  # the same content at another time
    assert sft.run(workdir, **fields).returncode == 0
