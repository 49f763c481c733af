"""`launch/slurm.sbatch` with stand-ins for srun, scancel and scontrol."""

import signal
import subprocess

import pytest

_RUN = ("--config=configs/sft.py", "--workdir=/shared/a b")
_STEP = (
    "srun --kill-on-bad-exit=0 --wait=600 --label "
    ".venv/bin/python -m jaxconv.launch --config=configs/sft.py --workdir=/shared/a b"
)


@pytest.fixture
def slurm(cluster):
    """A job with an srun that leaves with STATUS, or waits for scancel and then does."""
    cluster.command("srun", "while [[ ${WAITS:-} && ! -e stop ]]; do sleep 0.1; done\nexit $STATUS")
    cluster.command("scancel", "touch stop")
    cluster.command("scontrol")
    (cluster.folder / ".venv/bin").mkdir(parents=True)
    (cluster.folder / ".venv/bin/python").symlink_to("/bin/true")
    return cluster


def test_dry_run_prints_the_commands_and_runs_none(slurm):
    done = slurm.run("slurm.sbatch", "--dry_run", *_RUN)
    assert done.returncode == 0 and slurm.calls == []
    assert slurm.printed_calls(done.stdout) == [
        _STEP,
        "scancel --signal=TERM JOB",
        "scontrol requeue JOB",
    ]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 143])
def test_a_job_that_has_ended_is_not_requeued(slurm, status):
    done = slurm.run("slurm.sbatch", *_RUN, SLURM_JOB_ID="7", STATUS=str(status))
    assert (done.returncode, slurm.calls) == (status, [_STEP])


@pytest.mark.parametrize("status", [4, 134, 137])
@pytest.mark.parametrize(("restarts", "requeued"), [(None, True), (19, True), (20, False)])
def test_a_job_that_lost_a_process_is_requeued_so_often(slurm, status, restarts, requeued):
    count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    done = slurm.run("slurm.sbatch", *_RUN, SLURM_JOB_ID="7", STATUS=str(status), **count)
    again = ["scontrol requeue 7"] if requeued else []
    assert (done.returncode, slurm.calls) == (status, [_STEP, *again])
    assert f"ended with {status}" in done.stderr


@pytest.mark.parametrize(
    ("status", "requeued"), [(4, True), (137, True), (143, True), (0, False), (1, False)]
)
def test_before_the_time_limit_it_stops_the_processes_and_is_requeued(slurm, status, requeued):
    job = subprocess.Popen(
        ["bash", str(slurm.root / "launch/slurm.sbatch"), *_RUN],
        cwd=slurm.folder,
        env=slurm.environment(
            SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="12", STATUS=str(status), WAITS="1"
        ),
    )
    while not (slurm.folder / "calls").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == status
    step = _STEP.replace("--label", "--label --cpus-per-task=12")
    again = ["scontrol requeue 7"] if requeued else []
    assert slurm.calls == [step, "scancel --signal=TERM 7", *again]


@pytest.mark.parametrize("status", [4, 137])
def test_a_cancelled_job_waits_for_its_processes_and_is_not_requeued(slurm, status):
    job = subprocess.Popen(
        ["bash", str(slurm.root / "launch/slurm.sbatch"), *_RUN],
        cwd=slurm.folder,
        env=slurm.environment(SLURM_JOB_ID="7", STATUS=str(status), WAITS="1"),
    )
    while not (slurm.folder / "calls").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    (slurm.folder / "stop").touch()
    assert job.wait(timeout=30) == status
    assert slurm.calls == [_STEP]


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (_RUN, {}, "runs under Slurm: sbatch launch/slurm.sbatch --config=configs/sft.py"),
        (_RUN[:1], {"SLURM_JOB_ID": "7"}, "give --config=… and --workdir=…"),
        (_RUN, {"SLURM_JOB_ID": "7", "PYTHON": "nowhere"}, "nowhere does not run in"),
    ],
)
def test_it_refuses_what_cannot_run(slurm, arguments, environment, line):
    done = slurm.run("slurm.sbatch", *arguments, **environment)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
    assert slurm.calls == []


def test_as_many_processes_as_gpus_that_each_of_them_sees(slurm):
    lines = (slurm.root / "launch/slurm.sbatch").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in lines
        if "#SBATCH --" in line[:10] and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "B:USR1@300"
    assert not {"gpus-per-task", "gpu-bind"} & options.keys()
