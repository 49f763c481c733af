"""`launch/gke.sh` with a stand-in for kubectl: the manifest that it renders, and the calls."""

import pytest
import yaml

_RUN = ("--", "--config=configs/sft.py", "--workdir=gs://bucket/sft", r'--config.a="b" \ ${NAME} &')
_SLICE = ("--image=registry/jaxconv:1", "--accelerator=tpu-v6e-slice", "--topology=4x8")


@pytest.fixture
def gke(cluster):
    cluster.command("kubectl", "if [[ $1 == create ]]; then cat >manifest; fi")
    return cluster


def manifest(gke, *arguments):
    done = gke.run("gke.sh", "run", "sft", *arguments)
    assert done.returncode == 0, done.stderr
    assert gke.calls == ["kubectl create --namespace=default --filename=-"]
    return yaml.safe_load((gke.folder / "manifest").read_text())


def test_the_manifest_has_a_pod_for_each_host_and_the_run_as_it_was_given(gke):
    jobset = manifest(gke, *_SLICE, *_RUN)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {"name": "sft"}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 8
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["serviceAccountName"] == "default"
    (container,) = pod["containers"]
    assert container["image"] == "registry/jaxconv:1"
    assert container["command"] == ["python", "-m", "jaxconv.launch"]
    assert container["args"] == [*_RUN[1:], "--distributed"]
    chips = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": chips, "limits": chips}


def test_flags_change_what_they_name(gke):
    flags = ("--spot", "--chips-per-host=8", "--service-account", "me", "--max-restarts=3")
    jobset = manifest(gke, *_SLICE[:2], "--topology=2x4", *flags, *_RUN)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == 1
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "me"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}


def test_only_what_a_restart_would_not_change_ends_the_jobset(gke):
    """Kubernetes' rules, applied by hand: status 4, a kill and a preemption restart it."""
    jobset = manifest(gke, *_SLICE, *_RUN)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["values"]) == ("FailJob", "In", [1, 2, 3])
    assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] == 20


def test_dry_run_prints_the_same_manifest_and_runs_nothing(gke):
    manifest(gke, *_SLICE, *_RUN)
    done = gke.run("gke.sh", "run", "sft", *_SLICE, "--dry_run", *_RUN)
    assert gke.calls == [] and done.returncode == 0
    first, *text, last = done.stdout.splitlines()
    assert first == "kubectl create --namespace=default --filename=- <<'END'" and last == "END"
    assert text == (gke.folder / "manifest").read_text().splitlines()


def test_settings_from_the_environment(gke):
    environment = {
        "IMAGE": "i",
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "4x4",
        "NAMESPACE": "team",
    }
    assert gke.run("gke.sh", "run", "sft", *_RUN, **environment).returncode == 0
    assert gke.calls == ["kubectl create --namespace=team --filename=-"]


def test_other_verbs(gke):
    assert gke.run("gke.sh", "logs", "sft").returncode == 0
    first = "jobset.sigs.k8s.io/jobset-name=sft,batch.kubernetes.io/job-completion-index=0"
    assert gke.calls == [f"kubectl logs --namespace=default --follow --tail=-1 --selector={first}"]
    assert gke.run("gke.sh", "delete", "sft", "--namespace=team").returncode == 0
    assert gke.calls == ["kubectl delete jobset sft --namespace=team"]
    done = gke.run("gke.sh", "delete", "sft", "--dry-run")
    assert gke.calls == []
    assert gke.printed_calls(done.stdout) == ["kubectl delete jobset sft --namespace=default"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "verb missing; it may be run, logs, delete or help"),
        (("run", *_SLICE, *_RUN), "the name of the run is missing"),
        (("run", "S", *_SLICE, *_RUN), "S is no name of a run"),
        (("run", "s", *_SLICE[1:], *_RUN), "--image is missing"),
        (("run", "s", _SLICE[0], *_SLICE[2:], *_RUN), "--accelerator is missing"),
        (("run", "s", *_SLICE[:2], *_RUN), "--topology is missing"),
        (("run", "s", *_SLICE, "--topology=4", *_RUN), "--topology=4; it must be such as 4x4"),
        (("run", "s", *_SLICE, "--topology=3x3", *_RUN), "has 9 chips, no multiple of"),
        (("run", "s", *_SLICE), "the run is missing"),
        (("run", "s", *_SLICE, "--", "--config=c", "--workdir=/a"), "--workdir=/a; it must be on"),
        (("run", "s", *_SLICE, "--config=c"), "--config=c is no flag of"),
        (("run", "s", "--image"), "--image has no value"),
    ],
)
def test_refusals_are_one_line_and_status_2(gke, arguments, line):
    done = gke.run("gke.sh", *arguments)
    assert done.returncode == 2 and gke.calls == []
    assert line in done.stderr and done.stderr.count("\n") == 1
