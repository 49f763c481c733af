"""`launch/tpu_vm.sh` with a stand-in for gcloud: what is called, and in which order."""

import shlex
import subprocess

import pytest

_WHERE = "--zone=us-east5-b"
_SLICE = (f"{_WHERE}", "--accelerator-type=v6e-32", "--runtime-version=v2-alpha-tpuv6e")
_RUN = ("--", "--config=configs/sft.py", "--workdir=gs://bucket/sft", "--config.data.path=a b")
_TPU = "gcloud compute tpus tpu-vm"
_QUEUE = "gcloud compute tpus queued-resources"
_WORKER = "jaxconv/launch/tpu_worker.sh"
_STATE = f"{_TPU} list {_WHERE} --filter=name~/t1$ --format=value(state)"
_REQUEST = f"{_QUEUE} list {_WHERE} --filter=name~/t1$ --format=value(state.state)"
_CREATE = (
    f"{_QUEUE} create t1 --node-id=t1 {_WHERE} --accelerator-type=v6e-32 "
    "--runtime-version=v2-alpha-tpuv6e --spot --async"
)
_DELETE = f"{_QUEUE} delete t1 {_WHERE} --force --quiet"
_ALL = f"{_TPU} ssh t1 {_WHERE} --worker=all --command="
_STATUS = f"{_ALL}test ! -f {_WORKER} || bash {_WORKER} status"
_INSTALL = (
    f"{_ALL}mkdir -p jaxconv && cd jaxconv && "
    "tar -tzf ../jaxconv.tar.gz | cut -d/ -f1 | sort -u | xargs rm -rf && "
    "tar -xzf ../jaxconv.tar.gz && bash launch/tpu_worker.sh install"
)
_START = (
    f"{_ALL}bash {_WORKER} start --config=configs/sft.py --workdir=gs://bucket/sft "
    r"--config.data.path=a\ b "
)
_FOLLOW = f"{_TPU} ssh t1 {_WHERE} --worker=0 --command=bash {_WORKER} follow"
_FETCH = "gcloud storage cp gs://bucket/sft/report.json gs://bucket/sft/report.md runs/t1/"


# Answers the n-th question of a kind with the n-th line of its file, from the end on with the last.
_GCLOUD = r"""
nth() {
    local lines
    mapfile -t lines <"$1"
    local n=$((calls < ${#lines[@]} ? calls : ${#lines[@]} - 1))
    printf '%s' "${lines[n]}"
}
[[ ! -s failing || $call != *"$(<failing)"* ]] || exit 1
case $call in
*'tpu-vm list'*) nth states ;;
*'queued-resources list'*) nth requests ;;
*status) for word in $(nth statuses); do echo "jaxconv status: $word"; done ;;
esac
"""


class Cloud:
    """The script in a checkout of its own, with stand-ins for gcloud, git and sleep."""

    def __init__(self, cluster):
        self._cluster = cluster
        self._root = cluster.folder / "checkout"
        (self._root / "launch").mkdir(parents=True)
        script = (cluster.root / "launch/tpu_vm.sh").read_text()
        (self._root / "launch/tpu_vm.sh").write_text(script)
        (self._root / "tracked").touch()
        cluster.root = self._root
        cluster.command("sleep")
        cluster.command("git", r"printf 'tracked\0'")
        cluster.command("gcloud", _GCLOUD)
        self.copy = (
            f"{_TPU} scp {cluster.folder}/jaxconv-t1.tar.gz t1:jaxconv.tar.gz {_WHERE} --worker=all"
        )
        self.once = [_STATUS, self.copy, _INSTALL, _START, _FOLLOW, _STATUS]

    def answers(self, states, requests=("",), statuses=("", "0 0"), failing=""):
        """What the slice, the request and the run on its two workers are, question by question;
        the last answer stays. Calls with `failing` in them fail."""
        for name, lines in (("states", states), ("requests", requests), ("statuses", statuses)):
            (self._root / name).write_text("".join(f"{line}\n" for line in lines))
        (self._root / "failing").write_text(failing)

    def run(self, *arguments, **environment):
        self.done = self._cluster.run(
            "tpu_vm.sh", *arguments, TMPDIR=str(self._cluster.folder), **environment
        )
        return self.done.returncode

    @property
    def calls(self):
        return [call for call in self._cluster.calls if call.startswith("gcloud")]

    @property
    def printed(self):
        printed = self._cluster.printed_calls(self.done.stdout)
        return [call for call in printed if call.startswith("gcloud")]


@pytest.fixture
def cloud(cluster):
    return Cloud(cluster)


def test_a_fresh_slice_and_its_dry_run_are_the_same_calls(cloud):
    cloud.answers(states=["", "READY"])
    command = ("run", "t1", *_SLICE, "--spot", "--delete")
    expected = [_STATE, _REQUEST, _CREATE, _STATE, *cloud.once, _FETCH, _REQUEST, _DELETE]
    assert cloud.run(*command, "--dry_run", *_RUN) == 0
    assert cloud.calls == [] and cloud.printed == expected
    cloud.answers(states=["", "READY"], requests=["", "ACTIVE"])
    assert cloud.run(*command, *_RUN) == 0
    assert cloud.calls == expected


def test_everything_may_come_from_the_environment(cloud):
    environment = {
        "TPU_NAME": "t1",
        "ZONE": "us-east5-b",
        "PROJECT_ID": "p",
        "ACCELERATOR_TYPE": "v6e-32",
        "RUNTIME_VERSION": "v2-alpha-tpuv6e",
    }
    assert cloud.run("run", "--dry-run", *_RUN, **environment) == 0
    expected = _CREATE.replace(_WHERE, f"{_WHERE} --project=p").replace(" --spot", "")
    assert expected in cloud.printed


@pytest.mark.parametrize(
    ("accelerator", "workdir"), [("v6e-8", "runs/a"), ("v5p-8", "runs/a"), ("v6e-32", "/nfs/a")]
)
def test_a_workdir_that_all_hosts_may_see_is_taken(cloud, accelerator, workdir):
    one = [flag.replace("v6e-32", accelerator) for flag in _SLICE]
    command = ("run", "t1", *one, "--dry_run", "--", "--config=c", f"--workdir={workdir}")
    assert cloud.run(*command) == 0, cloud.done.stderr


def test_flags_of_gcloud_reach_the_calls_that_they_are_for(cloud):
    flags = ("--network=n", "--internal-ips", "--labels", "a=b,c=d", "--internal-ip")
    assert cloud.run("run", "t1", *_SLICE, *flags, "--dry_run", *_RUN) == 0
    create = [call for call in cloud.printed if " create " in call]
    assert create[0].endswith(" --network=n --internal-ips --labels=a=b,c=d --async")
    to_workers = [call for call in cloud.printed if " ssh " in call or " scp " in call]
    assert len(to_workers) == 6 and all(" --internal-ip " in call for call in to_workers)


def test_a_slice_that_is_ready_is_taken(cloud):
    cloud.answers(states=["READY"])
    assert cloud.run("run", "t1", *_SLICE, *_RUN) == 0
    assert cloud.calls == [_STATE, *cloud.once, _FETCH]


def test_a_run_in_progress_is_only_followed(cloud):
    cloud.answers(states=["READY"], statuses=["running running", "0 0"])
    assert cloud.run("run", "t1", *_SLICE, *_RUN) == 0
    assert cloud.calls == [_STATE, _STATUS, _START, _FOLLOW, _STATUS, _FETCH]


def test_a_preempted_slice_is_made_again_and_the_same_command_run_again(cloud):
    cloud.answers(
        # made; preempted while the run is followed; deleted; made again
        states=["", "READY", "PREEMPTED", "PREEMPTED", "", "CREATING", "READY"],
        requests=["", "SUSPENDED", ""],
        statuses=["", "", "", "0 0"],
    )
    assert cloud.run("run", "t1", *_SLICE, "--spot", *_RUN) == 0
    gone = [_STATE, _STATE, _REQUEST, _DELETE]
    again = [_STATE, _REQUEST, _CREATE, _STATE, _STATE, *cloud.once, _FETCH]
    assert cloud.calls == [_STATE, _REQUEST, _CREATE, _STATE, *cloud.once, *gone, *again]
    assert "ended with preempted; beginning again (1 of 20)" in cloud.done.stderr


def test_a_run_that_was_stopped_by_a_signal_is_begun_again(cloud):
    cloud.answers(states=["READY"], statuses=["", "4 4", "4 4", "3 3"])
    assert cloud.run("run", "t1", *_SLICE, *_RUN) == 3
    assert cloud.calls == [_STATE, *cloud.once, _STATE, *cloud.once, _FETCH]


@pytest.mark.parametrize(
    ("words", "status", "fetched"),
    [
        ("0 0", 0, True),
        ("3 0", 3, True),
        ("1 4", 1, True),
        ("2 1", 2, False),
        ("stopped 4", 4, False),
        ("lost 1", 4, False),
        ("137 4", 1, False),
    ],
)
def test_the_status_of_all_workers_together(cloud, words, status, fetched):
    cloud.answers(states=["READY"], statuses=["", words])
    assert cloud.run("run", "t1", *_SLICE, "--max-restarts=0", *_RUN) == status
    assert (cloud.calls[-1] == _FETCH) == fetched


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("4 1 4 4", "50 4"),
        ("1 4", "50 4"),
        ("137 4 4", "50 4"),
        ("1 1 1 lost", "50 1"),
        ("134 1 134", "50 134"),
        ("1 1 1", "5 "),
        ("0 0", None),
        ("4 4 4", None),
        ("stopped stopped", None),
    ],
)
def test_the_last_lines_of_those_that_ended_unlike_most_are_shown(cloud, words, shown):
    cloud.answers(states=["READY"], statuses=["", words])
    cloud.run("run", "t1", *_SLICE, "--max-restarts=0", *_RUN)
    ends = [call for call in cloud.calls if " ends " in call]
    assert ends == ([f"{_ALL}bash {_WORKER} ends {shown}"] if shown else [])


def test_workers_that_do_not_answer_end_it_after_a_while(cloud):
    cloud.answers(states=["READY"], failing=f"{_WORKER} status")
    assert cloud.run("run", "t1", *_SLICE, *_RUN) == 4
    assert cloud.calls[-2:] == [_STATUS, _STATE]
    assert cloud.calls.count(_FOLLOW) == 10
    assert "could not ask all workers of t1 how the run is (10 of 10)" in cloud.done.stderr
    assert "some workers of t1 do not answer, though it is READY" in cloud.done.stderr


@pytest.mark.parametrize("worker", ["5", "all"])
def test_any_worker_can_be_followed(cloud, worker):
    cloud.answers(states=["READY"], statuses=["0 0"])
    assert cloud.run("logs", "t1", _WHERE, f"--worker={worker}") == 0
    assert cloud.calls == [_FOLLOW.replace("--worker=0", f"--worker={worker}"), _STATUS]


def test_a_connection_that_breaks_is_made_again(cloud):
    cloud.answers(states=["READY"], statuses=["", "running running", "0 0"])
    assert cloud.run("run", "t1", *_SLICE, *_RUN) == 0
    assert cloud.calls == [_STATE, *cloud.once, _STATE, _FOLLOW, _STATUS, _FETCH]


def test_what_is_left_of_an_earlier_request_is_deleted_first(cloud):
    cloud.answers(states=["", "", "READY"], requests=["SUSPENDED", "SUSPENDED", ""])
    assert cloud.run("run", "t1", *_SLICE, "--spot", *_RUN) == 0
    assert cloud.calls[:6] == [_STATE, _REQUEST, _REQUEST, _DELETE, _STATE, _REQUEST]
    assert cloud.calls[6] == _CREATE


def test_a_request_that_fails_ends_it_with_googles_reason(cloud):
    cloud.answers(states=[""], requests=["", "WAITING_FOR_RESOURCES", "FAILED"])
    assert cloud.run("run", "t1", *_SLICE, "--spot", *_RUN) == 1
    assert cloud.calls[-1] == f"{_QUEUE} describe t1 {_WHERE} --format=yaml(state)"
    assert "slice t1: WAITING_FOR_RESOURCES" in cloud.done.stderr


def test_what_is_copied_replaces_the_checkout_and_leaves_the_rest(cloud, cluster):
    """The two commands that do it, carried out on this machine."""
    checkout, worker = cluster.root, cluster.folder / "jaxconv"
    tracked = ("a b", "launch/tpu_worker.sh", "package/new.py")
    for folder, files in (
        (checkout, (*tracked, "untracked")),
        (worker, ("package/old.py", "runs/x/report.json", ".venv/bin/python")),
    ):
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("")
    cluster.command("git", "printf '%s\\0' " + " ".join(f"'{file}'" for file in tracked))
    cloud.run("run", "t1", *_SLICE, "--dry_run", *_RUN)
    lines = [shlex.split(line) for line in cloud.done.stdout.splitlines()]
    pack = next(line for line in lines if line[0] == "bash")
    unpack = next(line[-1] for line in lines if line[-1].endswith("install"))
    environment = cluster.environment()
    subprocess.run(pack, cwd=checkout, env=environment, check=True)
    (cluster.folder / "jaxconv-t1.tar.gz").rename(cluster.folder / "jaxconv.tar.gz")
    script = unpack.removeprefix("--command=")
    subprocess.run(["bash", "-c", script], cwd=cluster.folder, env=environment, check=True)
    files = {str(file.relative_to(worker)) for file in worker.rglob("*") if file.is_file()}
    assert files == {*tracked, "runs/x/report.json", ".venv/bin/python"}


@pytest.mark.parametrize("failing", [" list ", " scp ", " install", " start "])
def test_a_call_that_fails_ends_it(cloud, failing):
    cloud.answers(states=["READY"], failing=failing)
    assert cloud.run("run", "t1", *_SLICE, *_RUN) == 1
    assert not any("create" in call or "follow" in call for call in cloud.calls)


def test_other_verbs(cloud):
    cloud.answers(states=["READY"], requests=["ACTIVE"], statuses=["running running"])
    assert cloud.run("stop", "t1", _WHERE) == 0
    assert cloud.calls == [f"{_ALL}bash {_WORKER} stop"]
    assert cloud.run("fetch", "t1", _WHERE, "--", "--workdir=gs://bucket/sft") == 0
    assert cloud.calls == [_FETCH]
    assert cloud.run("fetch", "t1", _WHERE, "--", "--workdir=runs/a") == 0
    report = "t1:jaxconv/runs/a/report"
    scp = f"{_TPU} scp {report}.json {report}.md runs/t1/ {_WHERE} --worker=0"
    assert cloud.calls == [scp]
    assert cloud.run("delete", "t1", _WHERE) == 0
    assert cloud.calls == [_REQUEST, _DELETE]
    cloud.answers(states=["READY"])
    assert cloud.run("delete", "t1", _WHERE) == 0
    assert cloud.calls == [_REQUEST, _STATE, f"{_TPU} delete t1 {_WHERE} --quiet"]
    cloud.answers(states=["READY"], statuses=["3 3"])
    assert cloud.run("logs", "t1", _WHERE) == 0
    assert cloud.calls == [_FOLLOW, _STATUS] and "the run on t1: 3" in cloud.done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "verb missing; it may be run, logs, stop, fetch, delete or help"),
        (("start",), "verb start; it may be run"),
        (("run", *_SLICE, *_RUN), "the name of the slice is missing"),
        (("run", "T_1", *_SLICE, *_RUN), "T_1 is no name of a slice"),
        (("run", "t1", *_RUN), "--zone is missing"),
        (("logs", "t1"), "--zone is missing"),
        (("run", "t1", _WHERE, *_RUN), "--accelerator-type is missing"),
        (("run", "t1", *_SLICE[:2], *_RUN), "--runtime-version is missing"),
        (("run", "t1", "--zone"), "--zone has no value"),
        (("run", "t1", *_SLICE), "the run is missing; give -- --config=… --workdir=…"),
        (("run", "t1", *_SLICE, "--", "--config=c"), "--workdir=… is missing after --"),
        (("run", "t1", *_SLICE, "--config=c"), "--config=c is no flag of"),
        (("logs", "t1", _WHERE, "--worker=first"), "--worker=first; it may be a number"),
        (("run", "t1", *_SLICE, "--max-restarts=x", *_RUN), "--max-restarts=x; it must be"),
        (
            ("run", "t1", *_SLICE, "--spot", "--", "--config=c", "--workdir=runs/a"),
            "--workdir=runs/a; with --spot it must be on gs://",
        ),
        (
            ("run", "t1", *_SLICE, "--", "--config=c", "--workdir=runs/a"),
            "--workdir=runs/a; v6e-32 has several hosts, so it must be on gs://",
        ),
    ],
)
def test_refusals_are_one_line_and_status_2(cloud, arguments, line):
    cloud.answers(states=["READY"])
    assert cloud.run(*arguments) == 2
    assert line in cloud.done.stderr and cloud.done.stderr.count("\n") == 1
    assert cloud.calls == []
