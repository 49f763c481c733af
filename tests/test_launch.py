"""The command line as a user meets it: refusals, resuming, signals, exit statuses."""

import importlib.util
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxconv import launch
from jaxconv.evals.report import Report
from jaxconv.train import metrics
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.workdir import Workdir

_HERE = Path(__file__).parent
_DRIVER = _HERE / "driver.py"
_CONFIG = f"--config={_HERE / 'counting_config.py'}"

_spec = importlib.util.spec_from_file_location("counting_driver", _DRIVER)
driver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver)  # registers jaxconv.recipes.counting


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(_DRIVER), _CONFIG, "--workdir=run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(process, line):
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"{line!r} was not printed; {process.stderr.read()}")


def total_of(folder="run"):
    return json.loads(Path(folder, "report.json").read_text())["results"]["total"]["value"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--config is missing; it must be a config file"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--config=configs/omar"], "must be a Python file"),
        ([_CONFIG + ":huge"], "no preset 'huge'; it may be tiny, long"),
        ([_CONFIG, "--config.stpes=3"], "config.stpes: no such field; did you mean config.steps?"),
        ([_CONFIG, "--config.group.rat=3"], "did you mean config.group.rate?"),
        ([_CONFIG, "--config.group.qqqq=3"], "config.group has name, rate"),
        (
            [_CONFIG, "--config.rate=3"],
            "config.rate: no such field; did you mean config.group.rate?",
        ),
        ([_CONFIG, "--config.steps.deeper=3"], "no such field; config.steps is not a group"),
        ([_CONFIG, "--config.steps=many"], "config.steps='many': must be an integer, such as 3"),
        ([_CONFIG, "--config.steps=2.5"], "config.steps='2.5': must be an integer"),
        ([_CONFIG, "--config.group.rate=fast"], "config.group.rate='fast': must be a number"),
        ([_CONFIG, "--config.group.rate=nan"], "config.group.rate=nan; it must be finite"),
        ([_CONFIG, "--config.verbose=7"], "config.verbose='7': must be true or false"),
        ([_CONFIG, "--config.steps"], "config.steps has no value; it must be an integer"),
        ([_CONFIG, "--config.group=3"], "config.group is a group; set one of its fields: name, ra"),
        ([_CONFIG, "--config.recipe=nothing"], "config.recipe='nothing'; it may be "),
        ([_CONFIG, "--config.steps=0"], "config.steps=0; it must be at least 1"),
        ([_CONFIG, "--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ([_CONFIG, "stray"], "unexpected argument 'stray'"),
        ([_CONFIG, "--eval_only", "--chat"], "--eval_only and --chat exclude each other"),
        ([_CONFIG, "--overwrite", "--eval_only"], "--overwrite would remove"),
        ([_CONFIG, "--chat"], "--chat: recipe 'counting' does not have it"),
        ([_CONFIG, "--eval_only"], "holds no run yet"),
        ([_CONFIG, "--coordinator=a:1"], "--coordinator needs --distributed"),
        ([_CONFIG, "--distributed", "--process_index=0"], "alone is not enough"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, line, capsys):
    assert launch.main(arguments) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.startswith("jaxconv: refused: ") and err.count("\n") == 1
    assert not list(Path().glob("runs/*/*.json"))


def test_a_refusal_does_not_wait_for_jax():
    refused = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jaxconv.launch", _CONFIG, "--config.stpes=3"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "no such field" in refused.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in refused.stderr.splitlines()}
    assert "ml_collections" in imported and not imported & {"jax", "orbax", "matplotlib", "rich"}


def test_print_config_shows_overrides_and_leaves(capsys):
    arguments = [_CONFIG, "--config.group.rate=2", "--config.verbose", "--config.shape=(3,4)"]
    assert launch.main([*arguments, "--config.seed", "7", "--print_config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["group"] == {"name": "adam", "rate": 2.0}
    assert shown["verbose"] is True and shown["shape"] == [3, 4] and shown["seed"] == 7
    assert not list(Path().iterdir())


def test_presets_name_the_default_workdir(capsys):
    assert launch.main([_CONFIG + ":long", "--config.steps=1"]) == 0
    assert (Path("runs") / "counting_config-long" / "report.md").exists()


def test_a_finished_run_prints_its_report_again_and_works_no_more(capsys):
    command = [_CONFIG, "--workdir=run"]
    assert launch.main(command) == 0
    written = Path("run/report.json").stat().st_mtime_ns
    assert "starting at 0" in capsys.readouterr().out
    assert launch.main(command) == 0
    again = capsys.readouterr().out
    assert "starting" not in again and "total" in again and "report.md" in again
    assert Path("run/report.json").stat().st_mtime_ns == written
    identity = json.loads(Path("run/config.json").read_text())
    assert identity["config"]["steps"] == 3 and identity["preset"] == "tiny"
    assert {"jax", "python", "jaxconv"} <= identity["versions"].keys()


def test_another_config_is_refused_field_by_field_unless_overwritten(capsys):
    assert launch.main([_CONFIG, "--workdir=run"]) == 0
    first = total_of()
    other = [_CONFIG, "--workdir=run", "--config.increment=2.0", "--config.group.name=sgd"]
    assert launch.main(other) == 2
    err = capsys.readouterr().err
    assert "config.group.name: 'adam' -> 'sgd'; config.increment: 0.5 -> 2.0" in err
    assert total_of() == first
    assert launch.main([*other, "--overwrite"]) == 0
    assert total_of() == pytest.approx(first + 3 * 1.5, abs=1e-5)
    assert [record["step"] for record in metrics.read(Workdir("run"))] == [1, 2, 3]
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_overwrite_spares_folders_of_somebody_else(capsys):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("years of work")
    assert launch.main([_CONFIG, "--workdir=run", "--overwrite"]) == 2
    assert "has files but no config.json" in capsys.readouterr().err
    assert Path("run/thesis.tex").read_text() == "years of work"


def test_eval_only_keeps_the_report_of_the_training(capsys):
    assert launch.main([_CONFIG, "--workdir=run"]) == 0
    before = Path("run/report.json").read_bytes()
    assert launch.main([_CONFIG, "--workdir=run", "--eval_only", "--config.seed=1"]) == 0
    assert Path("run/report.json").read_bytes() == before
    notes = json.loads(Path("run/evaluation.json").read_text())["notes"]
    assert notes == ["evaluated again", "differs from the training: config.seed: 0 -> 1"]


@pytest.mark.parametrize(("status", "expected"), [("done", 0), ("partial", 3)])
def test_the_status_of_the_report_is_the_exit_status(status, expected, monkeypatch):
    monkeypatch.setattr(driver.recipe, "run", lambda config, workdir: Report(status=status))
    assert launch.main([_CONFIG, "--workdir=run"]) == expected
    assert launch.main([_CONFIG, "--workdir=run"]) == expected


def test_a_bug_leaves_one_line_and_its_traceback_in_the_workdir(capsys):
    command = [_CONFIG, "--workdir=run", "--config.fail=bug"]
    assert launch.main(command) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "RuntimeError: a bug in the recipe" in err
    log = Path("run/error.log").read_text()
    assert "Traceback" in log and "driver.py" in log and str(Path("run/error.log")) in err
    assert json.loads(Path("run/report.json").read_text())["status"] == "failed"
    # A failed run is not a finished one: it is tried again.
    assert launch.main(command) == 1
    assert Path("run/error.log").read_text().count("Traceback") == 2


@pytest.mark.parametrize(
    ("broken", "status", "reported"), [(True, 4, "stopped"), (False, 1, "failed")]
)
def test_a_broken_connection_between_processes_can_be_gone_on_from(
    broken, status, reported, monkeypatch, capsys
):
    monkeypatch.setattr(launch.processes, "explains", lambda error: broken)
    assert launch.main([_CONFIG, "--workdir=run", "--config.fail=bug"]) == status
    assert json.loads(Path("run/report.json").read_text())["status"] == reported
    assert ("the connection between processes broke" in capsys.readouterr().err) == broken


def test_a_refusal_after_training_keeps_what_was_trained(capsys):
    command = [_CONFIG, "--workdir=run", "--config.steps=2", "--config.fail=refusal"]
    assert launch.main(command) == 2
    assert "refused: what was trained cannot be used" in capsys.readouterr().err
    with Checkpoints(Path("run/checkpoints/count")) as checkpoints:
        assert checkpoints.latest() == 2
    # The same command goes on from there.
    assert launch.main(command) == 2
    assert "starting at 2" in capsys.readouterr().out


def test_a_second_process_on_one_workdir_is_refused(capsys):
    first = start("--config.pause=30")
    try:
        wait_for(first, "working on 1")
        assert launch.main([_CONFIG, "--workdir=run"]) == 2
        err = capsys.readouterr().err
        assert f"is in use by process {first.pid}" in err and err.count("\n") == 1
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_same_command_resumes(kind, capsys):
    process = start("--config.pause=0.3", "--config.steps=4")
    wait_for(process, "working on 2")
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "working on 3" not in out
    assert "stopped: saved at step 2; to go on, run the same command again" in err
    assert json.loads(Path("run/report.json").read_text())["status"] == "stopped"
    assert launch.main([_CONFIG, "--workdir=run", "--config.pause=0.3", "--config.steps=4"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["starting at 2", "working on 3"]


def test_a_signal_that_comes_while_the_run_is_made_ready_is_not_its_death():
    """Here while the config is read: what follows, the import of jax, takes longer."""
    Path("slow.py").write_text(
        f"import sys, time\nsys.path.insert(0, {str(_HERE)!r})\n"
        "print('reading', flush=True)\ntime.sleep(0.5)\n"
        "from counting_config import get_config\n"
    )
    process = start("--config=slow.py")
    wait_for(process, "reading")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "stopped: " in err and "working on 2" not in out


def test_a_second_ctrl_c_leaves_at_once():
    process = start("--config.pause=60")
    wait_for(process, "working on 1")
    process.send_signal(signal.SIGINT)
    while "finishing this step" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 4
    process.communicate()


def test_killed_at_any_moment_the_result_and_the_metrics_are_those_of_one_run():
    arguments = ["--config.steps=30", "--config.size=100000", "--config.pause=0.08"]
    assert launch.main([_CONFIG, "--workdir=whole", *arguments]) == 0
    rng = random.Random(0)
    kills = 0
    for _ in range(3):
        process = start(*arguments)
        wait_for(process, "starting at 0") if kills == 0 else process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.5))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    assert launch.main([_CONFIG, "--workdir=run", *arguments]) == 0
    assert total_of("run") == total_of("whole")
    records = metrics.read(Workdir("run"))
    assert [record["step"] for record in records] == list(range(1, 31))
    whole = metrics.read(Workdir("whole"))
    assert [r["total"] for r in records] == [r["total"] for r in whole]


def test_a_full_disk_is_one_line_and_status_1(capsys):
    process = start("--config.size=1000000")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("jaxconv: failed: disk full while writing ")
    assert str(Path("run/checkpoints").resolve()) in last
    assert "Traceback" not in err
    # With room again, the same command goes on.
    assert launch.main([_CONFIG, "--workdir=run", "--config.size=1000000"]) == 0
    assert "starting at 0" in capsys.readouterr().out


def watch_a_little(*arguments, lines):
    """Starts it, reads so many lines, then reads no more and waits: (status, standard error)."""
    process = start(*arguments)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    return process.wait(timeout=60), error


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_goes_on_when_nobody_reads_it_any_longer(lines):
    status, error = watch_a_little("--config.steps=5", "--config.pause=0.1", lines=lines)
    assert (status, error) == (0, "")
    assert [record["step"] for record in metrics.read(Workdir("run"))] == [1, 2, 3, 4, 5]
    assert json.loads(Path("run/report.json").read_text())["status"] == "done"
    assert not Path("run/error.log").exists()


def test_an_unread_failure_is_still_a_failure():
    process = subprocess.Popen(
        [sys.executable, str(_DRIVER), _CONFIG, "--workdir=run", "--config.fail=bug"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert "a bug in the recipe" in Path("run/error.log").read_text()


@pytest.mark.parametrize("argument", ["--help", "--print_config"])
def test_what_is_only_printed_may_be_left_unread(argument):
    assert watch_a_little(argument, lines=0) == (0, "")


def test_the_status_of_a_finished_run_stays_when_its_report_is_not_read(monkeypatch):
    monkeypatch.setattr(driver.recipe, "run", lambda config, workdir: Report(status="partial"))
    assert launch.main([_CONFIG, "--workdir=run"]) == 3
    assert watch_a_little(lines=0) == (3, "")


def run_in_two(*arguments, folders=(".", "."), kill=None):
    """Two processes, each in its folder: [(status, standard output, standard error)]. One of them
    may be killed when it has begun to work."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start(
            "--distributed",
            f"--coordinator=localhost:{port}",
            "--process_count=2",
            f"--process_index={index}",
            *arguments,
            cwd=folder,
            env={
                **os.environ,
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_NUM_CPU_DEVICES": "1",  # of each process
            },
        )
        for index, folder in enumerate(folders)
    ]
    if kill is not None:
        wait_for(processes[kill], "working on 3")
        processes[kill].kill()
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_processes_run_as_one_and_only_process_0_writes():
    ends = run_in_two()
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "total" in ends[0][1] and "report:" not in ends[1][1]
    assert [record["step"] for record in metrics.read(Workdir("run"))] == [1, 2, 3]
    assert sum(json.loads(Path("run/config.json").read_text())["devices"].values()) == 2
    assert not list(Path("run").glob(".seen*"))


@pytest.mark.slow
def test_a_workdir_that_processes_do_not_share_is_refused_before_any_work():
    for folder in "ab":
        Path(folder).mkdir()
    ends = run_in_two(folders="ab")
    assert [status for status, _, _ in ends] == [2, 2], ends
    own = [str(Path(folder, "run").resolve()) for folder in "ab"]
    for (_, out, err), workdir in zip(ends, own, strict=True):
        [line] = [line for line in err.splitlines() if line.startswith("jaxconv: ")]
        assert line.startswith(f"jaxconv: refused: --workdir={workdir}: process 0 has {own[0]} on ")
        assert f"process 1 has {own[1]} on " in line and "starting" not in out
    assert not Path("a/run/config.json").exists() and not Path("b/run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_who_is_left_names_the_process_that_was_killed_and_leaves_with_4(lost):
    ends = run_in_two("--config.pause=0.2", "--config.steps=1000", kill=lost)
    assert ends[lost][0] == -signal.SIGKILL
    status, _, err = ends[1 - lost]
    assert status == 4, err
    assert f"jaxconv: stopped: process {lost} (pid " in err
